"""An integer graph as ONNX nodes: every edge a QuantizeLinear with its grid, float operators between.

What is made of node after node of the graph, whatever family it came from. Of an edge E there is `E.float`, what its node
computes, `E.codes`, (positions, width), those numbers on the grid, and where it is read as it is `E.value`. Inside
`attend` stand the same of `scores`, `capped` and `probabilities`, beside its output.

Forms chosen for the compilers of NPUs. A linear layer is one Gemm with transB over (positions, in) and (out, in): the
layout and the axis 0 of scales that the artifact has, so an embedding that is also the head is stored once. What only
moves numbers (Reshape, Transpose, Concat, Unsqueeze, Gather) moves codes, so that each operator that computes has its
DequantizeLinear right before it and its QuantizeLinear right behind. (ONNX Runtime 1.31 also refuses a DequantizeLinear
of 8 bits in front of a Reshape: it adds a QuantizeLinear of int8 behind that, then turns int8 to uint8 in part of it.)
Query heads of one key head are rows of one matrix product, so keys are not repeated. No tensor has more than four
dimensions.

A key that a query does not see leaves by a comparison of positions and a Where in front of the softmax. What it leaves
with is `MARGIN` below the lowest score there is. The lowest score itself will not do: next to scores that are all low it
weighs something. And nothing is added to a score, which would need a grid that holds both.

An encoder is one graph, `encoder`, that ends in its vector, which its definition makes in float: by the mean over the
positions or by picking one.
"""

import numpy as np
from onnx import TensorProto, helper

from lilliput.artifact.integer import IntegerModel
from lilliput.core.errors import Unsupported
from lilliput.core.graph import Attend, Embed, Grid, Linear, Multiply, Norm, Rotate, Sum, Table
from lilliput.core.spec import EncoderSpec
from lilliput.export.onnx_graph import CODES, IDS, LENGTH, PAST, VECTOR, Blob, Dim, Matrix, Move, Phase, Writer

MARGIN = 24.0
"""exp(-24) is 4e-11: not one code of 1 / 65535, even over a hundred million keys."""


def phases(model: IntegerModel, length: int | None, builder: "type[Builder]") -> list[Phase]:
    """What is exported of a model: "encoder", or "prefill" and, where every node looks back only, "decode", which share
    their arrays.

    encoder: tokens to what the vector is made of, and the vector. prefill: tokens to logits, and the codes of their keys
    and values. Either takes `length` tokens, or any number. decode: one token behind `past_length` others whose keys and
    values come in; slots for `length` of these, or any number.
    Raises Unsupported for a window of a model that is not causal.
    """
    attends = [node for node in model.graph.nodes if isinstance(node, Attend)]
    if any(node.window and not node.causal for node in attends):
        what = "a window over keys on both sides has no form here"
        raise Unsupported(what, "integer graph", "Export a model without windows, or a causal one")
    shared: dict[str, Matrix | None] = {}
    if isinstance(model.spec, EncoderSpec):
        names = ["encoder"]
    else:
        names = ["prefill", "decode"] if all(node.causal for node in attends) else ["prefill"]
    return [builder(model, name, length, shared).build() for name in names]


class Builder(Writer):
    """One graph of a model, node after node."""

    def __init__(self, model: IntegerModel, name: str, length: int | None, shared: dict[str, Matrix | None]) -> None:
        super().__init__(model, name, shared)
        self.encoder = model.spec if isinstance(model.spec, EncoderSpec) else None
        self.has_past = past = name == "decode"
        self.new: Dim = 1 if past else "positions" if length is None else length
        self.past: Dim = 0 if not past else "slots" if length is None else length
        # rows of the tables of rotations that can be asked for
        self.rows = self.graph.positions if length is None else min(length + past, self.graph.positions)

    def build(self) -> Phase:
        self._ends()
        for node in self.graph.nodes:
            match node:
                case Embed():
                    self._embed(node)
                case Linear():
                    self._linear(node)
                case Norm():
                    self._norm(node)
                case Rotate():
                    self._rotate(node)
                case Attend():
                    self._attend(node)
                case Table():
                    self._table(node)
                case Multiply():
                    self._multiply(node)
                case Sum():
                    self._sum(node)
        self._output()
        return self.phase

    # the ends

    def _ends(self) -> None:
        make = helper.make_tensor_value_info
        self.phase.inputs.append(make(IDS, TensorProto.INT64, [1, self.new]))
        self.op("Reshape", IDS, self.ints(-1), out="ids")
        if isinstance(self.new, int):
            self.const("steps", np.arange(self.new, dtype=np.int64))
        else:
            self._count("ids", 0, "steps")
        self.positions = "steps"
        if self.has_past:
            self.phase.inputs.append(make(PAST, TensorProto.INT64, [1]))
            self.positions = self.op("Add", "steps", PAST, out="at")
        elif isinstance(self.new, int) and self._needs_length():
            self.phase.inputs.append(make(LENGTH, TensorProto.INT64, [1]))

    def _needs_length(self) -> bool:
        """Whether what fills a graph of fixed size up must be told from the text."""
        if self.encoder is not None and self.encoder.pooling != "first":
            return True
        return not all(node.causal for node in self.graph.nodes if isinstance(node, Attend))

    def _count(self, x: str, axis: int, out: str) -> str:
        """0, 1, .. along one axis of x, which only the run knows the length of."""
        shape = self.op("Shape", x, out=f"{out}.shape", start=axis, end=axis + 1)
        size = self.op("Squeeze", shape, out=f"{out}.size")
        zero, one = (self.const(f"int.{n}", np.array(n, np.int64)) for n in (0, 1))
        return self.op("Range", zero, size, one, out=out)

    def _output(self) -> None:
        edge, cap = self.graph.output, self.graph.logit_softcap
        x = self.read(edge, edge if cap is None else f"{edge}.last", ("Unsqueeze", (0,)))
        if cap is not None:
            self._cap(x, cap, edge)
        shape = [1, self.new, self.graph.edges[edge].width]
        self.phase.outputs.insert(0, helper.make_tensor_value_info(edge, TensorProto.FLOAT, shape))
        if self.encoder is not None:
            self._pool(edge, self.encoder.pooling)
            shape = [1, self.graph.edges[edge].width]
            self.phase.outputs.append(helper.make_tensor_value_info(VECTOR, TensorProto.FLOAT, shape))

    def _pool(self, x: str, pooling: str) -> None:
        """The vector, (1, width), of x, (1, positions, width); of no particular length."""
        fixed = isinstance(self.new, int)
        if pooling == "mean" and not fixed:
            self.op("ReduceMean", x, self.ints(1), out=VECTOR, keepdims=0)
        elif pooling == "mean":
            mask = self.op("Less", self.op("Unsqueeze", "steps", self.ints(0, 2), out="text.at"), LENGTH, out="text")
            kept = self.op("Where", mask, x, self.const("nothing", np.array(0, np.float32)), out="text.value")
            count = self.op("Cast", LENGTH, out="text.count", to=TensorProto.FLOAT)
            self.op("Div", self.op("ReduceSum", kept, self.ints(1), out="text.sum", keepdims=0), count, out=VECTOR)
        else:
            at = self.ints(0 if pooling == "first" else -1)
            if pooling == "last" and fixed:
                at = self.op("Sub", LENGTH, self.ints(1), out="text.last")
            row = self.op("Gather", x, at, out="text.row", axis=1)
            self.op("Squeeze", row, self.ints(1), out=VECTOR)

    # the nodes

    def _embed(self, node: Embed) -> None:
        out, learned, types, scaled = f"{node.y}.float", node.positions, node.types, node.factor != 1.0
        x = self._rows(node.matrix, "ids", f"{node.y}.rows" if scaled or learned or types else out)
        if scaled:
            factor = self.const(f"{node.y}.factor", np.array(node.factor, np.float32))
            x = self.op("Mul", x, factor, out=f"{node.y}.scaled" if learned or types else out)
        if learned:
            at = self.positions
            if node.offset:
                at = self.op("Add", at, self.ints(node.offset), out=f"{node.y}.position_rows")
            x = self.op("Add", x, self._rows(learned, at, f"{node.y}.positions"), out=f"{node.y}.sum" if types else out)
        if types:
            x = self.op("Add", x, self._rows(types, self.ints(0), f"{node.y}.types"), out=out)
        self.write(node.y, x, node.op)

    def _rows(self, name: str, at: str, out: str) -> str:
        """Rows of an embedding in float32; what is looked up are codes and scales where it has them."""
        matrix = self.matrix(name)
        if matrix is None or matrix.zero.any():
            return self._float_rows(name, at, out)
        table = f"{name}.weight" if matrix.bits == 8 else f"{name}.rows"  # Gather takes no codes of 4 bits
        codes = self.op("Gather", self.const(table, matrix.codes), at, out=f"{out}.codes", axis=0)
        scales = self.const(f"{name}.weight.scale", matrix.scale)
        scale = self.op("Gather", scales, at, out=f"{out}.scale", axis=0)
        scale = self.op("Unsqueeze", scale, self.ints(1), out=f"{out}.scale.wide")
        wide = self.op("Cast", codes, out=f"{out}.whole", to=TensorProto.FLOAT)
        return self.op("Mul", wide, scale, out=out)

    def _float_rows(self, name: str, at: str, out: str) -> str:
        """Rows of a table that is not whole numbers, in float32. Float16 stays float16 in the file."""
        stored = self.model.floats.get(f"{name}.weight")
        if stored is not None and stored.dtype == "F16":
            half = self.op("Gather", self.const(f"{name}.weight", stored.data), at, out=f"{out}.half", axis=0)
            return self.op("Cast", half, out=out, to=TensorProto.FLOAT)
        if f"{name}.weight" not in self.phase.blobs:
            count = self.model.linears[name].out if stored is None else stored.shape[0]
            self.const(f"{name}.weight", self.model.rows(name, np.arange(count)))
        return self.op("Gather", f"{name}.weight", at, out=out, axis=0)

    def _linear(self, node: Linear) -> None:
        matrix = self.matrix(node.matrix)
        assert matrix is not None, f"{node.matrix}: a linear node reads whole numbers"
        grid, whole = self.graph.edges[node.x].grid, matrix.whole
        inputs = [self.read(node.x), self._weight(node.matrix, matrix)]
        # the stored bias has the zero of x folded in, DequantizeLinear takes that away itself
        bias = self.model.constants[f"{node.y}.bias"] + grid.zero * whole.sum(axis=1, dtype=np.int64)
        if bias.any():
            scale = grid.scale * matrix.scale.astype(np.float64)
            # a row without weights has no scale; the step of its bias is what the multiplier says
            power = np.ldexp(1.0, -self.model.constants[f"{node.y}.shift"].astype(np.int64))
            step = self.model.constants[f"{node.y}.multiplier"] * power * self.graph.edges[node.y].grid.scale
            scale = np.where(whole.any(axis=1), scale, step)
            if np.abs(bias).max() < 1 << 31:
                codes = self.const(f"{node.y}.bias", bias.astype(np.int32))
                scales = self.const(f"{node.y}.bias.scale", scale.astype(np.float32))
                inputs += [self.op("DequantizeLinear", codes, scales, out=f"{node.y}.bias.value", axis=0)]
            else:  # under a 16-bit input a row of tiny weights has a bias of more than 32 bits
                inputs += [self.const(f"{node.y}.bias", (bias * scale).astype(np.float32))]
        self.write(node.y, self.op("Gemm", *inputs, out=f"{node.y}.float", transB=1), node.op)

    def _weight(self, name: str, matrix: Matrix) -> str:
        key = f"{name}.weight"
        if key not in self.made:
            kind = Blob.int4 if matrix.bits == 4 else Blob.of
            self.phase.blobs.setdefault(key, kind(matrix.codes))
            self.phase.blobs[f"{key}.zero"] = kind(matrix.zero)
            self.phase.params[key] = matrix
            scale = self.const(f"{key}.scale", matrix.scale)
            value = self.op("DequantizeLinear", key, scale, f"{key}.zero", out=f"{key}.value", axis=0)
            self.made[key] = value
        return self.made[key]

    def _norm(self, node: Norm) -> None:
        y = node.y
        grid, step = self.graph.edges[node.x].grid, self.graph.edges[y].grid.scale
        width = self.graph.edges[y].width
        count = width // node.heads
        sums = max(node.eps, 2.0**-20) * grid.scale**2 / count  # no channel apart from zero: 0 / 0 where eps is 0
        eps = sums / 4096 if node.kind == "layer" else sums
        gain = self._per_head(node, "gain", step * 2.0 ** (30 - node.shift) / count**0.5)
        bias = self._per_head(node, "offset", step * 2.0**-node.shift) if node.biased else None
        self.phase.gains += [gain, *([bias] if bias else [])]
        shape, back = (("Reshape", (-1, *rest)) for rest in ((node.heads, count), (width,)))
        x = self.read(node.x) if node.heads == 1 else self.read(node.x, f"{y}.heads", shape)
        moves = [] if node.heads == 1 else [back]
        if node.kind == "layer" and node.heads == 1:
            inputs = [x, gain, *([bias] if bias else [])]
            self.write(y, self.op("LayerNormalization", *inputs, out=f"{y}.float", axis=-1, epsilon=eps), node.op)
            return
        if node.kind == "layer":
            ones = self.const(f"ones.{count}", np.ones(count, np.float32))
            x = self.op("LayerNormalization", x, ones, out=f"{y}.unit", axis=-1, epsilon=eps)
        else:
            squares = self.op("Pow", x, self.const("two", np.array(2, np.float32)), out=f"{y}.squares")
            mean = self.op("ReduceMean", squares, self.ints(-1), out=f"{y}.mean", keepdims=1)
            floor = self.const(f"{y}.eps", np.array(eps, np.float32))
            root = self.op("Sqrt", self.op("Add", mean, floor, out=f"{y}.variance"), out=f"{y}.root")
            x = self.op("Div", x, root, out=f"{y}.unit")
        x = self.op("Mul", x, gain, out=f"{y}.gained" if bias else f"{y}.float")
        if bias:
            x = self.op("Add", x, bias, out=f"{y}.float")
        self.write(y, x, node.op, *moves)

    def _per_head(self, node: Norm, what: str, step: float) -> str:
        """A norm's gain or bias as float32: (channels,), or (heads, channels) where heads differ."""
        values = self.model.constants[f"{node.y}.{what}"].astype(np.float64) * step
        heads = values.reshape(node.heads, -1).astype(np.float32)
        return self.const(f"{node.y}.{what}", heads[0] if (heads == heads[0]).all() else heads)

    def _rotate(self, node: Rotate) -> None:
        y, width, half = node.y, self.graph.edges[node.y].width, node.dim // 2
        step = node.multiplier / 2.0**node.shift * self.graph.edges[y].grid.scale / self.graph.edges[node.x].grid.scale
        cos, sin = (self._turns(kind, step) for kind in ("cos", "sin"))
        x = self.read(node.x, f"{y}.heads", ("Reshape", (-1, width // node.head_dim, node.head_dim)))
        sizes = [half, half, *([node.head_dim - node.dim] if node.dim < node.head_dim else [])]
        parts = [f"{y}.part{i}" for i in range(len(sizes))]
        self.split(x, parts, sizes, f"{y}.parts")
        products = {
            a + b: self.op("Mul", part, turn, out=f"{y}.{a}{b}")
            for a, part in zip("ab", parts, strict=False)
            for b, turn in (("c", cos), ("s", sin))
        }
        first = self.op("Sub", products["ac"], products["bs"], out=f"{y}.first")
        second = self.op("Add", products["bc"], products["as"], out=f"{y}.second")
        joined = self.op("Concat", first, second, *parts[2:], out=f"{y}.float", axis=-1)
        self.write(y, joined, node.op, ("Reshape", (-1, width)))

    def _turns(self, kind: str, step: float) -> str:
        """cos or sin at the positions, (positions, 1, dim / 2), in units of `step`: 2**-14 times the rotary scale.

        A multiplier holds the factor to 2**-23; to six digits that scale is the same for all nodes.
        """
        factor = f"{step * 2.0**14:.6g}"
        if (kind, factor) not in self.made:
            name = f"rotary.{kind}"
            table = self.const(name, self.model.constants[name][: self.rows])
            scale = self.const(f"rotary.scale.{factor}", np.array(float(factor) / 2**14, np.float32))
            zero = self.const("rotary.zero", np.array(0, np.int16))
            codes = f"{name}.codes"
            if codes not in self.made:
                rows = self.op("Gather", table, self.positions, out=f"{name}.rows", axis=0)
                self.made[codes] = self.op("Unsqueeze", rows, self.ints(1), out=codes)
            self.made[kind, factor] = self.op("DequantizeLinear", codes, scale, zero, out=f"{name}.{factor}")
        return self.made[kind, factor]

    def _table(self, node: Table) -> None:
        x, out = self.read(node.x), f"{node.y}.float"
        match node.function:
            case "relu":
                self.op("Relu", x, out=out)
            case "gelu":
                self.op("Gelu", x, out=out)
            case "gelu_tanh":
                self.op("Gelu", x, out=out, approximate="tanh")
            case "silu":
                self.op("Mul", x, self.op("Sigmoid", x, out=f"{node.y}.gate"), out=out)
            case "quick_gelu":
                factor = self.const("quick_gelu", np.array(1.702, np.float32))
                inner = self.op("Mul", x, factor, out=f"{node.y}.inner")
                self.op("Mul", x, self.op("Sigmoid", inner, out=f"{node.y}.gate"), out=out)
        self.write(node.y, out, node.op)

    def _multiply(self, node: Multiply) -> None:
        a, b = self.read(node.a), self.read(node.b)
        self.write(node.y, self.op("Mul", a, b, out=f"{node.y}.float"), node.op)

    def _sum(self, node: Sum) -> None:
        x = self.read(node.x[0])
        if len(node.x) == 1:
            x = self.op("Identity", x, out=f"{node.y}.float")
        for index, other in enumerate(node.x[1:], 1):
            out = f"{node.y}.float" if index + 1 == len(node.x) else f"{node.y}.part{index}"
            x = self.op("Add", x, self.read(other), out=out)
        self.write(node.y, x, node.op)

    def _attend(self, node: Attend) -> None:
        y, group = node.y, node.heads // node.kv_heads
        site = y.removesuffix(".mixed")  # what is inside stands beside it in docs/integer.md
        size = node.head_dim
        turn: Move = ("Transpose", (0, 2, 1, 3))
        merge: list[Move] = [("Reshape", (1, node.kv_heads, -1, 0))] if group > 1 else []  # 0: as it is
        split: list[Move] = [("Reshape", (1, node.heads, -1, 0))] if group > 1 else []
        keys, values = (self._joined(edge, node) for edge in (node.k, node.v))
        q = self.read(node.q, f"{y}.q", ("Reshape", (1, -1, node.heads, size)), turn, *merge)
        k = self.dequantize(keys, node.k, self.graph.edges[node.k].grid, f"{y}.k", ("Transpose", (0, 1, 3, 2)))
        x = self.op("MatMul", q, k, out=f"{y}.products")
        factor = self.const(f"{y}.factor", np.array(node.scale, np.float32))
        x = self.op("Mul", x, factor, out=f"{site}.scores.float")
        grid = node.scores
        if node.softcap is not None and node.capped is not None:
            x = self._cap(self.fix(x, f"{site}.scores", grid, "scores"), node.softcap, f"{site}.capped.float")
            grid = node.capped
            x = self.fix(x, f"{site}.capped", grid, "capped", *split)
        else:
            x = self.fix(x, f"{site}.scores", grid, "scores", *split)
        seen = self._seen(node)
        if seen is not None:
            least, most = grid.scale * (grid.low - grid.zero) - MARGIN, grid.scale * (grid.high - grid.zero)
            floor = self.const(f"{y}.floor", np.array(least, np.float32))
            x = self.op("Where", seen, x, floor, out=f"{y}.masked")
            self.phase.masked[x] = (least, most)
        x = self.op("Softmax", x, out=f"{site}.probabilities.float", axis=-1)
        bits = 16 if node.probability == 65535 else 8
        grid = Grid(bits=bits, scale=1 / node.probability, zero=-(1 << (bits - 1)))
        x = self.fix(x, f"{site}.probabilities", grid, "probabilities", *merge)
        v = self.dequantize(values, node.v, self.graph.edges[node.v].grid, f"{y}.v")
        x = self.op("MatMul", x, v, out=f"{y}.float")
        self.write(y, x, node.op, *split, turn, ("Reshape", (-1, node.heads * size)))

    def _cap(self, x: str, cap: float, out: str) -> str:
        limit = self.const(f"{out}.limit", np.array(cap, np.float32))
        inner = self.op("Tanh", self.op("Div", x, limit, out=f"{out}.ratio"), out=f"{out}.tanh")
        return self.op("Mul", inner, limit, out=out)

    def _joined(self, edge: str, node: Attend) -> str:
        """Codes of keys or values of all positions, (1, heads, positions, head_dim), as they come and go."""
        if f"{edge}.joined" in self.made:
            return self.made[f"{edge}.joined"]
        grid, heads, size = self.graph.edges[edge].grid, node.kv_heads, node.head_dim
        moves = ("Reshape", (1, -1, heads, size)), ("Transpose", (0, 2, 1, 3))
        x = self.moved(f"{edge}.codes", moves, f"new.{edge}")
        make = helper.make_tensor_value_info
        if node.causal and self.encoder is None:
            self.phase.outputs.append(make(x, CODES[grid.bits], [1, heads, self.new, size]))
        if self.has_past:
            self.phase.inputs.append(make(f"past.{edge}", CODES[grid.bits], [1, heads, self.past, size]))
            x = self.op("Concat", f"past.{edge}", x, out=f"{edge}.joined", axis=2)
        self.made[f"{edge}.joined"] = x
        return x

    def _seen(self, node: Attend) -> str | None:
        """Which keys (last axis) a query (the axis before) sees; None: all."""
        key = f"seen.{node.window if node.causal else 'all'}"
        if key in self.made or (not node.causal and not isinstance(self.new, int)):
            return self.made.get(key)
        if not node.causal:  # tokens behind `length` fill a graph of fixed size
            mask = self.op("Less", self.op("Unsqueeze", "steps", self.ints(0), out=f"{key}.k"), LENGTH, out=f"{key}.2d")
        else:
            q = self.op("Unsqueeze", self.positions, self.ints(1), out=f"{key}.q")
            k = self.op("Unsqueeze", self.positions, self.ints(0), out=f"{key}.k")
            mask = self._before(k, q, node.window, f"{key}.new")
            if self.has_past:
                edge = f"past.{node.k}"
                if isinstance(self.past, int):
                    slots = self.const("slots", np.arange(self.past, dtype=np.int64))
                else:
                    slots = self.made.get("slots") or self._count(edge, 2, "slots")
                    self.made["slots"] = slots
                wide = self.op("Unsqueeze", slots, self.ints(0), out=f"{key}.slots")
                filled = self.op("Less", wide, PAST, out=f"{key}.filled")
                near = self._before(wide, q, node.window, f"{key}.old")
                old = self.op("And", filled, near, out=f"{key}.past")
                mask = self.op("Concat", old, mask, out=f"{key}.2d", axis=1)
        self.made[key] = self.op("Unsqueeze", mask, self.ints(0, 1), out=key)
        return self.made[key]

    def _before(self, k: str, q: str, window: int, out: str) -> str:
        """k <= q, and q - k < window where there is one."""
        mask = self.op("LessOrEqual", k, q, out=f"{out}.before")
        if not window:
            return mask
        distance = self.op("Sub", q, k, out=f"{out}.distance")
        return self.op("And", mask, self.op("Less", distance, self.ints(window), out=f"{out}.near"), out=out)
