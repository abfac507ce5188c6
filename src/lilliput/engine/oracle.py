"""The integer graph, run as docs/integer.md defines it: what every other runner of integer artifacts must equal.

NumPy only and meant to be read, not to be fast. Whole numbers go in at `embed` and come out as logits, or as what a
vector is the mean of; in between nothing is a float, which `strict` has every operation prove.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lilliput.artifact.integer import IntegerModel
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.core.graph import Attend, Embed, Grid, Linear, Multiply, Norm, Rotate, Sum, Table
from lilliput.core.spec import PADDING, EncoderSpec
from lilliput.numerics import fixed

I16 = npt.NDArray[np.int16]
F32 = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
_CARRIED: Final = 1 << 28
"""Bytes of matrices kept as the floats that carry them, see `fixed.matmul`; larger ones are converted at each use."""


@dataclass
class State:
    """One sequence on its way. length: positions done. cache: keys and values as codes, (length, width), by edge."""

    length: int = 0
    cache: dict[str, I16] = field(default_factory=dict)


class Oracle:
    """Runs an IntegerModel. strict: every array between the declared float steps is one that refuses floats."""

    def __init__(self, model: IntegerModel, *, strict: bool = False) -> None:
        self.model, self.graph, self.strict = model, model.graph, strict
        self.spec = model.spec
        self._constants = {name: self._guarded(value) for name, value in model.constants.items()}
        self._weights: dict[str, Codes] = {}
        self._carried = 0
        self._run: dict[type[Any], Callable[[Any, dict[str, Codes], State], Codes]] = {
            Linear: self._linear,
            Norm: self._norm,
            Rotate: self._rotate,
            Attend: self._attend,
            Table: self._table,
            Multiply: self._multiply,
            Sum: self._sum,
        }

    def start(self) -> State:
        """A sequence of no tokens."""
        return State()

    def feed(self, state: State, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> I16:
        """Take in tokens behind those of `state`; return the codes of their logits, (tokens, vocab).

        Raises ConfigError for ids that are not there, OutOfResource beyond the positions of the graph, Unsupported for
        an encoder.
        """
        if isinstance(self.spec, EncoderSpec):
            what = f"a {self.spec.family} encoder makes vectors of whole texts"
            raise Unsupported(what, where="integer graph", fix="Use embed or vectors")
        return self._walk(state, tokens, None)[self.graph.output]

    def logits(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]], *, bits: int | None = None) -> F32:
        """The logits after every token of one fresh sequence, (length, vocab). bits: None or the model's own.

        Raises ConfigError for another width, and as `feed` does.
        """
        if bits not in (None, self.model.bits):
            what = f"the integer graph has weights of {self.model.bits} bits, not {bits}"
            raise ConfigError(what, where="bits", fix="Leave the width out")
        return self.finish(self.feed(self.start(), tokens))

    def finish(self, codes: I16) -> F32:
        """The second declared float step: codes of logits to float32."""
        grid = self._grid(self.graph.output)
        cap = self.graph.logit_softcap
        value: F32 = np.float32(grid.scale) * (codes.astype(np.int32) - grid.zero).astype(np.float32)
        if cap is not None:
            value = (np.tanh(value / np.float32(cap)) * np.float32(cap)).astype(np.float32)
        return value

    def embed(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> F32:
        """The vector of one text, (embedding_size,), of no particular length.

        Raises Unsupported for a model that generates text, and as `feed` does.
        """
        spec = self.spec
        if not isinstance(spec, EncoderSpec):
            what = f"a {spec.family} decoder generates text"
            raise Unsupported(what, where="integer graph", fix="Use logits, or feed")
        return self.pool(self._walk(self.start(), tokens, None)[self.graph.output], spec.pooling)

    def pool(self, codes: I16, pooling: Literal["mean", "first", "last"]) -> F32:
        """The second declared float step of encoders: codes of the output, (length, width), to a vector, (width,)."""
        grid = self._grid(self.graph.output)
        whole = codes.astype(np.int64) - grid.zero
        if pooling == "mean":
            total: F32 = np.float32(grid.scale) * whole.sum(0).astype(np.float32) / np.float32(len(whole))
            return total
        picked: F32 = np.float32(grid.scale) * whole[0 if pooling == "first" else -1].astype(np.float32)
        return picked

    def vectors(self, inputs: npt.NDArray[np.integer[Any]]) -> F32:
        """`embed` of each row without its padding: (batch, length) ids to (batch, embedding_size)."""
        return np.stack([self.embed(row[row != PADDING]) for row in np.asarray(inputs)])

    def sites(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        scores: bool = False,
        given: Mapping[str, Codes] | None = None,
        change: Callable[[str, I16], I16] | None = None,
    ) -> dict[str, Codes]:
        """The codes of every edge for one fresh sequence, (length, width).

        scores: those inside attention too, "layers.N.attn.scores" and, with a soft-cap, ".capped", (heads, length,
        length), the lowest code where a key is not seen. given: what every node reads instead of what those before it
        made, all of it in these shapes: what the definition makes of another runner's codes, node by node. change: what
        becomes of an edge's name and codes before they are read. Raises as `feed` does.
        """
        inside: dict[str, Codes] | None = {} if scores else None
        found = self._walk(self.start(), tokens, inside, given, change)
        return found | (inside or {})

    def _walk(
        self,
        state: State,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        inside: dict[str, Codes] | None,
        given: Mapping[str, Codes] | None = None,
        change: Callable[[str, I16], I16] | None = None,
    ) -> dict[str, I16]:
        ids = np.asarray(tokens)
        self._check(ids, state.length)
        self._inside = inside
        edges: dict[str, Codes] = {}
        read = edges if given is None else {name: self._guarded(value) for name, value in given.items()}
        for node in self.graph.nodes:
            if isinstance(node, Embed):
                edges[node.y] = self._guarded(self._embed(node, ids, state.length))
            else:
                edges[node.y] = self._run[type(node)](node, read, state).astype(np.int16)
            if change is not None:
                edges[node.y] = self._guarded(change(node.y, edges[node.y].view(np.ndarray)))
        state.length += len(ids)
        return {name: value.view(np.ndarray) for name, value in edges.items()}

    def _check(self, ids: npt.NDArray[Any], done: int) -> None:
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            what = f"{ids.shape} of {ids.dtype} is not a list of one or more token ids"
            raise ConfigError(what, where="tokens", fix="Give whole numbers")
        known = self.spec.matrices()[self.spec.entrance][0]
        if int(ids.min()) < 0 or int(ids.max()) >= known:
            what = f"a token is outside the vocabulary of {known}"
            raise ConfigError(what, where="tokens", fix="Encode the text with this model's own tokenizer")
        if done + len(ids) > self.graph.positions:
            what = f"{done + len(ids)} tokens exceed the {self.graph.positions} positions of the graph"
            raise OutOfResource(what, where="tokens", fix="Cut them")

    # ---- the nodes

    def _embed(self, node: Embed, ids: npt.NDArray[Any], done: int) -> I16:
        """The first declared float step. Every operation is rounded to float32, in this order."""
        rows = self.model.rows(node.matrix, ids) * np.float32(node.factor)
        if node.positions is not None:
            rows = rows + self.model.rows(node.positions, np.arange(done, done + len(ids)) + node.offset)
        if node.types is not None:
            rows = rows + self.model.rows(node.types, np.zeros(1, np.int64))
        if not np.isfinite(rows).all():
            fix = "Run verify, then make the artifact again"
            raise ConfigError("an embedding is not finite", where=node.matrix, fix=fix)
        grid = self._grid(node.y)
        steps = np.rint(rows / np.float32(grid.scale))
        held = np.clip(steps, np.float32(grid.low - grid.zero), np.float32(grid.high - grid.zero))
        codes: I16 = (held.astype(np.int64) + grid.zero).astype(np.int16)
        return codes

    def _linear(self, node: Linear, edges: dict[str, Codes], state: State) -> Codes:
        bias, multiplier, shift = (self._constants[f"{node.y}.{kind}"] for kind in ("bias", "multiplier", "shift"))
        weight, to = self._weight(node.matrix), self._grid(node.y)
        return fixed.linear(edges[node.x], weight, bias, multiplier, shift, to, blas=not self.strict)

    def _norm(self, node: Norm, edges: dict[str, Codes], state: State) -> Codes:
        gain = self._constants[f"{node.y}.gain"]
        offset = self._constants[f"{node.y}.offset"] if node.biased else None
        rule = {"kind": node.kind, "heads": node.heads, "eps": node.eps, "shift": node.shift}
        return fixed.norm(edges[node.x], self._grid(node.x), gain, offset, self._grid(node.y), **rule)  # type: ignore[arg-type]

    def _rotate(self, node: Rotate, edges: dict[str, Codes], state: State) -> Codes:
        x = edges[node.x]
        at = slice(state.length, state.length + len(x))
        cos, sin = self._constants["rotary.cos"][at], self._constants["rotary.sin"][at]
        return fixed.rotate(x, self._grid(node.x), cos, sin, node, self._grid(node.y))

    def _attend(self, node: Attend, edges: dict[str, Codes], state: State) -> Codes:
        for name in (node.k, node.v):
            fresh = edges[name].astype(np.int16)
            before = self._guarded(state.cache.get(name, fresh[:0]))
            state.cache[name] = np.concatenate([before, fresh])
        k, v = (self._guarded(state.cache[name]) for name in (node.k, node.v))
        grids = (self._grid(node.q), self._grid(node.k), self._grid(node.v), self._grid(node.y))
        hi, lo = (self._constants[f"{node.y}.{kind}"] for kind in ("hi", "lo"))
        cap = None if node.capped is None else self._constants[f"{node.y}.cap"]
        base = node.y.removesuffix(".mixed")
        names = (f"{base}.scores", f"{base}.capped")
        told: list[fixed.I64] | None = None if self._inside is None else []
        given = [edges[name] for name in names if name in edges]
        options: dict[str, Any] = {"blas": not self.strict, "scores": told, "given": given}
        mixed = fixed.attend(edges[node.q], k, v, grids, node, (hi, lo, cap), start=state.length, **options)
        if self._inside is not None:
            self._inside |= {name: of.view(np.ndarray) for name, of in zip(names, told or (), strict=False)}
        return mixed

    def _table(self, node: Table, edges: dict[str, Codes], state: State) -> Codes:
        return fixed.look_up(edges[node.x], self._constants[f"{node.y}.table"], self._grid(node.x).bits)

    def _multiply(self, node: Multiply, edges: dict[str, Codes], state: State) -> Codes:
        a, b = ((edges[name], self._grid(name)) for name in (node.a, node.b))
        return fixed.multiply(*a, *b, node.multiplier, node.shift, self._grid(node.y))

    def _sum(self, node: Sum, edges: dict[str, Codes], state: State) -> Codes:
        parts = [(edges[name], self._grid(name)) for name in node.x]
        return fixed.add(parts, node.multipliers, node.shift, self._grid(node.y))

    # ---- what they read

    def _grid(self, name: str) -> Grid:
        return self.graph.edges[name].grid

    def _weight(self, name: str) -> Codes:
        """A matrix of whole numbers; float64 carries those of the matrices there is room for."""
        if name not in self._weights:
            kept: Codes = self.model.weights(name)
            if self.strict:
                kept = self._guarded(kept)
            elif self._carried + 8 * kept.size <= _CARRIED:
                kept, self._carried = kept.astype(np.float64), self._carried + 8 * kept.size
            self._weights[name] = kept
        return self._weights[name]

    def _guarded(self, value: Codes) -> Codes:
        return value.view(WholeArray) if self.strict else value


class WholeArray(np.ndarray[Any, np.dtype[Any]]):
    """An array that raises TypeError when an operation takes a float or would give one, and passes that on."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Do the operation between plain arrays and look at what goes in and comes out."""
        if "out" in options:
            options["out"] = tuple(_plain(one) for one in options["out"])
        plain = [_plain(one) for one in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        for one in (*plain, result):
            _refuse(one, ufunc.__name__)
        return result.view(WholeArray) if isinstance(result, np.ndarray) else result

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """As above, for functions that are no ufuncs; their results guard what follows as well."""
        result = func(*_unpacked(args), **{name: _plain(one) for name, one in kwargs.items()})
        _refuse(result, func.__name__)
        return result.view(WholeArray) if isinstance(result, np.ndarray) else result

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """As ndarray's, to whole numbers only."""
        _refuse(np.empty(0, dtype), "astype")
        return super().astype(dtype, *args, **kwargs)

    def __array_finalize__(self, of: npt.NDArray[Any] | None) -> None:
        """Look at views and copies."""
        _refuse(self, "view")


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, WholeArray) else value


def _unpacked(args: Any) -> list[Any]:
    return [[_plain(one) for one in arg] if isinstance(arg, (list, tuple)) else _plain(arg) for arg in args]


def _refuse(value: Any, doing: str) -> None:
    if np.asarray(value).dtype.kind not in "iub":
        raise TypeError(f"{doing} on {np.asarray(value).dtype} between the declared float steps")
