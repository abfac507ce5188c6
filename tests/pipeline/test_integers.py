"""A recipe that ends in an integer model: one artifact, the graph beside the codes, checked like everything else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.apps.cli import main
from lilliput.artifact.amend import amend
from lilliput.artifact.entries import EmbeddingQuality, QualityEntry
from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.core.errors import ConfigError, InputCorrupt, QualityFailed, Unsupported
from lilliput.core.progress import Silent
from lilliput.data.streams import batches
from lilliput.embedding import Embedder
from lilliput.engine import Engine
from lilliput.engine.oracle import Oracle
from lilliput.methods import METHODS
from lilliput.pipeline import compress
from support.encoders import write_encoder
from support.families import write_checkpoint
from support.integers import some_tokens

TEXT = "The old man and the child went on and on, and the sea and the wind went with them. " * 60
TOKENS = some_tokens(30)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "min_max", "support.min_max:MinMax")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "gemma2"
    write_checkpoint(folder, "gemma2", 3)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def made(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "w4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "min_max", "support.min_max:MinMax")
        run(model, out, text, bits=4)
    return out


def run(model: Path, out: Path, text: Path, *, gate: bool = False, resume: bool = True, **options: Any) -> None:
    recipe = [{"min_max": options}]
    compress(model, out, recipe=recipe, calibration=[text], samples=6, length=32, gate=gate, resume=resume)


def test_the_artifact_serves_the_graph_and_everyone_else(made: Path) -> None:
    report = verify(made)
    assert report.ok, report.problems
    artifact = Artifact.open(made)
    assert artifact.bits == (4,)
    assert artifact.manifest.schema_version == "1.3"
    assert artifact.manifest.entries["embed_tokens"].bits == (8,)
    told = artifact.manifest.integer
    assert told is not None
    assert told.record == {"rows": 6}
    assert isinstance(told.quality, QualityEntry)
    assert told.quality.bits == 4
    assert 0 < told.quality.kl < 5
    assert told.quality != artifact.manifest.quality[0]
    assert {record.method for record in artifact.manifest.layers} == {"min_max"}
    assert f"KL {told.quality.kl:.4g}" in (made / "README.md").read_text()
    model = artifact.integer()
    assert model is not None
    assert model.bits == 4
    whole, weights = Oracle(model).logits(TOKENS), Engine(made, activations="float").logits(TOKENS)
    assert np.abs(whole - weights).max() < 0.35 * np.abs(weights).max()
    assert np.corrcoef(whole.ravel(), weights.ravel())[0, 1] > 0.9


def test_with_sixteen_bits_everywhere_the_graph_is_its_weights_in_float(
    model: Path, text: Path, tmp_path: Path
) -> None:
    run(model, tmp_path / "out", text, wide=True)
    graph, weights = Artifact.open(tmp_path / "out").integer(), Engine(tmp_path / "out", activations="float")
    assert graph is not None
    # What it was calibrated on: nothing is cut off.
    for row in batches([TEXT], weights.tokenizer, length=32, samples=6, bos=True).rows:
        real = weights.logits(row)
        assert np.abs(Oracle(graph).logits(row) - real).max() < 0.01 * np.abs(real).max()


def test_a_run_that_stopped_after_the_method_goes_on_from_there(
    model: Path, text: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("lilliput.pipeline.integers.write_graph", stop)
        with pytest.raises(Stop):
            run(model, tmp_path / "out", text, bits=4)
    monkeypatch.setattr("support.min_max.MinMax.make", stop)
    run(model, tmp_path / "out", text, bits=4)
    for name in ("manifest.json", "integer.json", "integer.safetensors", "bits-4.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()


def test_a_site_without_a_range_is_named_and_nothing_comes_out(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers\.1\.attn\.mixed: this site has no range"):
        run(model, tmp_path / "out", text, drop="layers.1.attn.mixed")
    assert not (tmp_path / "out").exists()


def test_the_gate_looks_at_the_graph_itself(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lilliput.pipeline.gate.INTEGER_LIMITS", {8: 1e-9})
    monkeypatch.setattr("lilliput.pipeline.gate.LIMITS", {8: 100.0})
    with pytest.raises(QualityFailed, match=r"the integer graph: KL to the original is .* above 1e-09"):
        run(model, tmp_path / "out", text, gate=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ([{"min_max": {}}, {"wanda": {}}], "min_max makes the whole integer model and is not the last stage"),
        ([{"rtn": {"bits": [8]}}, {"min_max": {}}], "rtn makes codes, and min_max makes its own"),
        ([{"min_max": {}}, {"tune": {}}], "tune would change the codes that min_max has made a graph of"),
        ([{"min_max": {"bits": 5}}], r"min_max\.bits: bits is 5"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    recipe: list[dict[str, Any]], told: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        compress(model, tmp_path / "out", recipe=recipe, calibration=[text])


def test_budgets_and_most_encoders_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    recipe: list[dict[str, Any]] = [{"min_max": {}}]
    with pytest.raises(ConfigError, match="min_max gives every block the same width"):
        compress(model, tmp_path / "out", recipe=recipe, calibration=[text], target_bits=4)
    write_encoder(tmp_path / "clip", "clip")
    for tower, told in (("vision", "pictures has no integer graph"), ("text", "projection is stored in float")):
        with pytest.raises(Unsupported, match=told):
            compress(tmp_path / "clip", tmp_path / "out", recipe=recipe, calibration=[text], tower=tower)
    write_encoder(tmp_path / "bert", "bert")
    with pytest.raises(Unsupported, match="smoothquant stands before min_max"):
        compress(tmp_path / "bert", tmp_path / "out", recipe=[{"smoothquant": {}}, *recipe], calibration=[text])


LINES = [
    f"the old man and the {what} went on{' and on' * (i % 4)}" for i, what in enumerate("abcdefghijklmnopqrstuvwx")
]


def embed(out: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the integer graph and of its weights in float."""
    whole, real = (Embedder(out, activations=kind).texts(LINES, **options) for kind in ("integer", "float"))
    return whole, real


def test_an_encoder_is_an_integer_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoder(tmp_path / "bert", "bert")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    sizes: dict[str, Any] = {"calibration": [tmp_path / "lines.txt"], "samples": 24, "length": 32, "gate": False}

    def make(name: str, **options: Any) -> Path:
        recipe = [{"mobilequant": {"batch": 4, "rule": "minmax", **options}}]
        compress(tmp_path / "bert", tmp_path / name, recipe=recipe, progress=Silent(), **sizes)
        return tmp_path / name

    static = make("static", steps=0)
    assert verify(static).ok
    artifact = Artifact.open(static)
    assert artifact.manifest.schema_version == "1.3"
    told = artifact.manifest.integer
    assert told is not None
    assert isinstance(told.quality, EmbeddingQuality)
    assert 0.95 < told.quality.cosine < 1
    assert f"cosine {told.quality.cosine:.4f} in the mean" in (static / "README.md").read_text()
    assert "cosine" in said(capsys, "inspect", str(static))
    whole, real = embed(static)
    assert whole.shape == (24, 64)
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    near = (whole * real).sum(1)
    assert 0.98 < near.min() < 1
    wide, real = embed(make("wide", steps=0, sites={"*": 16}))
    assert (wide * real).sum(1).min() > max(0.99999, float(near.max()))
    with pytest.raises(ConfigError, match="weights of 8 bits, not 4"):
        Embedder(static, activations="integer").texts(["a"], bits=4)
    chosen = Artifact.open(make("chosen", steps=0, budget16=3)).manifest.integer
    assert chosen is not None
    assert len(chosen.record["sixteen"]) == 3  # type: ignore[arg-type]


def test_an_encoder_is_exported_and_held_to_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed, which runs the graphs")
    write_encoder(tmp_path / "bert", "bert")
    lines, out = tmp_path / "lines.txt", tmp_path / "onnx"
    lines.write_text("\n".join(LINES))
    recipe = [{"mobilequant": {"steps": 0, "sites": {"*_input": 16, "*.mlp.*": 16}}}]
    compress(tmp_path / "bert", tmp_path / "a", recipe=recipe, calibration=[lines], samples=24, length=32, gate=False)
    (tmp_path / "text.txt").write_text(LINES[0])
    for text in ([], ["--text", str(tmp_path / "text.txt")]):
        told = said(
            capsys, "export", str(tmp_path / "a"), "-o", str(out), "--verify", "--tokens", "20", "--force", *text
        )
        cosine = re.search(r"vector: a cosine of ([01]\.\d+) to the oracle's", told)
        assert cosine
        assert float(cosine[1]) > 0.99
        assert "first token" not in told
        assert {path.name for path in out.iterdir()} >= {"encoder.onnx", "export.json", "tokenizer.json"}


def test_training_brings_an_encoder_closer_to_its_original(tmp_path: Path) -> None:
    write_encoder(tmp_path / "bert", "bert")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    for loss in ("logits", "hidden"):
        recipe = [{"mobilequant": {"bits": 4, "steps": 20, "batch": 4, "loss": loss, "held": 0.25}}]
        out, sizes = tmp_path / loss, {"samples": 24, "length": 32}
        compress(
            tmp_path / "bert",
            out,
            recipe=recipe,
            calibration=[tmp_path / "lines.txt"],
            gate=False,
            **sizes,  # type: ignore[arg-type]
        )
        told = Artifact.open(out).manifest.integer
        assert told is not None
        training: Any = told.record["training"]
        assert [phase["after"] < 0.9 * phase["before"] for phase in training] == [True]
    recipe = [{"mobilequant": {"scope": "block"}}]
    with pytest.raises(Unsupported, match="an encoder is trained end to end"):
        compress(tmp_path / "bert", tmp_path / "b", recipe=recipe, calibration=[tmp_path / "lines.txt"], samples=8)


@pytest.mark.parametrize("name", ["integer.json", "integer.safetensors"])
def test_a_changed_byte_in_either_file_is_found(name: str, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    report = verify(copy)
    assert not report.ok
    assert any(name in problem for problem in report.problems)


def test_a_graph_sealed_with_a_fault_is_found(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    text = (copy / "integer.json").read_text()
    (copy / "integer.json").write_text(text.replace('"heads": 4', '"heads": 3', 1))
    amend(copy)  # with a digest that fits
    report = verify(copy)
    assert not report.ok
    assert any("integer graph" in problem for problem in report.problems)
    with pytest.raises(InputCorrupt, match="integer graph"):
        Artifact.open(copy).integer()


def said(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert main([*args]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_the_command_line_describes_and_measures_the_graph(
    made: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = json.loads(said(capsys, "inspect", str(made), "--json"))["integer"]
    assert graph["positions"] == 256
    assert set(graph["edges"]) == {"8", "16"}
    assert "integer graph" in said(capsys, "inspect", str(made))
    asked = ["eval", str(made), "--text", str(text), "--length", "32", "--limit", "2", "--runner", "oracle", "--json"]
    rows = json.loads(said(capsys, *asked))["rows"]
    assert [row["bits"] for row in rows] == [4]
    assert rows[0]["tokens"] == 62


def test_an_artifact_without_a_graph_says_so(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compress(model, out, recipe=[{"rtn": {"bits": [8], "group_size": 32}}], gate=False, progress=Silent())
    assert Artifact.open(out).integer() is None
    assert b'"integer"' not in (out / "manifest.json").read_bytes()
    told = said(capsys, "eval", str(out), "--text", str(text), "--runner", "oracle", code=2)
    assert "has no integer graph" in told
