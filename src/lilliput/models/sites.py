"""The edges of an integer model, by the names of docs/integer.md, and its forward pass with a hook at each of them.

The pass is that of `decoder.py`, or of `encoder.py` for texts of one length, without padding. It is over tensors that are
handed in, so that weights may be rescaled, rounded or both, with gradients. `site(name, x)` stands for what a runner does
at an edge; where it returns x, the result is the Decoder's or the Encoder's.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec, Norm, PatchInputs
from lilliput.models.decoder import ACTIVATIONS, SCORES, rotate

PROBABILITIES = "attn.probabilities"
"""Not an edge: what `attend` multiplies values with, 16 bits for steps of 1 / 65535, 8 for steps of 1 / 255."""

WIDE = ("attn.scores", "attn.capped")
"""Ends of the names of edges that always have 16 bits."""

Tensors = Mapping[str, Tensor]


class Site(Protocol):
    """What happens at an edge."""

    def __call__(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """x: (batch, length, channels); inside attention (batch, heads, queries, keys), of which only those where
        `seen`, (queries, keys), are of any concern. Returns the same shape."""
        ...


def plain(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """The site of the float model: x."""
    return x


def block_sites(spec: AnySpec, layer: int) -> dict[str, int]:
    """Edges of one block, in order of computation, to their bits; the probabilities are among them.

    Raises Unsupported for an encoder of pictures.
    """
    refuse_pictures(spec)
    first = {"input": 16, "attn_norm": 8} if spec.norm_first else {"attn_input": 8}
    found = first | {"attn.q_proj": 8, "attn.k_proj": 8, "attn.v_proj": 8}
    if spec.qk_norm is not None:
        found |= {"attn.q_norm": 8, "attn.k_norm": 8}
    if spec.rotary is not None:
        found |= {"attn.q": 8, "attn.k": 8}
    found["attn.scores"] = 16
    if spec.attn_softcap is not None:
        found["attn.capped"] = 16
    found |= {PROBABILITIES: 16, "attn.mixed": 8, "attn.o_proj": 16}
    if spec.post_norms:
        found["attn_post_norm"] = 16
    if not spec.norm_first:
        found |= {"attn_sum": 16, "attn_post_norm": 16, "mlp_input": 8}
    elif not spec.parallel_block:
        found["middle"] = 16
    if spec.norm_first and not spec.shared_block_norm:
        found["mlp_norm"] = 8
    if spec.gated_mlp:
        found |= {"mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.act": 8, "mlp.inner": 8}
    else:
        found |= {"mlp.up_proj": 8, "mlp.act": 8}
    found["mlp.down_proj"] = 16
    if spec.post_norms:
        found["mlp_post_norm"] = 16
    if not spec.norm_first:
        found |= {"mlp_sum": 16, "mlp_post_norm": 16}
    return {f"layers.{layer}.{name}": bits for name, bits in found.items()}


def sites(spec: AnySpec) -> dict[str, int]:
    """All edges of a model, in order of computation, to their bits by default. Raises as `block_sites` does."""
    refuse_pictures(spec)
    found: dict[str, int] = {}
    if isinstance(spec, EncoderSpec):
        starts = {"embed": has_sum(spec), "embed_norm": spec.embed_norm and not spec.norm_first}
        found = {name: 16 for name, there in starts.items() if there}
    for layer in range(spec.num_layers):
        found |= block_sites(spec, layer)
    if isinstance(spec, ModelSpec):
        return found | {"final.input": 16, "final_norm": 16, "logits": 16}
    if spec.norm_first:
        found["final.input"] = 16
    ends = {"final_norm": spec.final_norm, "projection": spec.projection is not None}
    return found | {name: 16 for name, there in ends.items() if there}


def before_rotation(spec: AnySpec) -> list[str]:
    """The edges on the way from a projection to the rotation of its heads, which nothing else reads."""
    if spec.rotary is None:
        return []
    names = ("q_proj", "k_proj") if spec.qk_norm is None else ("q_proj", "k_proj", "q_norm", "k_norm")
    return [f"layers.{i}.attn.{name}" for i in range(spec.num_layers) for name in names]


def read_by(spec: AnySpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """The edges that nothing but an activation reads, to it; none behind a gate, where a product counts."""
    if spec.gated_mlp:
        return {}
    return {f"layers.{i}.mlp.up_proj": ACTIVATIONS[spec.activation] for i in range(spec.num_layers)}


def has_sum(spec: EncoderSpec) -> bool:
    """Whether the sum of embeddings is an edge of its own; otherwise it is the first block's input."""
    return spec.embed_norm or not spec.norm_first


def source_of(spec: AnySpec, linear: str) -> str:
    """The edge that a linear layer of a block reads. linear: its canonical name, "layers.0.attn.q_proj"."""
    at, part, name = linear.rsplit(".", 2)
    if name == "o_proj":
        return f"{at}.attn.mixed"
    if name == "down_proj":
        return f"{at}.mlp.inner" if spec.gated_mlp else f"{at}.mlp.act"
    if not spec.norm_first:
        return f"{at}.{part}_input"
    return f"{at}.attn_norm" if spec.shared_block_norm else f"{at}.{part}_norm"


def compared(spec: AnySpec, layer: int) -> tuple[str, str]:
    """The edges of queries and keys that a block's scores are made of."""
    at = f"layers.{layer}.attn."
    if spec.rotary is not None:
        return f"{at}q", f"{at}k"
    end = "norm" if spec.qk_norm is not None else "proj"
    return f"{at}q_{end}", f"{at}k_{end}"


def refuse_pictures(spec: AnySpec) -> None:
    """Raise Unsupported for an encoder of pictures."""
    if isinstance(spec, EncoderSpec) and isinstance(spec.inputs, PatchInputs):
        fix = "Give a model that reads text, or use methods of layers and blocks"
        raise Unsupported("an encoder of pictures has no integer graph", where=spec.family, fix=fix)


def site_policy(spec: AnySpec, overrides: Mapping[str, int]) -> dict[str, int]:
    """All edges to their bits. overrides: bits by a pattern of names such as "*.mlp.inner"; the last that matches counts.

    Raises ConfigError for a pattern that matches nothing, and for bits other than 8 and 16.
    """
    policy = sites(spec)
    for pattern, bits in overrides.items():
        found = [name for name in policy if fnmatchcase(name, pattern)]
        if not found:
            fix = "Give a name such as layers.0.mlp.inner, or *.mlp.inner for all blocks"
            raise ConfigError(f"{pattern!r} is no edge of a {spec.family} model", where="sites", fix=fix)
        if bits not in (8, 16):
            raise ConfigError(f"{pattern!r} is given {bits} bits", where="sites", fix="Give 8 or 16")
        policy |= dict.fromkeys(found, bits)
    return policy


def run_start(spec: AnySpec, tensors: Tensors, tokens: Tensor, site: Site = plain) -> Tensor:
    """Hidden states before the first block: (batch, length, hidden). tokens: (batch, length), at most as many as positions.

    tensors: "embed_tokens.weight" and, where there are any, "embed_positions.weight", "embed_types.weight" and the norm
    behind them, by canonical name. site: an encoder has edges in front of its blocks.
    """
    hidden = F.embedding(tokens, tensors["embed_tokens.weight"])
    if isinstance(spec, EncoderSpec):
        hidden = hidden + tensors["embed_positions.weight"][: tokens.shape[1]]
        if (types := tensors.get("embed_types.weight")) is not None:
            hidden = hidden + types[0]
        if has_sum(spec):
            hidden = site("embed", hidden)
        if spec.embed_norm:
            hidden = normalize(spec.norm, tensors, "embed_norm", hidden)
        return hidden if spec.norm_first or not spec.embed_norm else site("embed_norm", hidden)
    hidden = hidden * spec.embed_scale
    if spec.position_offset is None:
        return hidden
    places = torch.arange(tokens.shape[1], device=tokens.device) + spec.position_offset
    return hidden + F.embedding(places, tensors["embed_positions.weight"])


def run_block(spec: AnySpec, layer: int, tensors: Tensors, x: Tensor, site: Site = plain) -> Tensor:
    """What block `layer` puts out: (batch, length, hidden), before the site of whoever reads it; in a block whose norms
    are behind the sums the last one's site is done.

    x: (batch, length, hidden), what comes in, the same way. tensors: by name in the block, "attn.q_proj.weight".
    """
    at = f"layers.{layer}."
    if not spec.norm_first:
        attn = _attention(spec, layer, tensors, site(f"{at}attn_input", x), site)
        x = normalize(spec.norm, tensors, "attn_post_norm", site(f"{at}attn_sum", x + attn))
        x = site(f"{at}attn_post_norm", x)
        mlp = _mlp(spec, layer, tensors, site(f"{at}mlp_input", x), site)
        x = normalize(spec.norm, tensors, "mlp_post_norm", site(f"{at}mlp_sum", x + mlp))
        return site(f"{at}mlp_post_norm", x)
    x = site(f"{at}input", x)
    normed = site(f"{at}attn_norm", normalize(spec.norm, tensors, "attn_norm", x))
    attn = _attention(spec, layer, tensors, normed, site)
    if spec.post_norms:
        attn = site(f"{at}attn_post_norm", normalize(spec.norm, tensors, "attn_post_norm", attn))
    middle = x if spec.parallel_block else site(f"{at}middle", x + attn)
    if not spec.shared_block_norm:
        normed = site(f"{at}mlp_norm", normalize(spec.norm, tensors, "mlp_norm", middle))
    mlp = _mlp(spec, layer, tensors, normed, site)
    if spec.post_norms:
        mlp = site(f"{at}mlp_post_norm", normalize(spec.norm, tensors, "mlp_post_norm", mlp))
    return x + attn + mlp if spec.parallel_block else middle + mlp


def run_end(spec: AnySpec, tensors: Tensors, x: Tensor, site: Site = plain) -> Tensor:
    """Logits of (batch, length, hidden) states behind the last block: (batch, length, vocab), soft-capped where they are;
    of an encoder the vectors, (batch, embedding_size).

    tensors: "final_norm.weight", "lm_head.weight" or "embed_tokens.weight", "projection.weight", and biases, by
    canonical name.
    """
    if isinstance(spec, EncoderSpec):
        if spec.norm_first:
            x = site("final.input", x)
        if spec.final_norm:
            x = site("final_norm", normalize(spec.norm, tensors, "final_norm", x))
        if spec.projection is not None:  # of every position: without a bias it may stand on either side of the mean
            x = site("projection", _linear(tensors, "projection", x))
        return x.mean(1) if spec.pooling == "mean" else x[:, 0 if spec.pooling == "first" else -1]
    x = site("final_norm", normalize(spec.norm, tensors, "final_norm", site("final.input", x)))
    if spec.tied_head:
        logits = site("logits", F.linear(x, tensors["embed_tokens.weight"]))
    else:
        logits = site("logits", _linear(tensors, "lm_head", x))
    return logits if spec.logit_softcap is None else torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap


def normalize(norm: Norm, tensors: Tensors, name: str, x: Tensor) -> Tensor:
    """As `decoder.Normalize`, float32."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (tensors[f"{name}.weight"] + norm.offset)
    bias = tensors.get(f"{name}.bias")
    return x if bias is None else x + bias


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _attention(spec: AnySpec, layer: int, tensors: Tensors, x: Tensor, site: Site) -> Tensor:
    at = f"layers.{layer}.attn."
    q, k, v = (site(f"{at}{c}_proj", _linear(tensors, f"attn.{c}_proj", x)) for c in "qkv")
    if spec.qk_norm is not None:
        norm, width = spec.qk_norm.norm, spec.head_dim
        q, k = (
            site(
                f"{at}{c}_norm",
                normalize(norm, tensors, f"attn.{c}_norm", y.reshape(*y.shape[:-1], -1, width)).flatten(2),
            )
            for c, y in (("q", q), ("k", k))
        )

    def split(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:-1], -1, spec.head_dim)

    heads = [split(y) for y in (q, k, v)]
    if spec.rotary is not None:
        turned = rotate(heads[0], heads[1], spec.rotary)
        heads[:2] = [split(site(f"{at}{c}", y.flatten(2))) for c, y in zip("qk", turned, strict=True)]
    mixed = site(f"{at}mixed", _attend(spec, layer, heads, site))
    return site(f"{at}o_proj", _linear(tensors, "attn.o_proj", mixed))


def _attend(spec: AnySpec, layer: int, heads: list[Tensor], site: Site) -> Tensor:
    """heads: q, k, v as (batch, length, heads, head_dim); returns (batch, length, heads * head_dim).

    Scores are written out, some queries at a time, over the keys that any of them sees.
    """
    at, window, cap = f"layers.{layer}.", spec.windows[layer], spec.attn_softcap
    groups = spec.num_heads // spec.num_kv_heads
    q, *kv = (y.transpose(1, 2) for y in heads)
    k, v = (y.repeat_interleave(groups, dim=1) if groups > 1 else y for y in kv)
    batch, count, length, _ = q.shape
    step, out = max(1, SCORES // (batch * count * length)), []
    for start in range(0, length, step):
        stop = min(start + step, length)
        first, last = max(0, start - window + 1) if window else 0, stop if spec.causal else length
        age = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, last, device=q.device)
        seen = age >= (0 if spec.causal else -length)
        seen = seen & (age < window) if window else seen
        scores = q[:, :, start:stop] @ k[:, :, first:last].transpose(2, 3) * spec.attn_scale
        scores = site(f"{at}attn.scores", scores, seen)
        if cap is not None:
            scores = site(f"{at}attn.capped", torch.tanh(scores / cap) * cap, seen)
        share = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        out.append(site(f"{at}{PROBABILITIES}", share, seen) @ v[:, :, first:last])
    return torch.cat(out, dim=2).transpose(1, 2).flatten(2)


def _mlp(spec: AnySpec, layer: int, tensors: Tensors, x: Tensor, site: Site) -> Tensor:
    at, activate = f"layers.{layer}.mlp.", ACTIVATIONS[spec.activation]
    if not spec.gated_mlp:
        inner = site(f"{at}act", activate(site(f"{at}up_proj", _linear(tensors, "mlp.up_proj", x))))
    else:
        gate = site(f"{at}gate_proj", _linear(tensors, "mlp.gate_proj", x))
        up = site(f"{at}up_proj", _linear(tensors, "mlp.up_proj", x))
        inner = site(f"{at}inner", site(f"{at}act", activate(gate)) * up)
    return site(f"{at}down_proj", _linear(tensors, "mlp.down_proj", inner))
