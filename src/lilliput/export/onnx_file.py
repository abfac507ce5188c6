"""ONNX graphs to files: their arrays inside them, or together in one file beside them where they are large."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from lilliput.core.errors import Unsupported
from lilliput.core.version import VERSION
from lilliput.export.onnx_graph import IR_VERSION, OPSET, Blob, Phase

WEIGHTS = "weights.bin"
INLINE = 1024
"""Bytes up to which an array stays in the graph, where shape inference can see it."""
ALIGN = 4096
"""So that a runtime can map it."""


def save(phases: Sequence[Phase], folder: Path, limit: int) -> None:
    """Write NAME.onnx for each phase, checked. limit: bytes of arrays from which on they go to `weights.bin`, once.

    Raises Unsupported when ONNX's own checker finds fault.
    """
    large = max(sum(blob.data.nbytes for blob in phase.blobs.values()) for phase in phases) > limit
    if large:
        with (folder / WEIGHTS).open("xb") as file:
            store = _Store(file)
            models = [_model(phase, store) for phase in phases]
    else:
        models = [_model(phase, None) for phase in phases]
    for phase, model in zip(phases, models, strict=True):
        path = folder / f"{phase.name}.onnx"
        with path.open("xb") as file:
            file.write(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            what = f"the checker of onnx {onnx.__version__} refuses the graph: {str(error).strip().splitlines()[0]}"
            raise Unsupported(what, path.name, "Please report it") from error


class _Store:
    """The file of arrays: each where it begins, equal ones of one name once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.placed = file, dict[str, list[tuple[Blob, int]]]()

    def put(self, name: str, blob: Blob) -> int:
        for other, offset in self.placed.get(name, []):
            same = other.data is blob.data or np.array_equal(other.data, blob.data)
            if same and (other.kind, other.shape) == (blob.kind, blob.shape):
                return offset
        self.file.write(bytes(-self.file.tell() % ALIGN))
        offset = self.file.tell()
        self.file.write(_little(blob))
        self.placed.setdefault(name, []).append((blob, offset))
        return offset


def _little(blob: Blob) -> memoryview:
    array = blob.data.astype(blob.data.dtype.newbyteorder("<"), copy=False)
    return memoryview(np.ascontiguousarray(array).tobytes())


def _model(phase: Phase, store: _Store | None) -> ModelProto:
    graph = helper.make_graph(phase.nodes, phase.name, phase.inputs, phase.outputs)
    for name, blob in phase.blobs.items():
        tensor = graph.initializer.add(name=name, data_type=blob.kind, dims=blob.shape)
        if store is None or blob.data.nbytes <= INLINE:
            tensor.raw_data = bytes(_little(blob))
            continue
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": WEIGHTS, "offset": store.put(name, blob), "length": blob.data.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="lilliput",
        producer_version=VERSION,
    )
    model.ir_version = IR_VERSION
    return model
