"""The parts of the benchmark of integer models: tasks, texts, what counts as done, the table, and one run on a tiny model."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from lilliput.core.errors import QualityFailed
from lilliput.data.documents import read_documents
from support.families import write_checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module; forgotten again after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("mobilequant")
    for name in ("mobilequant", "harness"):
        sys.modules.pop(name, None)


def asked(tmp_path: Path, **more: Any) -> argparse.Namespace:
    write_checkpoint(tmp_path / "model", "llama")
    text = tmp_path / "text.jsonl"
    stories = (" ".join(Random(n).choices(["the", "sun", "and", "moon", "over", "sea"], k=60)) for n in range(10))
    text.write_text("".join(json.dumps({"text": f"{n} {story}"}) + "\n" for n, story in enumerate(stories)))
    given = {"model": tmp_path / "model", "calibration": text, "text": None, "split": 0.3, "work": tmp_path}
    given |= {"window": 32, "limit": 4, "tuning": False, "samples": 4, "length": 16, "threads": 1, "check": 8}
    return argparse.Namespace(**given | more)


def line(contender: str, bits: int, seed: int, kl: float, steps: int = 300, **more: Any) -> dict[str, Any]:
    fields = {"contender": contender, "bits": bits, "seed": seed, "kl": kl, "options": {"steps": steps}}
    fields |= {"perplexity": 11.0, "original_perplexity": 10.0, "nll_increase": 0.0953, "cpu_seconds": 30.0}
    return fields | {"peak_rss_bytes": 1 << 20} | more


def test_a_recorded_line_counts_only_with_the_same_options(program: Any) -> None:
    task = program.Task("no let", 4, 1, 50)
    assert task.options == {"bits": 4, "seed": 1, "steps": 50, "sym": False, "scope": "both", "let": False}
    given = {"contender": "no let", "bits": 4, "seed": 1, "options": task.options}
    assert task.gave(given)
    assert not task.gave(given | {"error": "it failed"})
    assert not program.Task("no let", 4, 1, 60).gave(given)
    assert not program.Task("no let", 4, 2, 50).gave(given)


def test_what_does_not_train_has_no_steps_whatever_is_asked(program: Any) -> None:
    assert {program.Task(name, 8, 0, 50).options["steps"] for name in ("RTN-static", "SmoothQuant-static")} == {0}


def test_windows_hold_no_document_that_was_calibrated_on(program: Any, tmp_path: Path) -> None:
    a = asked(tmp_path)
    given = program.texts(a)
    kept = read_documents(given.calibration)
    assert [text[0] for text in kept] == list("0123456")
    tuning = program.texts(asked(tmp_path, tuning=True))
    assert len(given.cut) == len(tuning.cut) == 4
    first, second = ({window.tobytes() for window in found.cut} for found in (given, tuning))
    assert not first & second


def test_the_table_means_over_seeds_and_tells_what_failed(program: Any) -> None:
    lines = [line("A", 4, 0, 0.9), line("A", 4, 0, 0.1), line("A", 4, 1, 0.3), line("B", 4, 0, 0.15, steps=0)]
    lines += [
        line("C", 8, 0, 0.01) | {"error": "it gave up"},
        line("D", 8, 0, 0.5),
        line("D", 8, 0, 0.0) | {"error": "x"},
    ]
    told = program.table(lines).splitlines()
    assert told[0] == "float model: perplexity 10.000"
    assert told[4].startswith("| W8A8 | D | 300 | 11.000 | +10.00% | 0.0953 | 0.5000 | - | 0.50 | 1 |")
    assert told[5].startswith("| W4A8 | B | 0 |")
    assert "| 0.2000 | 0.1000 .. 0.3000 (2) |" in told[6]
    assert told[-1] == "- C, W8A8, seed 0: `it gave up`"


def test_a_task_ends_in_a_line_of_the_integer_graph(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    a = asked(tmp_path)
    program.run(a, [program.Task("SmoothQuant-static", 8, 0)], {"setup": "tiny"})
    (found,) = program.recorded("tiny")
    assert "error" not in found
    assert found["windows"] == 4
    assert found["checked_tokens"] == 8
    assert 0 < found["kl"] < 1
    assert found["peak_rss_bytes"] > 1 << 20
    assert program.recorded("another") == []
    # a line of what the contender was once is none of its own
    (tmp_path / "mobilequant.jsonl").write_text(
        json.dumps(found | {"options": found["options"] | {"alpha": 0.9}}) + "\n"
    )
    assert program.recorded("tiny") == []


def test_logits_that_the_oracle_does_not_give_end_the_task(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "Engine", lambda *_, **__: _Wrong())
    monkeypatch.setattr(program, "Oracle", lambda _: _Wrong(1))
    with pytest.raises(QualityFailed, match="3 logits of 3 tokens differ from the oracle's"):
        program.measured(tmp_path, None, [np.arange(5, dtype=np.int32)], 3, 1)


class _Wrong:
    """A runner of one logit, which is `say`; and the artifact it is of."""

    def __init__(self, say: float = 0.0) -> None:
        self.say = say

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.full((len(tokens), 1), self.say, np.float32)

    @property
    def artifact(self) -> "_Wrong":
        return self

    def integer(self) -> "_Wrong":
        return self
