"""The export in whole numbers: every code the oracle's, in ONNX Runtime, fused or not, whole or token by token."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="random models are made with lilliput[compress]")
onnx = pytest.importorskip("onnx", reason="needs lilliput[export]")

from lilliput.artifact.integer import IntegerModel  # noqa: E402
from lilliput.core.errors import ConfigError  # noqa: E402
from lilliput.core.graph import Table  # noqa: E402
from lilliput.export.onnx_integer import OnnxInteger  # noqa: E402
from support.families import FAMILIES  # noqa: E402
from support.integers import integer_model, some_tokens, tiny_decoder, tiny_encoder  # noqa: E402

ORT = "onnxruntime is not installed, which runs the graphs"
IDS = some_tokens(24)


def write(model: IntegerModel, folder: Path, **options: Any) -> dict[str, Any]:
    folder.mkdir()
    return OnnxInteger(**options).write(model, folder)


def decoder(folder: Path, family: str, bits: int = 8, *, zeros: bool = False) -> IntegerModel:
    return integer_model(tiny_decoder(folder / "model", family), IDS, bits, zeros=zeros)


@pytest.mark.parametrize(
    ("family", "bits", "zeros"),
    [*((family, 8, False) for family in FAMILIES), ("llama", 8, True), ("gemma2", 4, True)],
)
def test_every_code_is_the_oracles(tmp_path: Path, family: str, bits: int, zeros: bool) -> None:
    pytest.importorskip("onnxruntime", reason=ORT)
    from lilliput.measure.agreement import compare

    model, length = decoder(tmp_path, family, bits, zeros=zeros), 28 if family == "mistral" else None
    found = compare(tmp_path / "out", write(model, tmp_path / "out", length=length), model, IDS)
    assert found.ok
    assert {row.name for row in found.sites} >= model.graph.edges.keys()
    assert [row.name for row in found.sites if row.steps or row.local_steps or row.own_steps] == []
    assert (found.argmax_agreement, found.fused_argmax_agreement, found.moved) == (1.0, 1.0, 0)
    assert (found.decoded, found.decode_steps, found.decode_local_steps) == (16, 0, 0)


@pytest.mark.parametrize("family", ["bert", "clip"])
def test_an_encoders_codes_are_the_oracles(tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime", reason=ORT)
    from lilliput.measure.agreement import compare

    model = integer_model(tiny_encoder(tmp_path / "model", family), IDS[:15])
    for length in (None, 20):
        folder = tmp_path / str(length)
        found = compare(folder, write(model, folder, length=length), model, IDS[:15])
        assert found.ok
        assert [row.name for row in found.sites if row.steps] == []
        assert found.cosine == pytest.approx(1, abs=1e-6)


def test_one_code_by_one_step_is_one_too_many(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason=ORT)
    from lilliput.measure.agreement import compare

    model = decoder(tmp_path, "llama")
    manifest = write(model, tmp_path / "out")
    proto = onnx.load(tmp_path / "out" / "prefill.onnx")
    node = next(node for node in model.graph.nodes if isinstance(node, Table))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == f"{node.y}.table")
    table = onnx.numpy_helper.to_array(tensor)
    tensor.raw_data = np.where(table < 127, table + 1, table).astype(table.dtype).tobytes()
    onnx.save(proto, tmp_path / "out" / "prefill.onnx")
    found = compare(tmp_path / "out", manifest, model, IDS)
    assert found.problems[0] == f"{node.y} is 1 step from the oracle given the same inputs"


def test_nothing_is_float_between_the_ends(tmp_path: Path) -> None:
    """But numbers that doubles carry, which come from whole numbers and go to whole numbers."""
    model = decoder(tmp_path, "gemma2")
    manifest = write(model, tmp_path / "out")
    assert manifest["exact"]
    assert not list((tmp_path / "out").glob("*.encodings.json"))
    for file in ("prefill.onnx", "decode.onnx"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out" / file)).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        floats = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
        assert {name for name in floats if not name.startswith(("layers.0.input.", "logits."))} == set()
        doubles = {name for name, kind in kinds.items() if kind == onnx.TensorProto.DOUBLE}
        makers = {node.op_type for node in graph.node if set(node.output) & doubles}
        assert makers == {"Cast", "MatMul", "Sqrt"}


@pytest.mark.parametrize("length", [None, 32])
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int | None) -> None:
    pytest.importorskip("onnxruntime", reason=ORT)
    manifest = write(decoder(tmp_path, "llama"), tmp_path / "out", length=length)
    (tmp_path / "out" / "export.json").write_text(json.dumps(manifest))
    text = (tmp_path / "out" / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block
    assert "QuantizeLinear" not in text
    assert "enable_mem_reuse" in text
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert names["count"] == (32 if length else 23)


def test_a_length_that_is_refused_is_that_of_this_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^onnx-integer\.length: "):
        OnnxInteger(length=0)
    with pytest.raises(ConfigError, match=r"^onnx-integer\.length: length is 100000, and the graph has"):
        write(decoder(tmp_path, "llama"), tmp_path / "out", length=100000)
