"""`compress`, and `eval --against`, through the command line on a checkpoint of a few thousand weights."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lilliput.apps.cli import main
from lilliput.apps.demo import join
from support.families import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama")
    return str(folder)


def document(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert main([*args, "--json", "--quiet"]) == code
    return json.loads(capsys.readouterr().out)


def test_inspect_describes_a_checkpoint(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = document(capsys, "inspect", checkpoint)
    assert (told["kind"], told["family"]) == ("checkpoint", "llama")
    assert main(["inspect", checkpoint]) == 0
    assert "quantizable: attention" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.lilliput"
    told = document(capsys, "compress", checkpoint, "-o", str(out), "--bits", "4,8", "--dry-run")
    assert told["path"] is None
    assert [row["bits"] for row in told["rows"]] == [4, 8]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", ["3,2", "3,3", "0", "2,x", "2.4,", "nan", "inf"])
def test_a_bad_list_of_budgets_is_refused_in_a_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str
) -> None:
    assert main(["compress", checkpoint, "-o", str(tmp_path / "out"), "--target-bits", bits]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    unread = f"error: Invalid value for '--target-bits': '{bits}' is neither a number nor a list of them. Write 3.2 or"
    assert line.startswith((unread, "error: target: the target is "))
    assert "2.8,3.6,4.6" in line


def test_several_budgets_are_told_apart(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the hen and the cat ran on and on\n" * 20)
    args = [
        "compress",
        checkpoint,
        "-o",
        str(tmp_path / "out.lilliput"),
        "--target-bits",
        "4.5,6.5",
        "--bits",
        "2,3,4,8",
    ]
    args += ["--calibration", str(text), "--samples", "2", "--length", "16", "--no-gate", "--group-size", "32"]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "chosen for 3 bits" in told
    assert "chosen for 4 bits" in told


def test_compress_then_measure_against_the_original(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = str(tmp_path / "out.lilliput"), tmp_path / "text.txt"
    text.write_text("the hen and the cat ran on and on\n" * 4)
    told = document(capsys, "compress", checkpoint, "-o", out, "--bits", "4,8", "--no-gate")
    assert told["path"] == out
    assert all(row["kl"] is not None for row in told["rows"])
    assert document(capsys, "compress", checkpoint, "-o", out, code=2)["error"]["exit_code"] == 2
    document(capsys, "compress", checkpoint, "-o", out, "--bits", "4,8", "--no-gate", "--overwrite")
    measured = document(capsys, "eval", out, "--text", str(text), "--against", checkpoint, "--length", "16")
    assert measured["original"]["kl"] == 0
    assert measured["original"]["top1_agreement"] == 1
    kl = {row["bits"]: row["kl"] for row in measured["rows"]}
    assert 0 < kl[8] < kl[4]
    timed = [{"bits": bits, "decode_tokens_per_s": 1.0, "peak_rss_bytes": None} for bits in (4, 8)]
    rows = join(told, measured, {"rows": timed})
    assert [row["model"] for row in rows] == ["original", 4, 8]
    assert rows[1]["perplexity"] == measured["rows"][0]["perplexity"]
