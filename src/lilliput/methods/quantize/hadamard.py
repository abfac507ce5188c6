"""Hadamard rotations: the same model in another basis, in which no weight and no activation stands out.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section 4, stages 1a and 1b
without what runs online; the fold of layer norms is Ashkboos et al., "SliceGPT", 2024, section 3.2.
Deviation: nothing is rotated while the model runs (QuaRot's maps before down_proj and on queries and keys), since that
costs time at every token: the inputs of down_proj keep their outliers. The heads' maps have signs of their own for every
key-value head. Sizes without a Hadamard matrix get one times a random orthogonal matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.spec import ModelSpec
from lilliput.methods.base import ModelMethod
from lilliput.models import Decoder, TensorInfo
from lilliput.numerics.hadamard import Rotation

if TYPE_CHECKING:
    from lilliput.data.streams import Batches

SLICE = 1 << 12
"""Rows rewritten in float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class Hadamard(ModelMethod):
    """Rotate the residual stream (`hidden`) and what the heads hand on (`heads`), with signs drawn from `seed`.

    `hidden` folds every norm's weight, mean and bias into its neighbours, so a tied head becomes a matrix of its own.
    """

    hidden: bool = True
    heads: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.hidden or self.heads):
            raise ConfigError("it rotates nothing", where="hadamard", fix="Set hidden or heads, or leave it out")

    @property
    def reads_text(self) -> bool:
        """Never."""
        return False

    def respec(self, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> tuple[ModelSpec, Mapping[str, TensorInfo]]:
        """With `hidden`: an untied head, rms norms, and biases where a norm with a bias is read.

        Raises Unsupported where a norm stands between a writer and the residual stream.
        """
        if not self.hidden:
            return spec, tensors
        if spec.post_norms:
            what = f"{spec.family} has norms behind its writers, which do not commute with a rotation"
            raise Unsupported(what, where="hadamard.hidden", fix="Set hidden: false to rotate the heads alone")
        made = dict(tensors)
        made.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
        for norm, readers in readers_of(spec):
            if made.pop(f"{norm}.bias", None):
                for name in readers:
                    made.setdefault(f"{name}.bias", TensorInfo("F32", made[f"{name}.weight"].shape[:1]))
        rms = spec.norm.model_copy(update={"kind": "rms"})
        return spec.model_copy(update={"tied_head": False, "norm": rms}), made

    @torch.no_grad()
    def apply(self, model: Decoder, batches: "Batches | None") -> Decoder:
        """Return the model in its new basis, its logits what they were; see `ModelMethod.apply`."""
        spec, _ = self.respec(model.spec, model.tensors())
        state: dict[str, Tensor] = dict(model.state_dict())
        generator = torch.Generator().manual_seed(self.seed)
        if self.hidden:
            if model.spec.tied_head:
                state["lm_head.weight"] = state["embed_tokens.weight"].clone()
            for norm, readers in readers_of(model.spec):
                fold_norm(state, norm, readers, model.spec.norm.offset)
            turn_hidden(state, model.spec, Rotation.draw(spec.hidden_size, generator))
        if self.heads:
            for layer in range(spec.num_layers):
                turn_heads(state, spec, layer, generator)
        return Decoder.of(spec, state)


def readers_of(spec: ModelSpec) -> Iterator[tuple[str, list[str]]]:
    """Every norm on the residual stream, with the linear layers that read what it puts out."""
    for layer in range(spec.num_layers):
        base = f"layers.{layer}"
        attn = [f"{base}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        mlp = [f"{base}.mlp.{name}" for name in (("gate_proj", "up_proj") if spec.gated_mlp else ("up_proj",))]
        yield f"{base}.attn_norm", attn + (mlp if spec.shared_block_norm else [])
        if not spec.shared_block_norm:
            yield f"{base}.mlp_norm", mlp
    yield "final_norm", ["lm_head"]


def fold_norm(state: dict[str, Tensor], norm: str, readers: list[str], offset: float) -> None:
    """Move a norm's weight and bias into its readers: W (g x + b) = (W g) x + W b; the norm keeps a weight of one."""
    weight = state[f"{norm}.weight"]
    gain, bias = weight.double() + offset, state.pop(f"{norm}.bias", None)
    for name in readers:
        matrix = state[f"{name}.weight"]
        if bias is not None:
            added = torch.cat([part @ bias.double() for _, part in slices(matrix)])
            before = state.get(f"{name}.bias")
            state[f"{name}.bias"] = (added if before is None else added + before).to(matrix.dtype)
        rewrite(matrix, lambda part: part * gain)
    weight.fill_(1 - offset)


def turn_hidden(state: dict[str, Tensor], spec: ModelSpec, rotation: Rotation) -> None:
    """Rotate all that reads from or writes to the residual stream, whose norms hold no weights any more.

    Under layer norms the mean of what a writer adds is taken off first: it never reaches a reader.
    """
    layered = spec.norm.kind == "layer"

    def written(part: Tensor) -> Tensor:  # (.., hidden)
        return rotation.right(part - part.mean(-1, keepdim=True) if layered else part)

    for _, readers in readers_of(spec):
        for name in readers:
            rewrite(state[f"{name}.weight"], rotation.right)
    for name in ("embed_tokens.weight", "embed_positions.weight"):
        if name in state:
            rewrite(state[name], written)
    for layer in range(spec.num_layers):
        for name in (f"layers.{layer}.attn.o_proj", f"layers.{layer}.mlp.down_proj"):
            rewrite(state[f"{name}.weight"].T, written)
            if f"{name}.bias" in state:
                rewrite(state[f"{name}.bias"][None], written)


def turn_heads(state: dict[str, Tensor], spec: ModelSpec, layer: int, generator: torch.Generator) -> None:
    """Rotate what every key-value head of a layer puts out, and undo it where its query heads are read."""
    base, width, group = f"layers.{layer}.attn", spec.head_dim, spec.num_heads // spec.num_kv_heads
    values, outputs = state[f"{base}.v_proj.weight"], state[f"{base}.o_proj.weight"]
    bias = state.get(f"{base}.v_proj.bias")
    for head in range(spec.num_kv_heads):
        rotation = Rotation.draw(width, generator)
        rows = slice(head * width, (head + 1) * width)
        rewrite(values[rows].T, rotation.right)
        if bias is not None:
            rewrite(bias[None, rows], rotation.right)
        for query in range(head * group, (head + 1) * group):
            rewrite(outputs[:, query * width : (query + 1) * width], rotation.right)


def rewrite(matrix: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every row by what `change`, given float64 rows, makes of it."""
    for place, part in slices(matrix):
        place.copy_(change(part))


def slices(matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: a view of them, and a float64 copy."""
    for start in range(0, matrix.shape[0], SLICE):
        place = matrix[start : start + SLICE]
        yield place, place.to(torch.float64)
