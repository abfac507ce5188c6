"""From a model's description, its codes and a grid for every edge to the integer graph of docs/integer.md.

Constants are computed in float64 with halves to even, so the same input gives the same graph everywhere. Nothing here
knows a family: what a spec says is what is built.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.core.graph import Attend, Edge, Embed, Graph, Grid, Linear, Multiply, Node, Norm, Rotate, Sum, Table
from lilliput.core.spec import Activation, AnySpec, EncoderActivation, EncoderSpec
from lilliput.core.spec import Norm as NormSpec
from lilliput.models.sites import PROBABILITIES, has_sum, refuse_pictures
from lilliput.numerics import fixed
from lilliput.numerics.nested import Quantized

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
SMALLEST: Final = float(np.finfo(np.float32).tiny)
"""Scales below it have fewer bits in float32, where embedding and logits meet them."""
_EMPTY_ROW: Final = 2.0**-8
"""Codes of the output in one step of the bias of a row without weights."""


def _sigmoid(x: F64) -> F64:
    found: F64 = np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))
    return found


_erf = np.vectorize(math.erf, otypes=[np.float64])
FUNCTIONS: dict[Activation | EncoderActivation, Callable[[F64], F64]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
}


def lower(
    spec: AnySpec,
    grids: Mapping[str, Grid],
    tensors: Mapping[str, Tensor],
    codes: Mapping[str, Quantized],
    *,
    positions: int | None = None,
) -> tuple[Graph, dict[str, Array]]:
    """Return the graph and its constants.

    grids: by the names of `sites.sites`, of which "attn.probabilities" may be left out and is 16 bits then. tensors:
    norms and biases by canonical name, float. codes: every matrix that a linear layer multiplies with, by canonical
    name, the head's among them: one width of 4 or 8 bits, one group a row, the zero a code. positions: the longest
    sequence, by default the model's context.
    Raises ConfigError for an edge without a grid or with one that cannot be served, and for codes of another kind,
    Unsupported for an encoder of pictures; each names what it is about.
    """
    refuse_pictures(spec)
    return _Lowering(spec, grids, tensors, codes, positions or spec.context).run()


class _Lowering:
    def __init__(
        self,
        spec: AnySpec,
        grids: Mapping[str, Grid],
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Quantized],
        positions: int,
    ) -> None:
        self.spec, self.grids, self.tensors, self.codes, self.positions = spec, grids, tensors, codes, positions
        self.edges: dict[str, Edge] = {}
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}

    def run(self) -> tuple[Graph, dict[str, Array]]:
        spec = self.spec
        if isinstance(spec, EncoderSpec):
            return self._encoder(spec)
        if spec.rotary is not None:
            turns = fixed.turns(spec.rotary.inv_freq, self.positions)
            self.constants["rotary.cos"], self.constants["rotary.sin"] = turns
        first = "layers.0.input" if spec.num_layers else "final.input"
        learned = {} if spec.position_offset is None else {"positions": "embed_positions"}
        start = Embed(
            y=first, matrix="embed_tokens", factor=spec.embed_scale, offset=spec.position_offset or 0, **learned
        )
        self._put(start, spec.hidden_size)
        for layer in range(spec.num_layers):
            self._block(layer, post_norms=spec.post_norms)
        self._norm("final_norm", "final.input", spec.norm)
        self._linear("embed_tokens" if spec.tied_head else "lm_head", "final_norm", "logits")
        graph = Graph(
            edges=self.edges, nodes=tuple(self.nodes), logit_softcap=spec.logit_softcap, positions=self.positions
        )
        return graph, self.constants

    def _encoder(self, spec: EncoderSpec) -> tuple[Graph, dict[str, Array]]:
        types = "embed_types" if "embed_types.weight" in self.tensors else None
        first = "embed" if has_sum(spec) else "layers.0.input"
        start = Embed(y=first, matrix="embed_tokens", positions="embed_positions", types=types)
        last = self._put(start, spec.hidden_size)
        if spec.embed_norm:
            last = self._norm("embed_norm", last, spec.norm, y="layers.0.input" if spec.norm_first else "embed_norm")
        for layer in range(spec.num_layers):
            last = self._block(layer, post_norms=False) if spec.norm_first else self._block_behind(layer, last)
        if spec.final_norm:
            last = self._norm("final_norm", last, spec.norm)
        if spec.projection is not None:
            last = self._linear("projection", last, "projection")
        return Graph(
            edges=self.edges, nodes=tuple(self.nodes), output=last, positions=self.positions
        ), self.constants  # fmt: skip

    def _block_behind(self, layer: int, x: str) -> str:
        """A block whose norms are behind its sums; x is its residual stream."""
        at = f"layers.{layer}."
        for part in ("attn", "mlp"):
            inner = self._sum(f"{at}{part}_input", x)
            inner = self._attention(layer, inner) if part == "attn" else self._mlp(layer, inner)
            x = self._norm(f"{at}{part}_post_norm", self._sum(f"{at}{part}_sum", x, inner), self.spec.norm)
        return x

    def _block(self, layer: int, *, post_norms: bool) -> str:
        spec, at = self.spec, f"layers.{layer}."
        after = f"layers.{layer + 1}.input" if layer + 1 < spec.num_layers else "final.input"
        self._norm(f"{at}attn_norm", f"{at}input", spec.norm)
        attn = self._attention(layer, f"{at}attn_norm")
        if post_norms:
            attn = self._norm(f"{at}attn_post_norm", attn, spec.norm)
        middle = f"{at}input" if spec.parallel_block else self._sum(f"{at}middle", f"{at}input", attn)
        normed = f"{at}attn_norm"
        if not spec.shared_block_norm:
            normed = self._norm(f"{at}mlp_norm", middle, spec.norm)
        mlp = self._mlp(layer, normed)
        if post_norms:
            mlp = self._norm(f"{at}mlp_post_norm", mlp, spec.norm)
        return self._sum(after, middle, *((attn,) if spec.parallel_block else ()), mlp)

    def _attention(self, layer: int, normed: str) -> str:
        spec, at = self.spec, f"layers.{layer}.attn."
        q, k, v = (self._linear(f"{at}{c}_proj", normed, f"{at}{c}_proj") for c in "qkv")
        if spec.qk_norm is not None:
            q = self._norm(f"{at}q_norm", q, spec.qk_norm.norm, spec.num_heads)
            k = self._norm(f"{at}k_norm", k, spec.qk_norm.norm, spec.num_kv_heads)
        if spec.rotary is not None:
            q, k = self._rotate(f"{at}q", q), self._rotate(f"{at}k", k)
        mixed = self._attend(layer, q, k, v)
        return self._linear(f"{at}o_proj", mixed, f"{at}o_proj")

    def _mlp(self, layer: int, normed: str) -> str:
        spec, at = self.spec, f"layers.{layer}.mlp."
        first = "gate_proj" if spec.gated_mlp else "up_proj"
        inner = self._table(f"{at}act", self._linear(f"{at}{first}", normed, f"{at}{first}"))
        if spec.gated_mlp:
            inner = self._multiply(f"{at}inner", inner, self._linear(f"{at}up_proj", normed, f"{at}up_proj"))
        return self._linear(f"{at}down_proj", inner, f"{at}down_proj")

    # ---- nodes

    def _norm(self, name: str, x: str, norm: NormSpec, heads: int = 1, *, y: str = "") -> str:
        """y: the edge it writes, where that is not called as the norm is."""
        y, width = y or name, self.edges[x].width
        weight = self._tensor(f"{name}.weight").reshape(-1) + norm.offset
        weight = np.tile(weight, width // len(weight))
        bias = self._tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        own, to = self._grid(x), self._grid(y)
        with _at(y):
            gain, offset, eps, shift = fixed.norm_constants(norm.kind, weight, bias, width // heads, norm.eps, own, to)
        self.constants[f"{y}.gain"] = gain
        if offset is not None:
            self.constants[f"{y}.offset"] = offset
        node = Norm(
            x=x, y=y, kind=norm.kind, heads=heads, eps=eps, shift=shift, biased=offset is not None
        )  # fmt: skip
        return self._put(node, width)

    def _linear(self, matrix: str, x: str, y: str) -> str:
        whole, scales, most = self._matrix(matrix)
        own, to = self._grid(x), self._grid(y)
        empty = scales == 0
        if (whole[empty] != 0).any():
            what = (
                f"row {int(np.flatnonzero(empty & (whole != 0).any(1))[0])} has a scale of 0 for weights that are not"
            )
            raise ConfigError(what, where=matrix, fix="Give it the scale its weights need")
        scales = np.where(empty, _EMPTY_ROW * to.scale / own.scale, scales)
        bias = self._tensor(f"{matrix}.bias") if f"{matrix}.bias" in self.tensors else np.zeros(len(scales))
        sums = whole.sum(1, dtype=np.int64)
        limit = ((1 << 31) - 1 if own.bits == 8 else fixed.LARGEST) - (own.high + 1) * most * whole.shape[1]
        steps = np.rint(bias / (own.scale * scales)) - own.zero * sums.astype(np.float64)
        if not (np.abs(steps) <= limit).all():
            row = int(np.argmax(~(np.abs(steps) <= limit)))
            what = f"the bias of row {row} is {steps[row]:.3g} steps of its sum, which holds {limit:,}"
            raise ConfigError(what, where=y, fix="Give its input 16 bits, or this row a larger scale")
        with _at(y):
            multiplier, shift = fixed.multipliers(own.scale * scales / to.scale)
        self.constants |= {f"{y}.bias": steps.astype(np.int64), f"{y}.multiplier": multiplier, f"{y}.shift": shift}
        return self._put(Linear(x=x, y=y, matrix=matrix), len(scales))

    def _rotate(self, name: str, x: str) -> str:
        rotary = self.spec.rotary
        assert rotary is not None, "called for a spec with one"
        ratio = math.ldexp(self._grid(x).scale / self._grid(name).scale, -fixed.TURN_BITS)
        with _at(name):
            multiplier, shift = fixed.multiplier(rotary.scale * ratio)
            plain_multiplier, plain_shift = fixed.multiplier(ratio)
        node = Rotate(
            x=x,
            y=name,
            head_dim=self.spec.head_dim,
            dim=rotary.dim,
            multiplier=multiplier,
            shift=shift,
            plain_multiplier=plain_multiplier,
            plain_shift=plain_shift,
        )
        return self._put(node, self.edges[x].width)

    def _attend(self, layer: int, q: str, k: str, v: str) -> str:
        spec, base = self.spec, f"layers.{layer}.attn."
        name, scores = f"{base}mixed", self._wide(f"{base}scores")
        capped = None if spec.attn_softcap is None else self._wide(f"{base}capped")
        share = self.grids.get(f"layers.{layer}.{PROBABILITIES}")
        one: Literal[255, 65535] = 255 if share is not None and share.bits == 8 else 65535
        with _at(f"{base}scores"):
            factor = spec.attn_scale * self._grid(q).scale * self._grid(k).scale / scores.scale
            multiplier, shift = fixed.multiplier(factor)
        with _at(name):
            out_multiplier, out_shift = fixed.multiplier(self._grid(v).scale / (one * self._grid(name).scale))
        hi, lo = fixed.exponentials((capped or scores).scale)
        self.constants |= {f"{name}.hi": hi, f"{name}.lo": lo}
        if capped is not None and spec.attn_softcap is not None:
            real = fixed.values(np.arange(scores.low, scores.high + 1), scores)
            self.constants[f"{name}.cap"] = fixed.codes(np.tanh(real / spec.attn_softcap) * spec.attn_softcap, capped)
        node = Attend(
            q=q,
            k=k,
            v=v,
            y=name,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.windows[layer],
            causal=spec.causal,
            scores=scores,
            multiplier=multiplier,
            shift=shift,
            capped=capped,
            softcap=spec.attn_softcap,
            scale=spec.attn_scale,
            probability=one,
            out_multiplier=out_multiplier,
            out_shift=out_shift,
        )
        return self._put(node, self.edges[q].width)

    def _table(self, name: str, x: str) -> str:
        own, to = self._grid(x), self._grid(name)
        real = fixed.values(np.arange(own.low, own.high + 1), own)
        self.constants[f"{name}.table"] = fixed.codes(FUNCTIONS[self.spec.activation](real), to)
        return self._put(Table(x=x, y=name, function=self.spec.activation), self.edges[x].width)

    def _multiply(self, name: str, a: str, b: str) -> str:
        with _at(name):
            multiplier, shift = fixed.multiplier(self._grid(a).scale * self._grid(b).scale / self._grid(name).scale)
        return self._put(Multiply(a=a, b=b, y=name, multiplier=multiplier, shift=shift), self.edges[a].width)

    def _sum(self, name: str, *x: str) -> str:
        with _at(name):
            multipliers, shift = fixed.sum_constants([self._grid(one).scale for one in x], self._grid(name))
        return self._put(Sum(x=x, y=name, multipliers=multipliers, shift=shift), self.edges[x[0]].width)

    # ---- what they are made of

    def _put(self, node: Node, width: int) -> str:
        self.edges[node.y] = Edge(width=width, grid=self._grid(node.y))
        self.nodes.append(node)
        return node.y

    def _grid(self, name: str) -> Grid:
        grid = self.grids.get(name)
        if grid is None:
            fix = "Calibrate it: every edge needs a range from text that reaches it"
            raise ConfigError("this site has no range", where=name, fix=fix)
        if grid.scale < SMALLEST:
            what = f"its scale is {grid.scale:.3g}, which float32 keeps with fewer bits, so levels would be lost"
            raise ConfigError(what, where=name, fix="Widen its range")
        return grid

    def _wide(self, name: str) -> Grid:
        grid = self._grid(name)
        if grid.bits != 16:
            raise ConfigError(f"scores have 16 bits, not {grid.bits}", where=name, fix="Leave it out of the policy")
        return grid

    def _tensor(self, name: str) -> F64:
        if name not in self.tensors:
            raise ConfigError("the model has no such tensor", where=name, fix="Give norms and biases by canonical name")
        value: F64 = self.tensors[name].detach().double().cpu().numpy()
        if not np.isfinite(value).all():
            raise ConfigError("a value is not finite", where=name, fix="Look for a broken checkpoint or training step")
        return value

    def _matrix(self, name: str) -> tuple[npt.NDArray[np.int16], F64, int]:
        """The whole numbers of a matrix, (out, in), their scales, (out,), and the largest magnitude they may have."""
        if name not in self.codes:
            raise ConfigError("it has no codes", where=name, fix="Quantize every matrix, the head's too")
        coded = self.codes[name]
        bits = coded.bits[-1]
        zero = coded.zero.get(bits)
        if len(coded.bits) > 1 or bits not in (4, 8) or coded.grid(bits)[0].shape[1] != 1 or coded.table:
            what = f"its codes are of widths {list(coded.bits)}, {coded.grid(bits)[0].shape[1]} groups a row"
            fix = "An integer graph needs one width, 4 or 8, one group a row and no tables"
            raise ConfigError(what, where=name, fix=fix)
        last = (1 << bits) - 1
        middle = np.full((1, 1), np.nan) if zero is None else zero.double().cpu().numpy() + last / 2
        if not np.isin(middle, np.arange(last + 1)).all():
            fix = "Its levels must be whole numbers of steps, 0 among them"
            raise ConfigError("a zero is none of its codes", where=name, fix=fix)
        whole = coded.codes.cpu().numpy().astype(np.int16) - middle.astype(np.int16)
        most = int(max(middle.max(), last - middle.min()))
        return whole, coded.scale[bits][:, 0].double().cpu().numpy(), most


class _at:
    """Turns a constant that does not fit into an error that names the site."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and not isinstance(error, ConfigError):
            fix = "Its range is far from those around it: calibrate again"
            raise ConfigError(f"no whole numbers hold its constants: {error}", where=self.name, fix=fix) from None
