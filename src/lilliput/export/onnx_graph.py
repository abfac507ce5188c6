"""What an integer graph in ONNX is made of: matrices, initializers, sites on grids, and a writer of nodes (needs onnx)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from lilliput.artifact.integer import WIDTHS, IntegerModel, whole_zeros
from lilliput.core.graph import Grid

OPSET, IR_VERSION = 21, 10
"""The first with QuantizeLinear of 16 bits and weights of 4."""
IDS, PAST, LENGTH, VECTOR = "input_ids", "past_length", "length", "vector"
INT4, INT8, INT16 = int(TensorProto.INT4), int(TensorProto.INT8), int(TensorProto.INT16)
INT64, DOUBLE = int(TensorProto.INT64), int(TensorProto.DOUBLE)
CODES = {4: INT4, 8: INT8, 16: INT16}

Dim = int | str
Move = tuple[str, tuple[int, ...]]
"""Reshape and its shape, Transpose and its order, Unsqueeze and its axes."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Matrix:
    """A matrix as whole numbers: value = scale[row] * (codes - zero[row]), codes (out, in) and zero (out,) of `bits` bits,
    with a sign."""

    codes: npt.NDArray[np.int8]
    zero: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bits: int

    @property
    def whole(self) -> npt.NDArray[np.int16]:
        """The codes less their zeros."""
        found: npt.NDArray[np.int16] = self.codes.astype(np.int16) - self.zero[:, None]
        return found


@dataclass(frozen=True)
class Blob:
    """An initializer. `data` as it is stored: 4-bit codes two a byte, the first in the low half."""

    kind: int
    shape: tuple[int, ...]
    data: Array

    @classmethod
    def of(cls, array: Array) -> "Blob":
        """Take an array as it is."""
        return cls(int(helper.np_dtype_to_tensor_dtype(array.dtype)), array.shape, np.ascontiguousarray(array))

    @classmethod
    def int4(cls, codes: npt.NDArray[np.int8]) -> "Blob":
        """Pack codes in -8..7."""
        flat = codes.reshape(-1).view(np.uint8) & np.uint8(15)
        pairs = np.append(flat, np.zeros(flat.size % 2, np.uint8)).reshape(-1, 2)
        return cls(INT4, codes.shape, pairs[:, 0] | (pairs[:, 1] << np.uint8(4)))


@dataclass(frozen=True)
class Site:
    """A tensor on a grid. `edge`: one of the graph's edges, not something inside a node."""

    grid: Grid
    kind: str
    edge: bool


@dataclass
class Phase:
    """What one ONNX graph is made of."""

    name: str
    nodes: list[NodeProto] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    tensors: dict[str, Grid] = field(default_factory=dict)
    """Float tensors that are rounded to a grid next, or just come from one."""
    params: dict[str, Matrix] = field(default_factory=dict)
    masked: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Scores behind the mask: the least and the greatest value. They have no grid of their own."""
    gains: list[str] = field(default_factory=list)
    """Initializers of norms, float32."""


class Writer:
    """Appends to one phase of a model. `made` has what several nodes share, by what it is.

    shared: matrices already taken apart, for all phases of the model.
    """

    def __init__(self, model: IntegerModel, name: str, shared: dict[str, Matrix | None]) -> None:
        self.model, self.graph, self.phase, self.shared = model, model.graph, Phase(name), shared
        self.made: dict[Any, str] = {}

    def op(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.phase.nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def const(self, name: str, array: Array) -> str:
        self.phase.blobs.setdefault(name, Blob.of(array))
        return name

    def ints(self, *values: int) -> str:
        return self.const(f"ints.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def matrix(self, name: str) -> Matrix | None:
        """A matrix as whole numbers, None where it has other levels or stayed in float."""
        if name not in self.shared:
            stored, found = self.model.linears.get(name), None
            if stored is not None and len(stored.bits) == 1 and stored.bits[0] in WIDTHS and stored.groups == 1:
                (bits,), zeros = stored.bits, whole_zeros(stored)
                if zeros is not None and not stored.table:
                    top, codes, scale = 1 << (bits - 1), self.model.codes(name), self.model.scales(name)
                    empty = (codes == zeros[:, None]).all(axis=1)
                    scale = np.where(empty, np.float32(1), scale)  # a row of zeros may have none
                    found = Matrix((codes - top).astype(np.int8), (zeros - top).astype(np.int8), scale, bits)
            self.shared[name] = found
        return self.shared[name]

    def split(self, x: str, parts: list[str], sizes: Sequence[int], name: str) -> None:
        """Along the last axis."""
        self.phase.nodes.append(helper.make_node("Split", [x, self.ints(*sizes)], parts, name=name, axis=-1))

    def moved(self, x: str, moves: Sequence[Move], out: str) -> str:
        for index, (kind, numbers) in enumerate(moves, 1):
            name = out if index == len(moves) else f"{out}.{index}"
            if kind == "Transpose":
                x = self.op(kind, x, out=name, perm=list(numbers))
            else:
                x = self.op(kind, x, self.ints(*numbers), out=name)
        return x

    def grid(self, name: str, grid: Grid) -> tuple[str, str]:
        scale = self.const(f"{name}.scale", np.array(grid.scale, np.float32))
        return scale, self.const(f"{name}.zero", np.array(grid.zero, f"int{grid.bits}"))

    def quantize(self, x: str, site: str, grid: Grid, kind: str, *moves: Move, edge: bool = False) -> str:
        self.phase.sites[site] = Site(grid, kind, edge)
        self.phase.tensors[x] = grid
        codes = f"{site}.codes"
        first = self.op("QuantizeLinear", x, *self.grid(site, grid), out=f"{codes}.made" if moves else codes)
        return self.moved(first, moves, codes)

    def dequantize(self, codes: str, of: str, grid: Grid, out: str, *moves: Move) -> str:
        """of: the site whose grid it is."""
        self.phase.tensors[out] = grid
        codes = self.moved(codes, moves, f"{out}.moved")
        return self.op("DequantizeLinear", codes, *self.grid(of, grid), out=out)

    def fix(self, x: str, site: str, grid: Grid, kind: str, *moves: Move) -> str:
        """To the grid and back; moves between."""
        codes = self.quantize(x, site, grid, kind)
        return self.dequantize(codes, site, grid, f"{site}.value", *moves)

    def write(self, edge: str, x: str, kind: str, *moves: Move) -> None:
        self.quantize(x, edge, self.graph.edges[edge].grid, kind, *moves, edge=True)

    def read(self, edge: str, out: str = "", *moves: Move) -> str:
        """An edge as numbers, moved or as it is."""
        grid, name = self.graph.edges[edge].grid, out or f"{edge}.value"
        if name not in self.made:
            self.made[name] = self.dequantize(f"{edge}.codes", edge, grid, name, *moves)
        return self.made[name]
