"""The edges of an integer decoder, by the names of docs/integer.md, and its forward pass with a hook at each of them.

The pass is that of `decoder.py` over tensors that are handed in, so that weights may be rescaled, rounded or both, with
gradients. `site(name, x)` stands for what a runner does at an edge; where it returns x, the result is the Decoder's.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.spec import AnySpec, ModelSpec, Norm
from lilliput.models.decoder import ACTIVATIONS, SCORES, rotate

PROBABILITIES = "attn.probabilities"
"""Not an edge: what `attend` multiplies values with, 16 bits for steps of 1 / 65535, 8 for steps of 1 / 255."""

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

    Raises Unsupported for an encoder.
    """
    if not isinstance(spec, ModelSpec):
        raise Unsupported(f"{spec.family} is an encoder", where="integer model", fix="Give a model that generates text")
    found = {"input": 16, "attn_norm": 8, "attn.q_proj": 8, "attn.k_proj": 8, "attn.v_proj": 8}
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
    if not spec.parallel_block:
        found["middle"] = 16
    if not spec.shared_block_norm:
        found["mlp_norm"] = 8
    if spec.gated_mlp:
        found |= {"mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.act": 8, "mlp.inner": 8}
    else:
        found |= {"mlp.up_proj": 8, "mlp.act": 8}
    found["mlp.down_proj"] = 16
    if spec.post_norms:
        found["mlp_post_norm"] = 16
    return {f"layers.{layer}.{name}": bits for name, bits in found.items()}


def sites(spec: AnySpec) -> dict[str, int]:
    """All edges of a decoder, in order of computation, to their bits by default."""
    found: dict[str, int] = {}
    for layer in range(spec.num_layers):
        found |= block_sites(spec, layer)
    return found | {"final.input": 16, "final_norm": 16, "logits": 16}


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


def run_start(spec: ModelSpec, tensors: Tensors, tokens: Tensor) -> Tensor:
    """Hidden states before the first block: (batch, length, hidden). tokens: (batch, length), at most as many as positions.

    tensors: "embed_tokens.weight" and, where positions are learned, "embed_positions.weight", by canonical name.
    """
    hidden = F.embedding(tokens, tensors["embed_tokens.weight"]) * spec.embed_scale
    if spec.position_offset is None:
        return hidden
    places = torch.arange(tokens.shape[1], device=tokens.device) + spec.position_offset
    return hidden + F.embedding(places, tensors["embed_positions.weight"])


def run_block(spec: ModelSpec, layer: int, tensors: Tensors, x: Tensor, site: Site = plain) -> Tensor:
    """What block `layer` puts out: (batch, length, hidden), before the site of whoever reads it.

    x: (batch, length, hidden), what comes in, before its site. tensors: by name in the block, "attn.q_proj.weight".
    """
    at = f"layers.{layer}."
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


def run_end(spec: ModelSpec, tensors: Tensors, x: Tensor, site: Site = plain) -> Tensor:
    """Logits of (batch, length, hidden) states behind the last block: (batch, length, vocab), soft-capped where they are.

    tensors: "final_norm.weight", "lm_head.weight" or "embed_tokens.weight", and biases, by canonical name.
    """
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


def _attention(spec: ModelSpec, layer: int, tensors: Tensors, x: Tensor, site: Site) -> Tensor:
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


def _attend(spec: ModelSpec, layer: int, heads: list[Tensor], site: Site) -> Tensor:
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
        first = max(0, start - window + 1) if window else 0
        age = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        seen = (age >= 0) & (age < window) if window else age >= 0
        scores = q[:, :, start:stop] @ k[:, :, first:stop].transpose(2, 3) * spec.attn_scale
        scores = site(f"{at}attn.scores", scores, seen)
        if cap is not None:
            scores = site(f"{at}attn.capped", torch.tanh(scores / cap) * cap, seen)
        share = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        out.append(site(f"{at}{PROBABILITIES}", share, seen) @ v[:, :, first:stop])
    return torch.cat(out, dim=2).transpose(1, 2).flatten(2)


def _mlp(spec: ModelSpec, layer: int, tensors: Tensors, x: Tensor, site: Site) -> Tensor:
    at, activate = f"layers.{layer}.mlp.", ACTIVATIONS[spec.activation]
    if not spec.gated_mlp:
        inner = site(f"{at}act", activate(site(f"{at}up_proj", _linear(tensors, "mlp.up_proj", x))))
    else:
        gate = site(f"{at}gate_proj", _linear(tensors, "mlp.gate_proj", x))
        up = site(f"{at}up_proj", _linear(tensors, "mlp.up_proj", x))
        inner = site(f"{at}inner", site(f"{at}act", activate(gate)) * up)
    return site(f"{at}down_proj", _linear(tensors, "mlp.down_proj", inner))
