"""The torch module of an EncoderSpec: texts or pictures in, one vector each out.

Rows of a batch are as long as the longest; behind a shorter one stands padding, and a padded position is a row of zeros
in every hidden state. A block finds its padding by that, hides it from the attention, and puts zeros there at the input
of every linear layer and at its own output. So whatever gathers statistics of inputs, compares outputs or keeps hidden
states needs to know nothing of padding: zeros add nothing to a norm, a Gram matrix or a squared error.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.core.errors import OutOfResource
from lilliput.core.spec import PADDING, AnySpec, EncoderSpec, PatchInputs
from lilliput.models.decoder import ACTIVATIONS, Block, Normalize, fill

if TYPE_CHECKING:
    from lilliput.models.checkpoint import Checkpoint

Rows = Callable[[Tensor], Tensor]


class EncoderAttention(nn.Module):
    """Attention over all positions that hold something, or with `causal` those up to the own one."""

    def __init__(self, spec: EncoderSpec, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linears

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden), rows of zeros on padding, which stands behind the rest."""
        seen = _seen(x)
        heads = (proj(x).unflatten(-1, (-1, self.spec.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in heads)
        mask = seen.transpose(1, 2)[:, None]
        if self.spec.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.spec.head_dim**-0.5)
        out: Tensor = self.o_proj(_kept(mixed.transpose(1, 2).flatten(2), seen))
        return out


class EncoderMLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, spec: EncoderSpec, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[spec.activation]
        self.up_proj, self.down_proj = linears

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden), rows of zeros on padding; returns x's shape."""
        out: Tensor = self.down_proj(_kept(self.activate(self.up_proj(x)), _seen(x)))
        return out


class EncoderBlock(Block):
    """One layer of the encoder, with the canonical names and the `linears()` of a decoder's block."""

    def __init__(self, spec: EncoderSpec, layer: int, names: Collection[str]) -> None:
        nn.Module.__init__(self)  # a decoder's block has other parts
        self.spec, self.layer, self.first = spec, layer, spec.norm_first
        made = [nn.Linear(inp, out, f"{name}.bias" in names) for name, (out, inp) in spec.linears(layer).items()]
        for part in ("attn", "mlp"):
            setattr(self, f"{part}_{'norm' if self.first else 'post_norm'}", self._norm(_norm_of(part, spec), names))
        self.attn = EncoderAttention(spec, made[:4])
        self.mlp = EncoderMLP(spec, made[4:])

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden), rows of zeros where there is padding; returns the same."""
        seen = _seen(x)
        for part, layer in (("attn", self.attn), ("mlp", self.mlp)):
            norm = self.get_submodule(_norm_of(part, self.spec))
            x = x + layer(_kept(norm(x), seen)) if self.first else norm(x + layer(x))
            x = _kept(x, seen)
        return x


class _Vector(nn.Module):
    """A parameter under the name of a module, (size,)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Encoder(nn.Module):
    """An encoder. `names` are the canonical tensors there are; `layers` how many blocks to build (all of them)."""

    def __init__(self, spec: EncoderSpec, names: Collection[str], *, layers: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.hidden_size
        if isinstance(spec.inputs, PatchInputs):
            self.embed_patches = nn.Linear(spec.inputs.columns, hidden, bias=False)
            self.embed_class = _Vector(hidden)
        else:
            self.embed_tokens = nn.Embedding(spec.inputs.vocab_size, hidden)
            self.embed_types = nn.Embedding(spec.inputs.types, hidden) if spec.inputs.types else None
        self.embed_positions = nn.Embedding(spec.context, hidden)
        self.embed_norm, self.final_norm = (
            Normalize(spec.norm, (hidden,), f"{name}.bias" in names) if there else None
            for name, there in (("embed_norm", spec.embed_norm), ("final_norm", spec.final_norm))
        )
        count = spec.num_layers if layers is None else layers
        self.layers = nn.ModuleList(EncoderBlock(spec, i, names) for i in range(count))
        self.projection = nn.Linear(hidden, spec.projection, bias=False) if spec.projection else None

    @classmethod
    def of(cls, spec: EncoderSpec, state: Mapping[str, Tensor]) -> "Encoder":
        """Return the encoder that holds these tensors themselves, by canonical name."""
        with torch.device("meta"):
            encoder = cls(spec, state.keys())
        encoder.load_state_dict(state, strict=True, assign=True)
        return encoder

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.layers

    def embed(self, inputs: Tensor, rows: Rows | None = None) -> Tensor:
        """Hidden states in front of the first block, (batch, positions, hidden), zeros on padding.

        inputs: texts, (batch, length) integer ids with PADDING behind the shorter ones; or pictures, (batch, patches,
        columns) float32. rows: a function from row numbers to those rows of the first matrix, in its place.
        Raises OutOfResource for a text longer than there are positions.
        """
        if isinstance(self.spec.inputs, PatchInputs):
            every = torch.arange(self.spec.hidden_size)
            hidden = F.linear(inputs, self.embed_patches.weight if rows is None else rows(every))
            front = self.embed_class.weight.expand(len(inputs), 1, -1)
            hidden = torch.cat([front, hidden], dim=1)
            seen = torch.ones(1, 1, 1, dtype=torch.bool, device=inputs.device)
        else:
            length = inputs.shape[1]
            if length > self.spec.context:
                what = f"a text of {length} tokens, and positions are learned for {self.spec.context}"
                raise OutOfResource(what, where=self.spec.family, fix=f"Use at most {self.spec.context} tokens")
            seen = (inputs != PADDING)[..., None]
            unique, inverse = torch.unique(inputs.clamp(min=0), return_inverse=True)
            table = self.embed_tokens.weight[unique] if rows is None else rows(unique)
            hidden = table[inverse]
            if self.embed_types is not None:
                hidden = hidden + self.embed_types.weight[0]
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        return _kept(hidden if self.embed_norm is None else self.embed_norm(hidden), seen)

    def finish(self, hidden: Tensor) -> Tensor:
        """hidden: (batch, positions, hidden); returns (batch, embedding_size), of no particular length."""
        seen = _seen(hidden)
        hidden = hidden if self.final_norm is None else self.final_norm(hidden)
        count = seen.sum(1)
        if self.spec.pooling == "mean":
            pooled = _kept(hidden, seen).sum(1) / count
        else:
            at = torch.zeros_like(count[:, 0]) if self.spec.pooling == "first" else count[:, 0] - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), at]
        out: Tensor = pooled if self.projection is None else self.projection(pooled)
        return out

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: as in `embed`; returns (batch, embedding_size)."""
        hidden = self.embed(inputs)
        for block in self.layers:
            hidden = block(hidden)
        return self.finish(hidden)


def _norm_of(part: str, spec: AnySpec) -> str:
    return f"{part}_norm" if spec.norm_first else f"{part}_post_norm"


def _seen(x: Tensor) -> Tensor:
    """Where (batch, length, hidden) holds something, which it does not on padding: (batch, length, 1) bool."""
    return (x != 0).any(-1, keepdim=True)


def _kept(x: Tensor, seen: Tensor) -> Tensor:
    return x.masked_fill(~seen, 0.0)


def load_encoder_block(checkpoint: "Checkpoint", index: int, dtype: torch.dtype = torch.float32) -> EncoderBlock:
    """Return block `index` with its weights in `dtype`. Raises as `Checkpoint.read` does."""
    spec, names, prefix = _spec(checkpoint), checkpoint.names(), f"layers.{index}."
    with torch.device("meta"):
        block = EncoderBlock(spec, index, names)
    fill(block, checkpoint, [(n.removeprefix(prefix), n) for n in names if n.startswith(prefix)], dtype)
    return block


def load_encoder(checkpoint: "Checkpoint", dtype: torch.dtype = torch.float32) -> Encoder:
    """Return the whole encoder in `dtype`. Raises as `Checkpoint.read` does."""
    names = checkpoint.names()
    with torch.device("meta"):
        encoder = Encoder(_spec(checkpoint), names)
    fill(encoder, checkpoint, [(name, name) for name in names], dtype)
    return encoder


def _spec(checkpoint: "Checkpoint") -> EncoderSpec:
    assert isinstance(checkpoint.spec, EncoderSpec), "the caller has looked"
    return checkpoint.spec
