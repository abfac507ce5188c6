"""Where a block may be rescaled without changing what it computes: one side is divided, the other multiplied.

    norm          a norm's output                      the columns of the linear layers that read it
    value         v_proj's output                      o_proj's columns, a kv head's scales for all its query heads
    inner         up_proj's output                     down_proj's columns
    query_key     k_proj's output, after its norm      q_proj's output, both halves of a rotation alike

`inner` is exact in a gated MLP, where the product is linear in `up`, and without a gate only under relu, for which
relu(x / s) = relu(x) / s. A rotation mixes channel i of a head with channel i + dim / 2, so the two share a factor;
channels it leaves alone have their own. Where queries and keys are normalised the factors go to those norms' weights,
which come after the normalisation. What norms put into the residual stream (post-norms, and all norms of an encoder that
is not `norm_first`) has no reader of its own.

Source: Xiao et al., "SmoothQuant", ICML 2023, eq. 3; Lin et al., "AWQ", MLSys 2024, section 3.2; Shao et al.,
"OmniQuant", ICLR 2024, eqs. 3 to 5.
Deviation: grouped heads and rotations are tied as above, where those papers skip the pair or leave it inexact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lilliput.models.decoder import Block

_FLOOR = 1e-5

Kind = Literal["norm", "value", "inner", "query_key"]


@dataclass(frozen=True, eq=False)
class Pair:
    """One vector of `width` positive scales and the tensors of a block that take it up; names are the block's own.

    divided: the module whose output is divided, channel i by scale[rows[i]]. multiplied: the modules that make up for
    it, linear layers by their columns, or for "query_key" one module by its output; channel i by scale[columns[i]].
    """

    kind: Kind
    width: int
    divided: str
    multiplied: tuple[str, ...]
    rows: Tensor
    columns: Tensor
    offset: float = 0.0

    def scaled(self, tensors: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """The tensors that change, by name in the block; differentiable in all of them and in `scale`.

        tensors: at least the weights, and biases where there are any, of the modules named. scale: (width,), positive.
        """
        down, up = scale[self.rows], scale[self.columns]
        changed = self._output(tensors, self.divided, 1 / down)
        for name in self.multiplied:
            if self.kind == "query_key":
                changed |= self._output(tensors, name, up)
            else:
                changed[f"{name}.weight"] = tensors[f"{name}.weight"] * up
        return changed

    def _output(self, tensors: Mapping[str, Tensor], module: str, factor: Tensor) -> dict[str, Tensor]:
        """The tensors of a module whose output is multiplied by `factor`, (channels,)."""
        weight = tensors[f"{module}.weight"]
        if module.endswith("_proj"):
            made = {f"{module}.weight": weight * factor[:, None]}
        else:
            made = {f"{module}.weight": (weight + self.offset) * factor.view(weight.shape) - self.offset}
        if (bias := tensors.get(f"{module}.bias")) is not None:
            made[f"{module}.bias"] = bias * factor.view(bias.shape)
        return made

    def fold(self, block: Block, scale: Tensor) -> None:
        """Rescale `block` in place, its float output staying what it was. scale: (width,) float, positive and finite.

        Raises ValueError for a scale that is not.
        """
        if scale.shape != (self.width,) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale {tuple(scale.shape)} is not {self.width} positive numbers")
        own = dict(block.named_parameters())
        with torch.no_grad():
            wide = {name: own[name].data.double() for name in self.tensors if name in own}
            for name, value in self.scaled(wide, scale.double()).items():
                own[name].data.copy_(value)

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors it may change."""
        return [f"{module}.{part}" for module in (self.divided, *self.multiplied) for part in ("weight", "bias")]

    def mean(self, values: Tensor) -> Tensor:
        """Average (channels,) values of the multiplied side over the channels that share a scale: (width,)."""
        return torch.zeros(self.width).scatter_reduce(0, self.columns, values, "mean", include_self=False)

    def most(self, values: Tensor) -> Tensor:
        """The largest of (channels,) values of the multiplied side over the channels that share a scale: (width,)."""
        return torch.zeros(self.width).scatter_reduce(0, self.columns, values, "amax", include_self=False)


def pairs(block: Block) -> list[Pair]:
    """Return the legal pairs of a block in the order of the computation; nothing of its weights is read."""
    spec = block.spec
    hidden, gated = spec.hidden_size, spec.gated_mlp
    mlp = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",)
    attn = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    every, offset = torch.arange(hidden), spec.norm.offset

    def norm(name: str, readers: tuple[str, ...]) -> Pair:
        return Pair("norm", hidden, name, readers, every, every, offset)

    found = [norm("attn_norm", attn + mlp if spec.shared_block_norm else attn)] if spec.norm_first else []
    found += [_query_key(block), _value(block)]
    if spec.norm_first and not spec.shared_block_norm:
        found.append(norm("mlp_norm", mlp))
    if gated or spec.activation == "relu":
        inner = torch.arange(spec.intermediate_size)
        found.append(Pair("inner", len(inner), "mlp.up_proj", ("mlp.down_proj",), inner, inner))
    return found


def smoothing(pair: Pair, peaks: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """SmoothQuant's scale of a pair, max |X|**alpha / max |W|**(1 - alpha): (width,).

    peaks: (in,) largest size of each input of the multiplied side; weights: its matrices, (out, in) each. Inputs that were never active are left alone.
    """
    loud = pair.most(peaks)
    heavy = pair.most(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
    scale = loud.clamp_min(_FLOOR) ** alpha / heavy.clamp_min(_FLOOR) ** (1 - alpha)
    return torch.where(loud > 0, scale, torch.ones_like(scale)).clamp_min(_FLOOR)


def _value(block: Block) -> Pair:
    spec = block.spec
    kv = torch.arange(spec.num_kv_heads * spec.head_dim)
    shared = kv.view(spec.num_kv_heads, 1, spec.head_dim)
    columns = shared.expand(-1, spec.num_heads // spec.num_kv_heads, -1).reshape(-1)
    return Pair("value", len(kv), "attn.v_proj", ("attn.o_proj",), kv, columns)


def _query_key(block: Block) -> Pair:
    """One scale per kv head and rotated pair or lone channel; one set for all heads where they share a norm's weight."""
    spec = block.spec
    turned = spec.rotary.dim if spec.rotary else 0
    half = torch.arange(turned // 2)
    channel = torch.cat([half, half, torch.arange(turned // 2, spec.head_dim - turned // 2)])
    each = spec.head_dim - turned // 2
    groups = spec.num_heads // spec.num_kv_heads
    keys = (torch.arange(spec.num_kv_heads)[:, None] * each + channel).reshape(-1)
    queries = keys.view(spec.num_kv_heads, 1, -1).expand(-1, groups, -1).reshape(-1)
    if spec.qk_norm is None:
        return Pair("query_key", spec.num_kv_heads * each, "attn.k_proj", ("attn.q_proj",), keys, queries)
    offset = spec.qk_norm.norm.offset
    if spec.qk_norm.per_head:
        return Pair("query_key", spec.num_kv_heads * each, "attn.k_norm", ("attn.q_norm",), keys, queries, offset)
    return Pair("query_key", each, "attn.k_norm", ("attn.q_norm",), channel, channel, offset)
