"""Text that a model writes itself: rows of tokens drawn from its own distribution."""

import torch
from torch import Tensor

from lilliput.core.errors import QualityFailed
from lilliput.models.decoder import Decoder, Past

SIDE_BYTES = 1 << 28
"""Memory that rows written side by side may take; how many rows that is decides what is drawn."""
SIDE = 256
"""Rows written side by side, at most."""


def side_by_side(model: Decoder, length: int) -> int:
    """How many rows of `length` tokens are written at a time."""
    spec = model.spec
    kept = 2 * spec.num_layers * length * spec.num_kv_heads * spec.head_dim
    row = 4 * (kept + 4 * spec.vocab_size)  # keys and values; logits, what becomes of them, their sums
    return max(1, min(SIDE, SIDE_BYTES // row))


@torch.no_grad()
def write(model: Decoder, openings: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Go on from every opening until there are `length` tokens, each drawn from the model's distribution as it is.

    openings: (rows, some) int64, all rows run side by side. Returns (rows, length) int64, the openings in front.
    Raises QualityFailed where the model's logits are not finite.
    """
    tokens = torch.empty((len(openings), length), dtype=torch.int64)
    known = openings.shape[1]
    tokens[:, :known] = openings
    past, fresh = Past(length), openings
    for at in range(known, length):
        below = torch.softmax(model.follow(fresh, past).float(), -1).cumsum(-1)
        if not bool(below[:, -1].isfinite().all()):
            what = f"the model's own logits are not finite at token {at + 1} of a text it writes"
            raise QualityFailed(
                what, where=model.spec.family, fix="Check its weights; without this stage it can be coded"
            )
        place = torch.rand((len(below), 1), generator=generator) * below[:, -1:]
        fresh = torch.searchsorted(below, place, right=True).clamp_max(below.shape[1] - 1)
        tokens[:, at : at + 1] = fresh
    return tokens
