"""The integer graph of an artifact: its two files, what must hold of them, and the model a runner is given.

`integer.json` is the graph (`core.graph`), `integer.safetensors` its constants; matrices and the embedding are those of
the artifact. Neither file is trusted: `problems` finds whatever would have a runner read beyond an array, divide by zero
or overflow 64 bits, so a runner that was handed an IntegerModel needs no checks of its own. docs/integer.md has the
arithmetic and its bounds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from lilliput.artifact import strict_json
from lilliput.artifact.container import NUMPY, Container, Layout, Planned, PlannedFile
from lilliput.artifact.schema import CONSTANTS_FILE, GRAPH_FILE
from lilliput.artifact.stored import StoredLinear, StoredTensor
from lilliput.core.errors import InputCorrupt
from lilliput.core.graph import Attend, Edge, Embed, Graph, Grid, Linear, Multiply, Node, Norm, Rotate, Sum, Table
from lilliput.core.spec import AnySpec, EncoderSpec, PatchInputs
from lilliput.numerics.fixed import LARGEST, LARGEST_SHIFT, MULTIPLIER_BITS, ONE, TURN_BITS, reach
from lilliput.numerics.packing import ROWS, unpack_fields

GRAPH_LIMIT: Final = 64 << 20
"""Bytes of the largest graph we read."""
WIDTHS = (4, 8)
"""Bits of the codes that an integer graph multiplies with."""
_FIX = "Copy the artifact again from its source, or make it again"
_SUMMANDS = 8
_LONGEST = 1 << 40
_SMALLEST, _GREATEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_STORED: Final = {np.dtype(NUMPY[name]).name: name for name in ("I8", "I16", "I32", "I64")}
Constants = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A graph with all it needs. graph, constants: as `core.graph` says, checked by `problems`.

    linears: quantized matrices by canonical name; those that a Linear node names have codes of one width, 4 or 8 bits,
    and one group a row with a whole zero. floats: float tensors by full name, of which only embeddings are read.
    """

    spec: AnySpec
    graph: Graph
    constants: Constants
    linears: Mapping[str, StoredLinear]
    floats: Mapping[str, StoredTensor]

    def __post_init__(self) -> None:
        for problem in problems(self.spec, self.graph, self.constants, self.linears, self.floats):
            raise InputCorrupt(problem, "integer graph", _FIX)

    @cached_property
    def bits(self) -> int:
        """Bits of the first matrix the graph multiplies with, which are those of all in the blocks."""
        return next(self.linears[node.matrix].bits[-1] for node in self.graph.nodes if isinstance(node, Linear))

    def codes(self, name: str) -> npt.NDArray[np.int16]:
        """The codes of a matrix, (out, in), 0 .. 2**bits - 1."""
        linear = self.linears[name]
        return unpack_fields(linear.planes, linear.fields, linear.out, linear.columns).astype(np.int16)

    def zeros(self, name: str) -> npt.NDArray[np.int16]:
        """The code that means 0 in each row of a matrix, (out,)."""
        zeros = whole_zeros(self.linears[name])
        assert zeros is not None, f"{name} is in no linear layer of the graph"
        return zeros

    def weights(self, name: str) -> npt.NDArray[np.int16]:
        """The whole numbers of a matrix, (out, in)."""
        whole: npt.NDArray[np.int16] = self.codes(name) - self.zeros(name)[:, None]
        return whole

    def scales(self, name: str) -> npt.NDArray[np.float32]:
        """What those numbers are multiplied by, (out,)."""
        linear = self.linears[name]
        return linear.scales(linear.bits[-1])[:, 0]

    def rows(self, name: str, index: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Rows of an embedding in float32, (len(index), width): what `Artifact.dequantize` gives at its widest."""
        linear = self.linears.get(name)
        if linear is None:
            stored = self.floats[f"{name}.weight"]
            picked = stored.data[index]
            return StoredTensor(stored.dtype, picked.shape, picked).to_float32()
        tiles, place = np.unique(np.asarray(index) // ROWS, return_inverse=True)
        few = replace(
            linear,
            out=len(tiles) * ROWS,
            planes=tuple(plane[tiles] for plane in linear.planes),
            scale={b: scale[tiles] for b, scale in linear.scale.items()},
            zero={b: zero[tiles] for b, zero in linear.zero.items()},
            table={b: table[tiles] for b, table in linear.table.items()},
            ratio={b: ratio[tiles] for b, ratio in linear.ratio.items()},
            unit={b: unit[tiles] for b, unit in linear.unit.items()},
        )
        found: npt.NDArray[np.float32] = few.dequantize(linear.bits[-1])[place * ROWS + np.asarray(index) % ROWS]
        return found


def whole_zeros(matrix: StoredLinear) -> npt.NDArray[np.int16] | None:
    """The code that means 0 in each row, (out,), of a matrix of one group a row; None where one is not among its codes."""
    bits = matrix.bits[-1]
    stored, last = matrix.zeros(bits), (1 << bits) - 1
    if stored is None:
        return None
    zeros = stored[:, 0].astype(np.float64) + last / 2
    return zeros.astype(np.int16) if np.isin(zeros, np.arange(last + 1)).all() else None


def write_graph(folder: Path, graph: Graph, constants: Constants) -> None:
    """Put the two files into an artifact that is being made, replacing those of an interrupted run."""
    (folder / GRAPH_FILE).write_bytes(_spelled(graph, GRAPH_FILE))
    planned = [Planned(name, _STORED[value.dtype.name], value.shape) for name, value in constants.items()]
    (folder / CONSTANTS_FILE).unlink(missing_ok=True)
    with PlannedFile.create(folder / CONSTANTS_FILE, Layout.of(planned, {"format": "lilliput"})) as file:
        for name, value in constants.items():
            file.write(name, value)
        file.sync()


def parse_graph(raw: bytes, where: str) -> Graph:
    """Return the graph in `raw`. Raises InputCorrupt for what is not one, or not in the only spelling we write."""
    data = strict_json.parse(raw, where, _FIX)
    try:
        graph = Graph.model_validate(data)
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "deep"}
        at = ".".join(str(step)[:80] for step in first["loc"]) or "graph"
        raise InputCorrupt(f"{at}: {first['msg']}", where, _FIX) from None
    if _spelled(graph, where) != raw:
        raise InputCorrupt("the graph is not in its canonical form", where, _FIX)
    return graph


def read_constants(file: Container) -> Constants:
    """Return the constants of an open file by name. Raises InputCorrupt for one that is not of whole numbers."""
    found = {}
    for name, slot in file.header.slots.items():
        if slot.padding:
            continue
        if slot.dtype not in _STORED.values():
            raise InputCorrupt(f"is {slot.dtype}, not whole numbers", f"{file.where}: {name}", _FIX)
        found[name] = file.view(name).copy()  # aligned, whatever the file says
    return found


def _spelled(graph: Graph, where: str) -> bytes:
    return strict_json.canonical(graph.model_dump(mode="json"), where, _FIX)


def problems(
    spec: AnySpec,
    graph: Graph,
    constants: Constants,
    linears: Mapping[str, StoredLinear],
    floats: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """Yield what keeps a runner from following the graph, one line each, the first thing first."""
    yield from _Check(spec, graph, constants, linears, floats).run()


class _Fault(ValueError):
    pass


class _Check:
    def __init__(
        self,
        spec: AnySpec,
        graph: Graph,
        constants: Constants,
        linears: Mapping[str, StoredLinear],
        floats: Mapping[str, StoredTensor],
    ) -> None:
        self.spec, self.graph, self.constants, self.linears, self.floats = spec, graph, constants, linears, floats
        self.written, self.used, self.cached = set[str](), set[str](), set[str]()

    def run(self) -> Iterator[str]:
        rules: dict[type[Any], Callable[[Any], None]] = {
            Embed: self._embed,
            Linear: self._linear,
            Norm: self._norm,
            Rotate: self._rotate,
            Attend: self._attend,
            Table: self._table,
            Multiply: self._multiply,
            Sum: self._sum,
        }
        if isinstance(self.spec, EncoderSpec) and isinstance(self.spec.inputs, PatchInputs):
            yield "a graph of tokens for a model of pictures"
            return
        if self.graph.positions > self.spec.context:
            yield f"{self.graph.positions} positions for a model of {self.spec.context}"
            return
        for name, edge in self.graph.edges.items():
            if not _SMALLEST <= edge.grid.scale <= _GREATEST:
                yield f"{name}: a scale of {edge.grid.scale:.3g} is beyond float32"
                return
        for index, node in enumerate(self.graph.nodes):
            try:
                self._order(index, node)
                rules[type(node)](node)
            except _Fault as fault:
                yield f"{node.y}: {fault}"
                return
        if unwritten := self.graph.edges.keys() - self.written:
            yield f"{min(unwritten)} is written by no node"
        output = self.graph.edges.get(self.graph.output)
        vectors = isinstance(self.spec, EncoderSpec)
        wanted = self.spec.embedding_size if isinstance(self.spec, EncoderSpec) else self.spec.vocab_size
        if output is None or output.width != wanted:
            yield f"{self.graph.output} is not {wanted} {'numbers of a vector' if vectors else 'logits'}"
        if not any(isinstance(node, Linear) for node in self.graph.nodes):
            yield "there is no linear layer"
        if unused := self.constants.keys() - self.used:
            yield f"{min(unused)} belongs to no node"

    def _order(self, index: int, node: Node) -> None:
        if isinstance(node, Embed) != (index == 0):
            raise _Fault("the embedding is not the first node, and the only one of its kind")
        for name in reads(node):
            if name not in self.written:
                raise _Fault(f"{name} is read before it is written")
        if node.y in self.written:
            raise _Fault("it is written twice")
        if node.y not in self.graph.edges:
            raise _Fault("there is no such edge")
        self.written.add(node.y)

    # ---- what nodes share

    def _edge(self, name: str) -> Edge:
        return self.graph.edges[name]

    def _same(self, *names: str) -> None:
        widths = {self._edge(name).width for name in names}
        if len(widths) > 1:
            raise _Fault(f"edges of {sorted(widths)} channels where they must agree")

    def _constant(self, name: str, dtype: type[Any], *shape: int) -> npt.NDArray[Any]:
        found = self.constants.get(name)
        if found is None:
            raise _Fault(f"there is no constant {name}")
        if found.dtype != dtype or found.shape != shape:
            raise _Fault(f"{name} is {found.dtype} {found.shape}, not {np.dtype(dtype)} {shape}")
        self.used.add(name)
        return found

    def _within(self, what: str, values: Any, low: int, high: int) -> None:
        array = np.asarray(values)
        if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
            raise _Fault(f"{what} is outside {low} .. {high}")

    def _factor(self, multiplier: Any, shift: Any) -> None:
        self._within("a multiplier", multiplier, 0, (1 << MULTIPLIER_BITS) - 1)
        self._within("a shift", shift, 1, LARGEST_SHIFT)

    # ---- the nodes

    def _embed(self, node: Embed) -> None:
        if node.matrix != self.spec.entrance or self._edge(node.y).width != self.spec.hidden_size:
            raise _Fault(f"it does not look up {self.spec.entrance}")
        self._table_of(node.matrix, self.spec.matrices()[node.matrix][0])
        if not abs(node.factor) <= _GREATEST:
            raise _Fault("its factor is not finite in float32")
        if node.positions is not None:
            if node.positions != "embed_positions" or node.offset < 0:
                raise _Fault("it does not look up embed_positions")
            self._table_of(node.positions, self.graph.positions + node.offset)
        if node.types is not None:
            if node.types != "embed_types" or not isinstance(self.spec, EncoderSpec):
                raise _Fault("it does not look up embed_types")
            self._table_of(node.types, 1)

    def _table_of(self, name: str, rows: int) -> None:
        stored = self.linears.get(name)
        shape: tuple[int, ...] = (stored.out, stored.columns) if stored else ()
        if stored is None and (left := self.floats.get(f"{name}.weight")) is not None:
            shape = left.shape
        if len(shape) != 2 or shape[0] < rows or shape[1] != self.spec.hidden_size:
            raise _Fault(f"{name} does not have {rows} rows of {self.spec.hidden_size}")

    def _linear(self, node: Linear) -> None:
        matrix = self.linears.get(node.matrix)
        if matrix is None:
            raise _Fault(f"{node.matrix} is not a quantized matrix")
        bits = matrix.bits[-1]
        if matrix.outliers is not None:
            raise _Fault(f"{node.matrix} has outliers, which are no whole numbers")
        if len(matrix.bits) > 1 or bits not in WIDTHS or matrix.groups != 1 or matrix.table:
            raise _Fault(f"{node.matrix} has not one width of 4 or 8 bits and one group a row")
        zeros = whole_zeros(matrix)
        if zeros is None:
            raise _Fault(f"a zero of {node.matrix} is none of its codes, so its weights are not whole numbers")
        x, y = self._edge(node.x), self._edge(node.y)
        if (y.width, x.width) != (matrix.out, matrix.columns):
            raise _Fault(f"{node.matrix} is {(matrix.out, matrix.columns)} between {x.width} and {y.width} channels")
        bias = self._constant(f"{node.y}.bias", np.int64, y.width)
        most = accumulator_limit(x.grid) - (x.width << (x.grid.bits - 1)) * widest_weight(zeros, bits)
        if most < 0:
            raise _Fault(f"{x.width} inputs overflow the sum")
        self._within("a bias", bias, -most, most)
        self._factor(
            self._constant(f"{node.y}.multiplier", np.int32, y.width),
            self._constant(f"{node.y}.shift", np.int8, y.width),
        )

    def _norm(self, node: Norm) -> None:
        self._same(node.x, node.y)
        width = self._edge(node.y).width
        if node.heads < 1 or width % node.heads:
            raise _Fault(f"{node.heads} runs do not divide {width} channels")
        if width // node.heads > norm_limit(node.kind):
            raise _Fault(f"{width // node.heads} channels overflow the sum of squares")
        self._constant(f"{node.y}.gain", np.int32, width)
        if node.biased:
            limit = (1 << 60) - 1
            self._within("an offset", self._constant(f"{node.y}.offset", np.int64, width), -limit, limit)

    def _rotate(self, node: Rotate) -> None:
        self._same(node.x, node.y)
        if node.head_dim < 1 or self._edge(node.x).width % node.head_dim:
            raise _Fault(f"heads of {node.head_dim} do not divide {self._edge(node.x).width} channels")
        if not 2 <= node.dim <= node.head_dim or node.dim % 2:
            raise _Fault(f"{node.dim} channels of {node.head_dim} cannot be turned")
        for name in ("rotary.cos", "rotary.sin"):
            turns = self._constant(name, np.int16, self.graph.positions, node.dim // 2)
            self._within(name, turns, -(1 << TURN_BITS), 1 << TURN_BITS)
        self._factor((node.multiplier, node.plain_multiplier), (node.shift, node.plain_shift))

    def _attend(self, node: Attend) -> None:
        q, k, v, y = (self._edge(name) for name in (node.q, node.k, node.v, node.y))
        if node.heads < 1 or node.kv_heads < 1 or node.head_dim < 1 or node.heads % node.kv_heads:
            raise _Fault(f"{node.heads} heads do not share {node.kv_heads}")
        if node.k == node.v or {node.k, node.v} & self.cached:
            raise _Fault(f"{node.k} and {node.v} are keys or values of two caches")
        self.cached |= {node.k, node.v}
        for edge, heads in ((q, node.heads), (y, node.heads), (k, node.kv_heads), (v, node.kv_heads)):
            if edge.width != heads * node.head_dim:
                raise _Fault(f"{edge.width} channels are not {heads} heads of {node.head_dim}")
        if (
            not 0 <= node.window <= _LONGEST
            or not np.isfinite(node.scale)
            or not (node.softcap is None or 0 < node.softcap < np.inf)
        ):
            raise _Fault("its window, scale or soft-cap is not one")
        if node.scores.bits != 16 or (node.capped is not None and node.capped.bits != 16):
            raise _Fault("scores have 16 bits")
        if (node.capped is None) != (node.softcap is None):
            raise _Fault("a soft-cap goes with a grid behind it")
        if node.head_dim * reach(q.grid) * reach(k.grid) > LARGEST:
            raise _Fault(f"heads of {node.head_dim} overflow the scores")
        if (node.probability + self.graph.positions) * reach(v.grid) > LARGEST:
            raise _Fault(f"{self.graph.positions} positions overflow the mixture")
        for name in ("hi", "lo"):
            power = self._constant(f"{node.y}.{name}", np.int32, 256)
            self._within(name, power, 0, ONE)
            if int(power[0]) != ONE:  # or the exponentials of a row might all be zero, and the sum divides
                raise _Fault(f"{name} does not begin with {ONE}")
        if node.capped is not None:
            self._constant(f"{node.y}.cap", np.int16, 1 << 16)
        self._factor((node.multiplier, node.out_multiplier), (node.shift, node.out_shift))

    def _table(self, node: Table) -> None:
        self._same(node.x, node.y)
        to = self._edge(node.y).grid
        found = self._constant(f"{node.y}.table", np.int16, 1 << self._edge(node.x).grid.bits)
        self._within("an entry", found, to.low, to.high)

    def _multiply(self, node: Multiply) -> None:
        self._same(node.a, node.b, node.y)
        self._factor(node.multiplier, node.shift)

    def _sum(self, node: Sum) -> None:
        self._same(*node.x, node.y)
        if len(node.x) > _SUMMANDS or len(node.multipliers) != len(node.x):
            raise _Fault(f"{len(node.multipliers)} multipliers for {len(node.x)} edges")
        self._within("a multiplier", node.multipliers, 0, (1 << 30) - 1)
        self._within("a shift", node.shift, 1, 60)


def reads(node: Node) -> tuple[str, ...]:
    """Names of the edges a node reads."""
    if isinstance(node, Embed):
        return ()
    if isinstance(node, Attend):
        return node.q, node.k, node.v
    if isinstance(node, Multiply):
        return node.a, node.b
    return node.x if isinstance(node, Sum) else (node.x,)


def widest_weight(zeros: npt.NDArray[np.integer[Any]], bits: int) -> int:
    """The largest magnitude that codes of `bits` bits less their zeros can have."""
    return max(int(zeros.max()), (1 << bits) - 1 - int(zeros.min()))


def accumulator_limit(x: Grid) -> int:
    """What the sum of a linear layer, bias included, stays within: 32 bits for inputs of 8 bits, else LARGEST."""
    return (1 << 31) - 1 if x.bits == 8 else LARGEST


def norm_limit(kind: str) -> int:
    """Channels over which a sum of squares, beside the largest eps, stays below 2**62."""
    return 1 << (29 if kind == "rms" else 15)
