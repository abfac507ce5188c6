"""An export is a whole folder or none, and whoever cannot have one is told why in a line."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the artifact is made with lilliput[compress]")
pytest.importorskip("onnx", reason="needs lilliput[export]")

from lilliput.apps.cli import main
from lilliput.artifact.read import Artifact
from lilliput.export import FORMATS
from lilliput.export.base import MANIFEST, export
from lilliput.export.onnx_qdq import OnnxQdq
from lilliput.methods import METHODS
from lilliput.pipeline import compress
from support.families import write_checkpoint
from support.small_artifact import write_small_artifact

TEXT = "The old man and the child went on and on, and the sea and the wind went with them. " * 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with an integer graph, W4A8."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model", "llama", 3)
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "min_max", "support.min_max:MinMax")
        recipe = [{"min_max": {"bits": 4}}]
        calibration = [folder / "text.txt"]
        compress(
            folder / "model", folder / "w4", recipe=recipe, calibration=calibration, samples=4, length=32, gate=False
        )
    return folder / "w4"


def test_formats_are_found_by_name() -> None:
    assert FORMATS.load("onnx-qdq") is OnnxQdq


def test_the_verb_writes_verifies_and_reports(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed, which runs the graphs")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["export", str(artifact), "-o", str(tmp_path / "out"), "--verify", "--text", str(text), "--quiet"]
    code = main([*command, "--tokens", "40", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["agreement"]["problems"] == []
    assert document["agreement"]["positions"] == 40
    assert max(site["local_steps"] for site in document["agreement"]["sites"]) <= 1
    assert document["manifest"]["weight_bits"] == 4
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest == document["manifest"]
    for name, told in manifest["files"].items():
        assert (tmp_path / "out" / name).stat().st_size == told["size"]
    assert {"prefill.onnx", "decode.onnx", "prefill.encodings.json", "README.md", "tokenizer.json"} <= set(
        manifest["files"]
    )
    assert main([*command, "--force", "--tokens", "8", "--length", "8"]) in (0, 6)
    table = capsys.readouterr().out
    assert "first token: the same at" in table
    assert "linear" in table
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["length"] == 8
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_stops_half_way_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(phase: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lilliput.export.onnx_qdq.encodings", stop)
    with Artifact.open(artifact) as opened:
        with pytest.raises(KeyboardInterrupt):
            export(opened, tmp_path / "out", "onnx-qdq", OnnxQdq())
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        export(opened, tmp_path / "out", "onnx-qdq", OnnxQdq())
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        monkeypatch.setattr("lilliput.export.onnx_qdq.encodings", stop)
        with pytest.raises(KeyboardInterrupt):
            export(opened, tmp_path / "out", "onnx-qdq", OnnxQdq(length=4), force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_input_is_one_line(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_small_artifact(tmp_path / "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    w4 = str(artifact)
    cases: list[tuple[list[str], int, str]] = [
        (["plain", "-o", "out"], 4, "plain: it has no integer graph"),
        (["nothere", "-o", "out"], 3, "nothere: there is no such folder"),
        ([w4, "-o", "out", "--format", "onnx"], 2, "format: 'onnx' is not known. Try onnx-qdq"),
        ([w4, "-o", "mine"], 2, "mine: is there already. Give another folder, or --force"),
        ([w4, "-o", "mine", "--force"], 2, "mine: is no earlier export, so it is not replaced"),
        ([w4, "-o", "link", "--force"], 2, "link: is no earlier export"),
        ([w4, "-o", "mine/notes.txt", "--force"], 2, "is no earlier export"),
        ([w4, "-o", "no/where"], 2, "no: there is no such folder"),
        ([w4, "-o", "out", "--length", "300"], 2, "onnx-qdq.length: length is 300, and the graph has"),
        ([w4, "-o", "out", "--verify", "--text", "no.txt"], 3, "no.txt: cannot be read as text"),
    ]
    for args, code, text in cases:
        assert main(["export", *args, "--quiet"]) == code, args
        err = capsys.readouterr().err
        assert text in err, args
        assert len(err.splitlines()) == 1, err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "plain"]
