"""`lilliput schedule`: what it finds is kept, and followed by `run`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lilliput.apps.cli import main
from lilliput.engine import load
from lilliput.engine.schedules.fixed import Constant, Static
from support.small_artifact import write_small_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "small.lilliput"
    write_small_artifact(folder)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "task.jsonl"
    rows = [{"prompt": f"Once there were {i} mice", "answer": "and a cat"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def told(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> Any:
    assert main([*map(str, args), "--json", "--quiet"]) == code
    return json.loads(capsys.readouterr().out)


SMALL = ("--ladder", "8/4/2", "-n", 16, "--grid", 3, "--threads", 1, "--limit", 4)


def test_found_kept_and_run(artifact: Path, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = told(capsys, "schedule", artifact, "--task", task, "--tolerance", "30%", *SMALL)
    assert made["written"]
    assert not list(artifact.parent.glob("*.schedule.jsonl"))
    chosen = next(row["schedule"] for row in made["frontier"] if row["chosen"])
    kept = load(artifact, threads=1).schedule
    assert isinstance(kept, Static | Constant)
    assert str(kept) == chosen
    assert (made["schedule"]["horizon"], made["schedule"]["note"].split(":")[0]) == (16, "search")
    ran = told(capsys, "run", artifact, "-p", "Once", "-n", "16", "--threads", 1)
    engine = load(artifact, threads=1)
    assert tuple(ran["tokens"]) == engine.generate("Once", max_new_tokens=16, schedule=kept).tokens
    assert told(capsys, "verify", artifact)["ok"]
    assert main(["inspect", str(artifact)]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule "))
    assert made["schedule"]["note"] in shown
    assert ",".join(f"{bits}@{start}" for start, bits in made["schedule"]["steps"]) in shown


def test_a_plain_text_is_cut_into_prompts(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("and so on " * 12)
    args = ("--prompt-tokens", 25, "--ladder", "4/2", "-n", 8, "--grid", 2, "--threads", 1, "--dry-run")
    made = told(capsys, "schedule", artifact, "--task", text, *args)
    assert made["schedule"]["note"].endswith("over 5 answers of the widest width")  # 120 bytes, 24 beside each BOS
    made = told(capsys, "schedule", artifact, "--task", text, *args, "--limit", 2)
    assert made["schedule"]["note"].endswith("over 2 answers of the widest width")


def test_a_text_too_long_for_a_prompt_is_cut_and_that_is_said(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context is 128: with 8 new tokens a prompt has room for 120."""
    text = tmp_path / "text.txt"
    text.write_text("and so on " * 60)
    args = ("--ladder", "4/2", "-n", "8", "--grid", "2", "--threads", "1", "--dry-run", "--tolerance", "0")
    assert main(["schedule", str(artifact), "--task", str(text), *args]) == 0
    said = capsys.readouterr().err
    assert "text.txt: one text, cut into 6 prompts of 120 tokens at most" in said
    assert "nothing that falls below 4 bits keeps within the tolerance" in said
    assert "small.lilliput.schedule.jsonl" in said


def test_an_artifact_that_cannot_be_written_is_refused_before_anything_is_scored(
    artifact: Path, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A superuser may write wherever the disk lets him, so what the system answers is stated."""
    monkeypatch.setattr("os.access", lambda path, mode: not (Path(path) == artifact and mode == os.W_OK))
    assert main(["schedule", str(artifact), "--task", str(task), *map(str, SMALL)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "cannot be written to" in said
    assert len(said.splitlines()) == 1
    assert not list(artifact.parent.glob("*.schedule.jsonl"))
    assert told(capsys, "schedule", artifact, "--task", task, "--dry-run", *SMALL)["written"] is False


def test_a_dry_run_changes_nothing_and_keeps_its_notes(
    artifact: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in artifact.iterdir()}
    first = told(capsys, "schedule", artifact, "--task", task, "--dry-run", "--metric", "rouge-l", *SMALL)
    assert {file.name: file.read_bytes() for file in artifact.iterdir()} == before
    notes = artifact.parent / "small.lilliput.schedule.jsonl"
    lines = notes.read_text()
    assert told(capsys, "schedule", artifact, "--task", task, "--dry-run", "--metric", "rouge-l", *SMALL) == first
    assert notes.read_text() == lines  # nothing was scored twice
    assert main(["schedule", str(artifact), "--task", str(task), "--dry-run", *map(str, SMALL), "--quiet"]) == 0
    assert "average bits" in capsys.readouterr().out


def test_features_are_learned_kept_and_followed(artifact: Path, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ("--ladder", "4/2", "-n", 16, "--grid", 2, "--threads", 1)
    made = told(capsys, "schedule", artifact, "--task", task, "--method", "features", *some)
    assert (made["schedule"]["name"], made["schedule"]["horizon"]) == ("features", 16)
    assert made["schedule"]["file"] is not None
    assert told(capsys, "verify", artifact)["ok"]
    assert told(capsys, "run", artifact, "-p", "Once", "-n", "16", "--threads", 1)["tokens"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--tolerance", "a lot"), 2, "Write 1% or 0.01"),
        (("--tolerance", "200%"), 2, "share such as 1%"),
        (("--metric", "bleu"), 2, "'bleu' is not known"),
        (("--ladder", "4-2"), 2, "Write 4/3/2"),
        (("--ladder", "4/1"), 2, "1 bits are not in this artifact"),
        (("--method", "learned", "--limit", "3", "-n", "16"), 2, "teach no chooser"),
        (("--reference-field", "no_such"), 3, "no_such"),
        (("-n", "5000"), 2, "leaves room"),
    ],
)
def test_bad_input_is_one_line(
    artifact: Path, task: Path, args: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", str(artifact), "--task", str(task), "--quiet", *args]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert said in error[0]


def test_a_missing_task_is_3(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", str(artifact), "--task", "nowhere.jsonl"]) == 3
    assert "nowhere.jsonl" in capsys.readouterr().err
