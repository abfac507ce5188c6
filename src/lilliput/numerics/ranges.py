"""Where the levels of a uniform grid should end: ranges inside that of the weights, searched group by group (needs torch).

A level at the largest weight serves one weight. Drawing both ends in costs the few weights outside and serves all others
with a finer step; how far is found by trying.

Source: Zhang and Shrivastava, "LeanQuant", ICLR 2025, section 3.3 (ends drawn in independently, errors weighted by
importance).
Deviation: a coarse search over both ends, then around the best, instead of all pairs; all widths of a ladder count.
"""

import torch
from torch import Tensor

from lilliput.numerics.columns import balance_shares
from lilliput.numerics.grids import grouped, span_grid

_COARSE = 12  # parts of the range an end is drawn in by
_MOST = 6  # parts at most, an end
_FINER = 2  # times the step is halved around the best
_CHUNK = 1 << 18  # weights tried at once: small enough to stay in the cache


def best_range(
    weight: Tensor,
    bits: tuple[int, ...],
    group_size: int,
    sym: bool,
    importance: Tensor,
    balance: float,
    square: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The grid of bits[-1] with the least weighted squared error: (scale, zero) as `minmax_grid` returns them.

    weight: (out, in) float32. importance: (in,) float32, not negative. bits: with several, a narrower width is the top
    bits on its least-squares grid, and errors are summed over the widths with the shares of `balance_shares`, the errors
    of the whole range deciding. sym: both ends are drawn in alike from [-max|w|, max|w|]. square: try all pairs of ends in
    the coarse search, not only those drawn in alike, which takes four times as long.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    ends = [_search(part, bits, group_size, sym, importance, balance, square) for part in weight.split(rows)]
    return span_grid(torch.cat([e[0] for e in ends]), torch.cat([e[1] for e in ends]), bits[-1], sym)


def _search(
    weight: Tensor, bits: tuple[int, ...], group_size: int, sym: bool, importance: Tensor, balance: float, square: bool
) -> tuple[Tensor, Tensor]:
    full, mask = grouped(weight, group_size)
    importance = importance.to(torch.float32) / importance.max().clamp_min(1e-30)
    share = grouped(importance[None], group_size)[0][0] * mask
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, mask.to(torch.float32))
    if sym:
        high = full.abs().amax(-1)
        low = -high
    else:
        low = full.masked_fill(~mask, torch.inf).amin(-1)
        high = full.masked_fill(~mask, -torch.inf).amax(-1)
    span = high - low
    total = share.sum(-1)
    mean = torch.zeros_like(low) if sym else torch.einsum("ogs,gs->og", full, share) / total
    centred = (full - mean[..., None]) * share
    energy = torch.einsum("ogs,ogs->og", centred, full - mean[..., None])
    widest = bits[-1]

    def errors(left: Tensor, right: Tensor) -> Tensor:
        """Weighted squared errors of rounding to a range, by group and width: (out, groups, widths)."""
        begin = (low + left * span)[..., None]
        step = ((high - right * span)[..., None] - begin).div_(2**widest - 1).clamp_min_(1e-30)
        code = ((full - begin) / step).round_().clamp_(0, 2**widest - 1)
        found = [torch.einsum("ogs,gs->og", (code * step + begin).sub_(full).square_(), share)]
        for b in reversed(bits[:-1]):
            x = (code / 2 ** (widest - b)).floor_().sub_((2**b - 1) / 2)
            if not sym:
                x -= (torch.einsum("ogs,gs->og", x, share) / total)[..., None]
            product = torch.einsum("ogs,ogs->og", centred, x)
            spread = torch.einsum("ogs,gs->og", x.square_(), share)
            found.append(energy - product.clamp_min(0).square() / spread.clamp_min(1e-30))
        return torch.stack(found[::-1], -1).clamp_min_(0)

    left, right = torch.zeros_like(low), torch.zeros_like(low)
    whole = errors(left, right)  # (out, groups, widths)
    shares = balance_shares(whole.sum(1), balance)[:, None, :]
    least = (whole * shares).sum(-1)

    def attempt(new_left: Tensor, new_right: Tensor) -> None:
        nonlocal left, right, least
        score = (errors(new_left, new_right) * shares).sum(-1)
        better = score < least
        left, right = torch.where(better, new_left, left), torch.where(better, new_right, right)
        least = torch.minimum(score, least)

    for i in range(_MOST):
        for j in range(_MOST) if square and not sym else (i,):
            if i or j:
                attempt(torch.full_like(low, i / _COARSE), torch.full_like(low, j / _COARSE))
    step = 1 / _COARSE
    for _ in range(_FINER):
        step /= 2
        at_left, at_right = left, right
        for i in (-1, 0, 1):
            for j in (i,) if sym else (-1, 0, 1):
                if i or j:
                    attempt((at_left + i * step).clamp_min(0), (at_right + j * step).clamp_min(0))
    return low + left * span, high - right * span
