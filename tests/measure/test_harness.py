import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks/harness.py"


@pytest.fixture
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_are_appended_with_their_conditions(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.emit("x", n=np.int64(4), share=np.float32(1 / 3), note="a")
    harness.emit("x", n=5)
    first, second = map(json.loads, (tmp_path / "results/x.jsonl").read_text().splitlines())
    assert (first["n"], first["share"], first["note"], second["n"]) == (4, 0.333333, "a", 5)
    assert {"date", "cpu", "cores", "commit", "versions", "foreign_cores"} <= set(first)
