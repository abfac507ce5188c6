"""ONNX Runtime's static quantizer on our float model: the exported model is that model, and what comes out is another."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.measure.reference import open_original
from support.families import VOCAB, write_checkpoint

pytest.importorskip("onnx", reason="onnx writes the float model")
pytest.importorskip("onnxruntime", reason="onnxruntime quantizes and runs it")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module; forgotten again after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("static_opinion")
    for name in ("static_opinion", "mobilequant", "harness"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the quantizer divides by the scale 0 of what is always 0
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_float_graph_is_the_model_and_the_quantized_one_is_close(program: Any, family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", family)
    rows = np.random.default_rng(0).integers(3, VOCAB, (4, 16)).astype(np.int32)
    exported = program.export(tmp_path / "model", 16, tmp_path / "float.onnx")
    expected = open_original(tmp_path / "model").logits(rows[0][:12])
    found = program.Session(exported, 16, 1).logits(rows[0][:12])
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-4 * size
    for contender, options in program.CONTENDERS.items():
        out = tmp_path / f"{contender}.onnx"
        program.quantizer(contender)(exported, out, rows, options)
        away = np.abs(program.Session(out, 16, 1).logits(rows[0][:12]) - expected).max()
        assert away > 1e-4 * size, contender
        assert away < size or contender == "ONNX Runtime, all operators"  # which breaks models, as the log has it
