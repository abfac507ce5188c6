"""One torch module for every family, driven by a ModelSpec alone.

Used to calibrate, train and check: whole sequences from position 0, causal; with a Past also the tokens that come next.
The keys of `state_dict()` are the canonical tensor names. Parameters take the dtype asked for; norms and rotations are
computed in float32.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.core.errors import OutOfResource, Unsupported
from lilliput.core.spec import Activation, AnySpec, EncoderActivation, ModelSpec, Norm, Rotary
from lilliput.models.origins import TensorInfo

if TYPE_CHECKING:
    from lilliput.models.checkpoint import Checkpoint

SCORES = 1 << 24
"""Attention scores written out at a time, all heads together, where a window or a soft-cap needs them written out."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

ACTIVATIONS: dict[Activation | EncoderActivation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Normalize(nn.Module):
    """core.spec.Norm over the last axis. weight: `shape`, its last axis the normalised one; bias: the same, or none."""

    def __init__(self, norm: Norm, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., *shape), any float dtype; returns the same, computed in float32."""
        y = x.float()
        if self.norm.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = (
            y
            * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm.eps)
            * (self.weight.float() + self.norm.offset)
        )
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class Past:
    """Keys and values of the tokens a model has read, so that those that follow are read without them.

    room: tokens that there is place for. count: tokens read, of sequences of one length side by side.
    """

    def __init__(self, room: int) -> None:
        self.room, self.count = room, 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what follows and return all of one layer; (batch, kv_heads, tokens, head_dim) each."""
        if layer not in self._kept:
            room = (*k.shape[:2], self.room, k.shape[3])
            self._kept[layer] = k.new_empty(room), v.new_empty(room)
        stop = self.count + k.shape[2]
        for kept, fresh in zip(self._kept[layer], (k, v), strict=True):
            kept[:, :, self.count : stop] = fresh
        keys, values = self._kept[layer]
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """Causal attention with grouped heads. `names` are the canonical tensors there are, which decides the biases."""

    def __init__(self, spec: ModelSpec, layer: int, names: Collection[str]) -> None:
        super().__init__()
        self.spec, self.layer, self.window = spec, layer, spec.windows[layer]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = _linears(spec, layer, names)[:4]
        self.q_norm, self.k_norm = (self._qk_norm(n) for n in (spec.num_heads, spec.num_kv_heads))

    def _qk_norm(self, heads: int) -> Normalize | None:
        qk, width = self.spec.qk_norm, self.spec.head_dim
        if qk is None:
            return None
        return Normalize(qk.norm, (heads, width) if qk.per_head else (width,), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden); returns the same shape."""
        q, k, v = self._heads(x, 0)
        return self._out(self._attend(q, self._alike(k), self._alike(v)).transpose(1, 2))

    def follow(self, x: Tensor, past: Past) -> Tensor:
        """As `forward`, behind the tokens of `past`, which takes these."""
        q, k, v = self._heads(x, past.count)
        k, v = past.take(self.layer, k, v)
        if x.shape[1] > 1:
            return self._out(self._attend(q, self._alike(k), self._alike(v)).transpose(1, 2))
        # The heads that share keys are queries of one head, so that the keys need no copies.
        first = max(0, k.shape[2] - self.window) if self.window else 0
        asked = q.reshape(len(q), k.shape[1], -1, self.spec.head_dim)
        mixed = self._masked(asked, k[:, :, first:], v[:, :, first:], None)
        return self._out(mixed.flatten(1, 2)[:, None])

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens from position `start`: (batch, their heads, length, head_dim) each."""
        spec = self.spec
        q = self.q_proj(x).unflatten(-1, (-1, spec.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, spec.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, spec.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rotary:
            q, k = rotate(q, k, spec.rotary, start)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _alike(self, t: Tensor) -> Tensor:
        """Keys or values once for every head that reads them."""
        groups = self.spec.num_heads // self.spec.num_kv_heads
        return t.repeat_interleave(groups, dim=1) if groups > 1 else t

    def _out(self, mixed: Tensor) -> Tensor:
        """mixed: (batch, length, heads, head_dim)."""
        out: Tensor = self.o_proj(mixed.flatten(2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (batch, heads, queries, head_dim), the last tokens of k, v: (.., length, ..); returns the shape of q."""
        batch, heads, queries, _ = q.shape
        length = k.shape[2]
        windowed = 0 < self.window < length
        if not windowed and self.spec.attn_softcap is None and queries == length:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.spec.attn_scale)
        out, behind = [], length - queries
        step = max(1, SCORES // (batch * heads * (min(2 * self.window, length) if windowed else length)))
        for start in range(behind, length, step):
            stop = min(start + step, length)
            first = max(0, start - self.window + 1) if windowed else 0
            age = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            seen = (age >= 0) & (age < self.window) if windowed else age >= 0
            asked = q[:, :, start - behind : stop - behind]
            out.append(self._masked(asked, k[:, :, first:stop], v[:, :, first:stop], seen.to(q.device)))
        return torch.cat(out, dim=2)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """seen: (queries, keys) bool; None for all. The soft-cap, where there is one, comes before the mask."""
        cap, scale = self.spec.attn_softcap, self.spec.attn_scale
        if cap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / cap)) * cap
        scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where there is no gate."""

    def __init__(self, spec: ModelSpec, layer: int, names: Collection[str]) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[spec.activation]
        *gate, self.up_proj, self.down_proj = _linears(spec, layer, names)[4:]
        self.gate_proj = gate[0] if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., hidden); returns the same shape."""
        up = self.up_proj(x)
        inner = self.activate(up) if self.gate_proj is None else self.activate(self.gate_proj(x)) * up
        out: Tensor = self.down_proj(inner)
        return out


class Block(nn.Module):
    """One layer of the decoder; positions start at 0, or behind what a Past has read."""

    spec: AnySpec
    layer: int
    attn: nn.Module
    mlp: nn.Module

    def __init__(self, spec: ModelSpec, layer: int, names: Collection[str]) -> None:
        super().__init__()
        self.spec, self.layer, self.parallel = spec, layer, spec.parallel_block
        self.attn_norm = self._norm("attn_norm", names)
        self.attn = Attention(spec, layer, names)
        self.attn_post_norm = self._norm("attn_post_norm", names) if spec.post_norms else None
        self.mlp_norm = None if spec.shared_block_norm else self._norm("mlp_norm", names)
        self.mlp = MLP(spec, layer, names)
        self.mlp_post_norm = self._norm("mlp_post_norm", names) if spec.post_norms else None

    def _norm(self, name: str, names: Collection[str]) -> Normalize:
        return Normalize(self.spec.norm, (self.spec.hidden_size,), f"layers.{self.layer}.{name}.bias" in names)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden); returns the same shape."""
        normed = self.attn_norm(x)
        return self._added(x, normed, self.attn(normed))

    def follow(self, x: Tensor, past: Past) -> Tensor:
        """As `forward`, behind the tokens of `past`, which takes these."""
        assert isinstance(self.attn, Attention), "an encoder reads its tokens together"
        normed = self.attn_norm(x)
        return self._added(x, normed, self.attn.follow(normed, past))

    def _added(self, x: Tensor, normed: Tensor, attn: Tensor) -> Tensor:
        """What comes in, and what attention and the feed-forward add to it."""
        if self.attn_post_norm is not None:
            attn = self.attn_post_norm(attn)
        if not self.parallel:
            x = x + attn
        mlp = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            mlp = self.mlp_post_norm(mlp)
        out: Tensor = x + attn + mlp if self.parallel else x + mlp
        return out

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linear layers by canonical name, in the order of ModelSpec.linears."""
        found: dict[str, nn.Linear] = {}
        for name in self.spec.linears(self.layer):
            module = self.get_submodule(name.split(".", 2)[2])
            if not isinstance(module, nn.Linear):
                raise TypeError(f"{name} was replaced by a {type(module).__name__}, which is not a Linear")
            found[name] = module
        return found


def _linears(spec: ModelSpec, layer: int, names: Collection[str]) -> list[nn.Linear]:
    """Return one block's linear layers in the order of ModelSpec.linears, a bias where `names` has one."""
    return [nn.Linear(inp, out, f"{name}.bias" in names) for name, (out, inp) in spec.linears(layer).items()]


class Decoder(nn.Module):
    """A causal decoder. `names` are the canonical tensors there are; `layers` how many blocks to build (all of them)."""

    def __init__(self, spec: ModelSpec, names: Collection[str], *, layers: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.position_offset is not None:
            self.embed_positions = nn.Embedding(spec.context + spec.position_offset, spec.hidden_size)
        count = spec.num_layers if layers is None else layers
        self.layers = nn.ModuleList(Block(spec, i, names) for i in range(count))
        self.final_norm = Normalize(spec.norm, (spec.hidden_size,), "final_norm.bias" in names)
        if not spec.tied_head:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias="lm_head.bias" in names)

    @classmethod
    def of(cls, spec: ModelSpec, state: Mapping[str, Tensor]) -> "Decoder":
        """Return the decoder that holds these tensors themselves, by canonical name."""
        with torch.device("meta"):
            decoder = cls(spec, state.keys())
        decoder.load_state_dict(state, strict=True, assign=True)
        return decoder

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape by canonical name."""
        return {name: TensorInfo(_DTYPES[t.dtype], tuple(t.shape)) for name, t in self.state_dict().items()}

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order. Registered as `layers` so that the keys of `state_dict` are the canonical names."""
        return self.layers

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """tokens: (batch, length), integer, from position `start`; returns (batch, length, hidden).

        Raises OutOfResource for a sequence longer than the table of learned positions.
        """
        hidden: Tensor = self.embed_tokens(tokens)
        if self.spec.embed_scale != 1.0:
            hidden = hidden * self.spec.embed_scale
        if self.spec.position_offset is None:
            return hidden
        length = start + tokens.shape[-1]
        if length > self.spec.context:
            what = f"a sequence of {length} tokens, and positions are learned for {self.spec.context}"
            raise OutOfResource(what, where=self.spec.family, fix=f"Use at most {self.spec.context} tokens")
        places = torch.arange(start, length, device=tokens.device) + self.spec.position_offset
        at: Tensor = self.embed_positions(places)
        return hidden + at

    def finish(self, hidden: Tensor) -> Tensor:
        """hidden: (.., hidden); returns logits (.., vocab)."""
        hidden = self.final_norm(hidden)
        logits: Tensor = F.linear(hidden, self.embed_tokens.weight) if self.spec.tied_head else self.lm_head(hidden)
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, length), integer; returns logits (batch, length, vocab)."""
        hidden = self.embed(tokens)
        for block in self.layers:
            hidden = block(hidden)
        return self.finish(hidden)

    def follow(self, tokens: Tensor, past: Past) -> Tensor:
        """Read the tokens behind those of `past`, (batch, length); return the logits of the last ones, (batch, vocab)."""
        hidden = self.embed(tokens, past.count)
        for block in self.layers:
            hidden = block.follow(hidden, past)  # type: ignore[operator]
        past.count += tokens.shape[1]
        return self.finish(hidden[:, -1])


def rotate(q: Tensor, k: Tensor, rotary: Rotary, start: int = 0) -> tuple[Tensor, Tensor]:
    """Turn q and k, (batch, length, heads, head_dim), by their positions start, start + 1, ..; the angles are float32."""
    freqs = torch.tensor(rotary.inv_freq, dtype=torch.float32, device=q.device)
    angle = torch.arange(start, start + q.shape[1], dtype=torch.float32, device=q.device)[:, None] * freqs
    cos, sin = (rotary.scale * part[:, None, :] for part in (angle.cos(), angle.sin()))  # (length, 1, dim / 2)

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., : rotary.dim].float().chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        return torch.cat((turned, x[..., rotary.dim :]), dim=-1)

    return turn(q), turn(k)


def load_block(checkpoint: "Checkpoint", index: int, dtype: torch.dtype = torch.float32) -> Block:
    """Return block `index` with its weights in `dtype`. Raises as `Checkpoint.read` does."""
    names = checkpoint.names()
    with torch.device("meta"):
        block = Block(_spec(checkpoint), index, names)
    prefix = f"layers.{index}."
    fill(block, checkpoint, [(n.removeprefix(prefix), n) for n in names if n.startswith(prefix)], dtype)
    return block


def load_ends(checkpoint: "Checkpoint", dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder without blocks: embeddings, final norm and head, in `dtype`."""
    names = checkpoint.names()
    with torch.device("meta"):
        decoder = Decoder(_spec(checkpoint), names, layers=0)
    fill(decoder, checkpoint, [(n, n) for n in names if not n.startswith("layers.")], dtype)
    return decoder


def load_decoder(checkpoint: "Checkpoint", dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the whole decoder in `dtype`."""
    decoder = load_ends(checkpoint, dtype)
    for index in range(checkpoint.spec.num_layers):
        decoder.layers.append(load_block(checkpoint, index, dtype))
    return decoder


def _spec(checkpoint: "Checkpoint") -> ModelSpec:
    if not isinstance(checkpoint.spec, ModelSpec):
        fix = "Give a model that generates text"
        raise Unsupported(f"a {checkpoint.spec.family} encoder has no decoder", where=str(checkpoint.folder), fix=fix)
    return checkpoint.spec


def fill(module: nn.Module, checkpoint: "Checkpoint", names: list[tuple[str, str]], dtype: torch.dtype) -> None:
    """Give a module built on the meta device its parameters. names: (key in the module, canonical name)."""
    state = {key: checkpoint.read(name).to(dtype) for key, name in names}
    module.load_state_dict(state, strict=True, assign=True)
