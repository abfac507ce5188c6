"""An integer graph as ONNX nodes that compute docs/integer.md itself, in 64-bit whole numbers.

Codes of edges, keys and values come and go as in `onnx_nodes`, and so do the two float steps at the ends. In between
nothing is rounded but where the definition says so: where the other form has DequantizeLinear, an operator and QuantizeLinear, this one has the definition's own
sums, tables and shifts, so that any runtime must come to the same codes. A reference for runtimes, not for NPUs.

Products of matrices that are not 8 bits each are carried by doubles, as the oracle may have them: every sum stays below
2**53, so each is the whole number, in any order. `>>` is Mod, Sub and Div, since ONNX shifts only numbers without sign. isqrt is the Sqrt of a double, corrected by one:
below 2**62 its whole part is never farther off.
"""

import numpy as np

from lilliput.core.graph import Attend, Grid, Linear, Multiply, Norm, Rotate, Sum, Table
from lilliput.export.onnx_graph import CODES, DOUBLE, INT64, Move, Site
from lilliput.export.onnx_nodes import Builder
from lilliput.numerics.fixed import TURN_BITS


class WholeBuilder(Builder):
    """`Builder` with the definition's arithmetic."""

    # what the rest is written with

    def number(self, value: int) -> str:
        return self.const(f"number.{value}", np.array(value, np.int64))

    def numbers(self, name: str) -> str:
        """A constant of the model, in 64 bits."""
        return self.const(name, self.model.constants[name].astype(np.int64))

    def cast(self, x: str, kind: int, out: str) -> str:
        return self.op("Cast", x, out=out, to=kind)

    def whole(self, edge: str, out: str = "", *moves: Move, codes: str = "") -> str:
        """An edge as code - zero, moved or as it is. codes: where they are not the edge's own."""
        out = out or f"{edge}.whole"
        if out not in self.made:
            moved = self.moved(codes or f"{edge}.codes", moves, f"{out}.moved")
            zero = self.number(self.graph.edges[edge].grid.zero)
            self.made[out] = self.op("Sub", self.cast(moved, INT64, f"{out}.codes"), zero, out=out)
        return self.made[out]

    def product(self, a: str, b: str, out: str) -> str:
        """a @ b, all sums below 2**53."""
        wide = [self.cast(x, DOUBLE, f"{out}.{side}") for side, x in (("left", a), ("right", b))]
        return self.cast(self.op("MatMul", *wide, out=f"{out}.carried"), INT64, out)

    def down(self, x: str, divisor: str, out: str) -> str:
        """x / divisor, rounded down."""
        rest = self.op("Mod", x, divisor, out=f"{out}.rest")
        return self.op("Div", self.op("Sub", x, rest, out=f"{out}.even"), divisor, out=out)

    def requantize(self, x: str, multiplier: str, shift: int | str, out: str) -> str:
        """rq. shift: a number, or the name of the constant with one a row."""
        if isinstance(shift, str):
            power = np.int64(1) << self.model.constants[shift].astype(np.int64)
            half, divisor = self.const(f"{shift}.half", power >> 1), self.const(f"{shift}.power", power)
        else:
            half, divisor = self.number(1 << (shift - 1)), self.number(1 << shift)
        x = self.op("Mul", x, multiplier, out=f"{out}.product")
        return self.down(self.op("Add", x, half, out=f"{out}.raised"), divisor, out)

    def clamp(self, x: str, site: str, grid: Grid, kind: str, *moves: Move, edge: bool = False) -> str:
        """To codes, from numbers that have no zero yet."""
        self.phase.sites[site] = Site(grid, kind, edge)
        x = self.op("Add", x, self.number(grid.zero), out=f"{site}.shifted")
        x = self.op("Clip", x, self.number(grid.low), self.number(grid.high), out=f"{site}.held")
        x = self.cast(x, CODES[grid.bits], f"{site}.codes.made" if moves else f"{site}.codes")
        return self.moved(x, moves, f"{site}.codes")

    def settle(self, edge: str, x: str, kind: str, *moves: Move) -> None:
        self.clamp(x, edge, self.graph.edges[edge].grid, kind, *moves, edge=True)

    # the nodes

    def _linear(self, node: Linear) -> None:
        matrix, y = self.matrix(node.matrix), node.y
        assert matrix is not None, f"{node.matrix}: a linear node reads whole numbers"
        held, x, products = matrix.whole, f"{node.x}.codes", f"{y}.products"
        small = bool(abs(held).max() < 128)  # by symmetric rows, and by 4 bits
        weight = f"{node.matrix}.weight.turned"
        if weight not in self.made:
            # an embedding that is also the head is stored once
            name = (
                f"{node.matrix}.weight" if not matrix.zero.any() and matrix.bits == 8 else f"{node.matrix}.weight.whole"
            )
            stored = self.const(name, held.astype(np.int8) if small else held)
            self.made[weight] = self.op("Transpose", stored, out=weight, perm=[1, 0])
        if small and self.graph.edges[node.x].grid.bits == 8:
            total = self.cast(self.op("MatMulInteger", x, weight, out=f"{y}.sums"), INT64, products)
        else:
            total = self.product(x, weight, products)
        total = self.op("Add", total, self.numbers(f"{y}.bias"), out=f"{y}.total")
        self.settle(y, self.requantize(total, self.numbers(f"{y}.multiplier"), f"{y}.shift", f"{y}.rq"), node.op)

    def _norm(self, node: Norm) -> None:
        y, width = node.y, self.graph.edges[node.y].width
        count, last = width // node.heads, self.ints(-1)
        x = self.whole(node.x, f"{y}.heads", ("Reshape", (-1, node.heads, count)))
        if node.kind == "layer":
            x = self.op("Mul", x, self.number(64), out=f"{y}.fine")
            total = self.op("ReduceSum", x, last, out=f"{y}.sum", keepdims=1)
            total = self.op("Add", total, self.number(count // 2), out=f"{y}.sum.raised")
            x = self.op("Sub", x, self.down(total, self.number(count), f"{y}.centre"), out=f"{y}.centred")
        total = self.op("ReduceSum", self.op("Mul", x, x, out=f"{y}.squares"), last, out=f"{y}.power", keepdims=1)
        total = self.op("Add", total, self.number(node.eps), out=f"{y}.power.eps")
        square = self.op("Max", total, self.number(1), out=f"{y}.square")
        powers = self.const("powers", np.int64(1) << np.arange(63, dtype=np.int64))
        bits = self.cast(self.op("GreaterOrEqual", square, powers, out=f"{y}.above"), INT64, f"{y}.bits")
        length = self.op("ReduceSum", bits, last, out=f"{y}.bit_length", keepdims=1)
        spare = self.op("Sub", self.number(62), length, out=f"{y}.spare")
        half = self.op("Div", spare, self.number(2), out=f"{y}.half")  # of the even number of bits to go up by
        up = self.op("Gather", powers, self.op("Add", half, half, out=f"{y}.even"), out=f"{y}.up")
        root = self._root(self.op("Mul", square, up, out=f"{y}.raised"), f"{y}.root")
        inverse = self.op("Div", self.number(1 << 61), root, out=f"{y}.inverse")
        back = self.op("Sub", self.number(31), half, out=f"{y}.back")
        before = self.op("Sub", back, self.number(1), out=f"{y}.back.before")
        x = self.op("Mul", x, inverse, out=f"{y}.scaled")
        x = self.op("Add", x, self.op("Gather", powers, before, out=f"{y}.back.half"), out=f"{y}.scaled.raised")
        x = self.down(x, self.op("Gather", powers, back, out=f"{y}.back.power"), f"{y}.units")
        x = self.op("Reshape", x, self.ints(-1, width), out=f"{y}.unit")
        x = self.op("Mul", x, self.numbers(f"{y}.gain"), out=f"{y}.gained")
        if node.biased:
            x = self.op("Add", x, self.numbers(f"{y}.offset"), out=f"{y}.offset.added")
        x = self.op("Add", x, self.number(1 << (node.shift - 1)), out=f"{y}.total")
        self.settle(y, self.down(x, self.number(1 << node.shift), f"{y}.rounded"), node.op)

    def _root(self, x: str, out: str) -> str:
        """isqrt of 0 <= x < 2**62."""
        near = self.op("Sqrt", self.cast(x, DOUBLE, f"{out}.x"), out=f"{out}.near")
        near = self.cast(near, INT64, f"{out}.whole")
        over = self.op("Greater", self.op("Mul", near, near, out=f"{out}.square"), x, out=f"{out}.over")
        low = self.op("Sub", near, self.cast(over, INT64, f"{out}.over.one"), out=f"{out}.low")
        next_ = self.op("Add", low, self.number(1), out=f"{out}.next")
        fits = self.op("LessOrEqual", self.op("Mul", next_, next_, out=f"{out}.next.square"), x, out=f"{out}.fits")
        return self.op("Where", fits, next_, low, out=out)

    def _rotate(self, node: Rotate) -> None:
        y, width, half = node.y, self.graph.edges[node.y].width, node.dim // 2
        x = self.whole(node.x, f"{y}.heads", ("Reshape", (-1, width // node.head_dim, node.head_dim)))
        rest = node.head_dim - node.dim
        parts = [f"{y}.a", f"{y}.b", *([f"{y}.rest"] if rest else [])]
        self.split(x, parts, [half, half, *([rest] if rest else [])], f"{y}.parts")
        a, b = parts[:2]
        cos, sin = self._turn("cos"), self._turn("sin")
        products = {(p, t): self.op("Mul", p, t, out=f"{p}.{t}") for p in (a, b) for t in (cos, sin)}
        turned = [
            self.op("Sub", products[a, cos], products[b, sin], out=f"{y}.first"),
            self.op("Add", products[b, cos], products[a, sin], out=f"{y}.second"),
        ]
        multiplier, plain = self.number(node.multiplier), self.number(node.plain_multiplier)
        done = [self.requantize(one, multiplier, node.shift, f"{one}.rq") for one in turned]
        if rest:
            up = self.op("Mul", parts[2], self.number(1 << TURN_BITS), out=f"{y}.rest.up")
            done.append(self.requantize(up, plain, node.plain_shift, f"{y}.rest.rq"))
        joined = self.op("Concat", *done, out=f"{y}.turned", axis=-1)
        self.settle(y, joined, node.op, ("Reshape", (-1, width)))

    def _turn(self, kind: str) -> str:
        """Cosines or sines at the positions, (positions, 1, dim / 2)."""
        out = f"rotary.{kind}.at"
        if out not in self.made:
            table = self.const(f"rotary.{kind}", self.model.constants[f"rotary.{kind}"][: self.rows])
            rows = self.op("Gather", table, self.positions, out=f"{out}.rows", axis=0)
            self.made[out] = self.cast(self.op("Unsqueeze", rows, self.ints(1), out=f"{out}.wide"), INT64, out)
        return self.made[out]

    def _table(self, node: Table) -> None:
        to = self.graph.edges[node.y].grid
        self.phase.sites[node.y] = Site(to, node.op, edge=True)
        at = self.cast(f"{node.x}.codes", INT64, f"{node.y}.x")
        at = self.op("Add", at, self.number(1 << (self.graph.edges[node.x].grid.bits - 1)), out=f"{node.y}.at")
        table = self.model.constants[f"{node.y}.table"].astype(f"int{to.bits}")
        self.op("Gather", self.const(f"{node.y}.table", table), at, out=f"{node.y}.codes")

    def _multiply(self, node: Multiply) -> None:
        x = self.op("Mul", self.whole(node.a), self.whole(node.b), out=f"{node.y}.product")
        self.settle(node.y, self.requantize(x, self.number(node.multiplier), node.shift, f"{node.y}.rq"), node.op)

    def _sum(self, node: Sum) -> None:
        total = self.number(1 << (node.shift - 1))
        for index, (edge, m) in enumerate(zip(node.x, node.multipliers, strict=True)):
            part = self.op("Mul", self.whole(edge), self.number(m), out=f"{node.y}.part{index}")
            total = self.op("Add", total, part, out=f"{node.y}.total{index}")
        self.settle(node.y, self.down(total, self.number(1 << node.shift), f"{node.y}.rounded"), node.op)

    def _attend(self, node: Attend) -> None:
        y, group, size = node.y, node.heads // node.kv_heads, node.head_dim
        site = y.removesuffix(".mixed")
        turn: Move = ("Transpose", (0, 2, 1, 3))
        merge: list[Move] = [("Reshape", (1, node.kv_heads, -1, 0))] if group > 1 else []  # 0: as it is
        split: list[Move] = [("Reshape", (1, node.heads, -1, 0))] if group > 1 else []
        keys, values = (self._joined(edge, node) for edge in (node.k, node.v))
        q = self.whole(node.q, f"{y}.q", ("Reshape", (1, -1, node.heads, size)), turn, *merge)
        k = self.whole(node.k, f"{y}.k", ("Transpose", (0, 1, 3, 2)), codes=keys)
        x = self.product(q, k, f"{y}.products")
        x = self.requantize(x, self.number(node.multiplier), node.shift, f"{y}.rq")
        x = self.clamp(x, f"{site}.scores", node.scores, "scores")
        if node.capped is not None:
            self.phase.sites[f"{site}.capped"] = Site(node.capped, "capped", edge=False)
            at = self.op("Add", self.cast(x, INT64, f"{y}.cap.x"), self.number(1 << 15), out=f"{y}.cap.at")
            x = self.op(
                "Gather", self.const(f"{y}.cap", self.model.constants[f"{y}.cap"]), at, out=f"{site}.capped.codes"
            )
        x = self.cast(self.moved(x, split, f"{y}.split"), INT64, f"{y}.scores")
        x = self._shares(node, x, self._seen(node))
        x = self.moved(x, merge, f"{y}.merged")
        x = self.product(x, self.whole(node.v, f"{y}.v", codes=values), f"{y}.mixture")
        x = self.requantize(x, self.number(node.out_multiplier), node.out_shift, f"{y}.out")
        self.settle(y, x, node.op, *split, turn, ("Reshape", (-1, node.heads * size)))

    def _shares(self, node: Attend, x: str, seen: str | None) -> str:
        """The softmax of scores over what is seen, in units of 1 / node.probability."""
        y, last = node.y, self.ints(-1)

        def kept(name: str, other: int) -> str:
            return name if seen is None else self.op("Where", seen, name, self.number(other), out=f"{name}.seen")

        top = self.op("ReduceMax", kept(x, -(1 << 15)), last, out=f"{y}.top", keepdims=1)
        delta = kept(self.op("Sub", top, x, out=f"{y}.delta"), 0)
        high = self.op("Div", delta, self.number(256), out=f"{y}.delta.high")
        low = self.op("Mod", delta, self.number(256), out=f"{y}.delta.low")
        tables = [
            self.op("Gather", self.numbers(f"{y}.{kind}"), at, out=f"{y}.{kind}.at")
            for kind, at in (("hi", high), ("lo", low))
        ]
        power = self.op("Mul", *tables, out=f"{y}.powers.fine")
        power = self.op("Add", power, self.number(1 << 15), out=f"{y}.powers.raised")
        power = kept(self.op("Div", power, self.number(1 << 16), out=f"{y}.powers"), 0)
        total = self.op("ReduceSum", power, last, out=f"{y}.powers.sum", keepdims=1)
        share = self.op("Div", self.number(node.probability << 31), total, out=f"{y}.share")
        x = self.op("Mul", power, share, out=f"{y}.shares.fine")
        x = self.op("Add", x, self.number(1 << 30), out=f"{y}.shares.raised")
        return self.op("Div", x, self.number(1 << 31), out=f"{y}.shares")
