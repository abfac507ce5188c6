"""Uniform grids: where the levels stand, which level a weight takes, what the narrower widths make of it (needs torch).

A grid of b bits has the levels scale * (c - (2**b - 1) / 2 - zero), c = 0 .. 2**b - 1; see docs/architecture.md. Scales
and zeros are rounded first and codes chosen for the rounded grid, so what is stored is what was meant: to float16 where a
row is one group, else to what a byte each can say, which is a float16 too (numerics/packing.py, docs/artifact.md).

Source for the refit of narrower widths: weighted least squares of the weight on the truncated code, the affine form of
the per-width centroids of Park et al., "Any-Precision LLM", ICML 2024 (section 3.2: a centroid is the mean of its
members; an affine table is its least-squares line). That all widths may share one grid, with a ratio a row, is ours.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.core.errors import ConfigError
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import RATIO_ONE, SCALE_TOP, UNIT_LEAST, UNIT_MOST, ZERO_BITS, zero_step

F16_MAX = 65504.0
F16_MIN = 2.0**-24
FLAT = 2.0**-14
"""Step of a shared grid's narrowest width on equal weights, in parts of them, in rows of one group: the zero is 2**14."""


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of `columns`; the last may be shorter. -1 is one group."""
    return 1 if group_size == -1 else -(-columns // group_size)


def grouped(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(out, in) to (out, groups, size) with the short tail padded, and the (groups, size) mask of real entries."""
    out, columns = values.shape
    size = columns if group_size == -1 else group_size
    groups = group_count(columns, group_size)
    full = pad(values, (0, groups * size - columns)).view(out, groups, size)
    mask = (torch.arange(groups * size, device=values.device) < columns).view(groups, size)
    return full, mask


def minmax_grid(weight: Tensor, bits: int, group_size: int, sym: bool) -> tuple[Tensor, Tensor | None]:
    """Levels that span each group: (scale, zero), each (out, groups) float16; zero is None when `sym`.

    weight: (out, in) float32, finite. Symmetric levels span [-max|w|, max|w|], others [min w, max w], but for rounding.
    Raises ConfigError when a scale is beyond float16.
    """
    full, mask = grouped(weight, group_size)
    if sym:
        reach = full.abs().amax(-1)
        return span_grid(-reach, reach, bits, sym)
    low = full.masked_fill(~mask, torch.inf).amin(-1)
    return span_grid(low, full.masked_fill(~mask, -torch.inf).amax(-1), bits, sym)


def span_grid(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor | None]:
    """Levels from `low` to `high`, each (out, groups) float32: (scale, zero) as `minmax_grid` returns them.

    sym: -low equals high. Raises ConfigError when a scale is beyond float16.
    """
    if sym:
        return stored_scale(high * (2 / (2**bits - 1))), None
    middle = (high + low) / 2
    flat = high == low
    # Equal weights span nothing. Steps of twice their size put a level, half a step from the middle, on their value.
    scale = torch.where(flat, 2 * middle.abs(), (high - low) / (2**bits - 1))
    return offset_grid(scale, torch.where(flat, torch.zeros_like(middle), middle), bits)


def half_scale(scale: Tensor) -> Tensor:
    """Round steps to float16, none of them to zero. Raises ConfigError when one is beyond float16."""
    _refuse_beyond_half(scale)
    return _half(scale)


def _refuse_beyond_half(scale: Tensor) -> None:
    if bool((scale > F16_MAX).any()):
        what = f"weights need a step of {float(scale.max()):.3g}, beyond float16"
        raise ConfigError(what, where="scale", fix="Exclude this layer from quantization")


def _half(scale: Tensor) -> Tensor:
    # A step below the smallest float16 is widened to it: the group then uses fewer levels, but it is not lost.
    return torch.where(scale > 0, scale.clamp_min(F16_MIN), scale).to(torch.float16)


def in_bytes(groups: int) -> bool:
    """Whether scales and zeros of a matrix with so many groups a row are kept to what bytes can say."""
    return groups > 1


def row_units(scale: Tensor) -> Tensor:
    """What the bytes of a row's scales count: (out, 1) float32, the least powers of two that reach the largest of a row.

    scale: (out, groups).
    """
    mantissa, exponent = torch.frexp(scale.detach().to(torch.float64).amax(1, keepdim=True) / SCALE_TOP)
    power = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(UNIT_LEAST, UNIT_LEAST + UNIT_MOST)
    return torch.ldexp(torch.ones_like(mantissa, dtype=torch.float32), power)


def byte_scale(scale: Tensor, unit: Tensor) -> Tensor:
    """The nearest scale that a byte says, none of them zero but those that are: float32. unit: of its row."""
    number = scale.to(torch.float32) / unit
    step = 1.0 + (number >= 128) + 2.0 * (number >= 256)
    near = (number / step).round().mul_(step).clamp_(1, SCALE_TOP).mul_(unit)
    return torch.where(scale > 0, near, torch.zeros_like(near))


def byte_zero(zero: Tensor, bits: int) -> Tensor:
    """The nearest zero of a grid of `bits` bits that a byte says: float32."""
    step, half = zero_step(bits), 1 << ZERO_BITS - 1
    return (zero.to(torch.float32) / step).round().clamp(-half, half - 1) * step


def stored_scale(scale: Tensor) -> Tensor:
    """Round steps (out, groups) to what is stored, none of them to zero: float16. Raises ConfigError beyond float16."""
    _refuse_beyond_half(scale)
    return near_scale(scale)


def near_scale(scale: Tensor) -> Tensor:
    """As `stored_scale`, for steps that are on their way: what is beyond float16 is refused when it is stored."""
    return byte_scale(scale, row_units(scale)).to(torch.float16) if in_bytes(scale.shape[1]) else _half(scale)


def stored_zero(zero: Tensor, bits: int) -> Tensor:
    """Round zeros (out, groups) of a grid of `bits` bits to what is stored: float16."""
    if in_bytes(zero.shape[1]):
        return byte_zero(zero, bits).to(torch.float16)
    return zero.clamp(-F16_MAX, F16_MAX).to(torch.float16)


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, which has no gradient, with the gradient of x, in its dtype."""
    return x + (rounded.to(x.dtype) - x.detach())


def furthest(bits: int, groups: int) -> float:
    """How far, in steps of a grid of `bits` bits, its middle may be from 0 for the zero to be stored."""
    return 2 ** (bits - 1) * (1 - 2.0**-6) if in_bytes(groups) else 60000.0  # a scale may be rounded down by a 128th


def offset_grid(scale: Tensor, middle: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a grid of `bits` bits centred on `middle` to the scale and zero that are stored, float16.

    All (out, groups). A step tiny beside its offset is widened until there is a zero for it; with several groups a row
    that is where 0 is beyond the grid.
    """
    kept = stored_scale(torch.maximum(scale, middle.abs() / furthest(bits, scale.shape[1])))
    used = kept.to(torch.float32)
    zero = torch.where(used > 0, -middle / used, torch.zeros_like(used))
    return kept, stored_zero(zero, bits)


def flat_grid(value: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Step of width `first` and middle of a shared grid for groups of one value each: (out, groups) float32.

    Where a zero may be anything, a step so small that all levels are on the value. Else the levels of a width and of the
    next wider one are an eighth of a step from it, a 29th of the value at 2 and 3 bits, and those beyond have it.
    """
    if not in_bytes(value.shape[1]):
        return value.abs() * FLAT, value
    away, here = 2 ** (first - 1) * (1 - 2.0**-6), 2 ** (first - 1) - 3 / 8
    step = value.abs() / (away + here)
    return step, value.sign() * step * away


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Codes of the nearest levels: (out, in) uint8. Ties go to the even code; a zero scale gives the middle code."""
    out, columns = weight.shape
    step = scale.to(torch.float32)
    code = grouped(weight, group_size)[0] / torch.where(step > 0, step, torch.ones_like(step))[..., None]
    shift = (2**bits - 1) / 2 + (zero.to(torch.float32) if zero is not None else torch.zeros_like(step))
    codes = code.add_(shift[..., None]).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes.view(out, -1)[:, :columns].contiguous()


class Refit:
    """Least-squares grids for given codes of one matrix; what all widths share is computed once.

    weight: (out, in) float32. importance: weights of the squared errors, (in,) for all rows or (out, in), or None for
    equal ones; where all of a group's are zero they count as equal.
    """

    def __init__(self, weight: Tensor, group_size: int, importance: Tensor | None = None) -> None:
        w, mask = grouped(weight, group_size)
        share = mask.to(torch.float32)
        if importance is not None:
            given = importance.to(torch.float32)
            own = share * (
                grouped(given[None], group_size)[0][0] if given.dim() == 1 else grouped(given, group_size)[0]
            )
            share = torch.where(own.sum(-1, keepdim=True) > 0, own, share)
        self._share = share / share.sum(-1, keepdim=True)
        self._axes = "gs" if self._share.dim() == 2 else "ogs"
        self._group_size = group_size
        self._mean = torch.einsum(f"ogs,{self._axes}->og", w, self._share)
        # Centred before it meets the codes: a group far from zero would lose its shape to rounding in sums of w * x.
        self._centred = (w - self._mean[..., None]).mul_(self._share)

    def grid(self, codes: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor | None]:
        """Scale and zero for codes (out, in) of `bits` bits: (out, groups) float16 each; zero is None when `sym`.

        Groups whose codes are all one level get a grid with that level on their mean.
        """
        x = grouped(codes.to(torch.float32).sub_((2**bits - 1) / 2), self._group_size)[0]
        mean_x = torch.einsum(f"ogs,{self._axes}->og", x, self._share)
        x = x.sub_(mean_x[..., None])
        product = torch.einsum("ogs,ogs->og", self._centred, x)
        variance = torch.einsum(f"ogs,{self._axes}->og", x.square_(), self._share)
        if sym:  # the plain moments from the centred ones
            moment, square = product + self._mean * mean_x, variance + mean_x.square()
            return stored_scale((moment / square.clamp_min(1e-30)).clamp_min(0)), None
        flat = variance < 1e-9 * (1 + mean_x.square())  # above what is left of one level after rounding
        slope = torch.where(flat, torch.zeros_like(product), product / variance.clamp_min(1e-30)).clamp_min(0)
        # The scale is rounded before the offset is derived, so its rounding error does not move the mean of the group.
        kept = stored_scale(slope).to(torch.float32)
        kept = torch.where(kept == 0, 2 * self._mean.abs(), kept)
        return offset_grid(kept, self._mean - kept * mean_x, bits)


def nest(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: tuple[int, ...],
    group_size: int,
    importance: Tensor | None = None,
    shared: bool = False,
) -> Quantized:
    """A nested store from the widest grid: its top bits are the narrower codes, each with its own refit.

    codes, scale, zero: the grid of bits[-1]. weight, importance: as in `Refit`. shared: one grid a group serves all
    widths, with ratios that are refitted, and codes are chosen anew for what that grid is at the widest.
    """
    if shared and len(bits) > 1:
        return _share(weight, codes, scale, zero, bits, group_size, importance)
    widest = bits[-1]
    fit = Refit(weight, group_size, importance) if len(bits) > 1 else None
    scales, zeros = {widest: scale}, {} if zero is None else {widest: zero}
    for width in bits[:-1]:
        assert fit is not None, "there is more than one width"
        s, z = fit.grid(codes >> (widest - width), width, zero is None)
        scales[width] = s
        if z is not None:
            zeros[width] = z
    return Quantized(codes, bits, group_size, scales, zeros)


def _share(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: tuple[int, ...],
    group_size: int,
    importance: Tensor | None,
) -> Quantized:
    first, widest = bits[0], bits[-1]
    columns = weight.shape[1]
    step = scale.to(torch.float32) * 2 ** (widest - first)
    middle = torch.zeros_like(step) if zero is None else -scale.to(torch.float32) * zero.to(torch.float32)
    if zero is not None:
        full, mask = grouped(weight, group_size)
        low, high = full.masked_fill(~mask, torch.inf).amin(-1), full.masked_fill(~mask, -torch.inf).amax(-1)
        # `span_grid` puts one level of the widest grid on equal weights; here levels of all widths have to be there.
        flat_step, flat_middle = flat_grid(low, first)
        step = torch.where(low == high, flat_step, step)
        middle = torch.where(low == high, flat_middle, middle)
    share = torch.ones(columns) if importance is None else importance.to(torch.float32)
    away = spread(middle, group_size, columns).neg_().add_(weight).mul_(share)
    fitted = {}
    for b in bits[:-1]:
        mark = (codes >> (widest - b)).to(torch.float32).sub_((2**b - 1) / 2).mul_(2.0 ** (first - b))
        mark.mul_(spread(step, group_size, columns))
        product, square = (mark * away).sum(1), mark.square_().mul_(share).sum(1)
        fitted[b] = torch.where(
            (product > 0) & (square > 0), product / square.clamp_min(1e-30), torch.ones_like(square)
        )
    made = shared_grid(codes, bits, group_size, step, None if zero is None else middle, fitted)
    return replace(made, codes=encode(weight, *made.grid(widest), widest, group_size))


def shared_grid(
    codes: Tensor,
    bits: tuple[int, ...],
    group_size: int,
    step: Tensor,
    middle: Tensor | None,
    times: Mapping[int, Tensor],
) -> Quantized:
    """A matrix with one grid for all widths.

    step: (out, groups) float32, that of the widest width times 2**(bits[-1] - bits[0]). middle: the same of the groups,
    None where symmetric. times[b]: (out,) float32, the ratios of the other widths.
    """
    first = bits[0]
    ratio = {b: round_ratio(times.get(b, torch.ones(len(step)))) for b in bits}
    if middle is None:
        return Quantized(codes, bits, group_size, {first: stored_scale(step)}, ratio=ratio)
    scale, zero = offset_grid(step, middle, first)
    return Quantized(codes, bits, group_size, {first: scale}, {first: zero}, ratio=ratio)


def ratio_of(stored: Tensor) -> Tensor:
    """What bytes of `Quantized.ratio` mean, float32."""
    return (stored.to(torch.float32) + RATIO_ONE) / 256


def round_ratio(ratio: Tensor) -> Tensor:
    """The nearest byte: uint8."""
    return (ratio * 256 - RATIO_ONE).round().clamp(0, 255).to(torch.uint8)


def spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """(out, groups) repeated to (out, columns), own memory."""
    return values.repeat_interleave(columns if group_size == -1 else group_size, 1)[:, :columns].contiguous()


def nearest(weight: Tensor, bits: tuple[int, ...], group_size: int, sym: bool, shared: bool = False) -> Quantized:
    """Round to nearest on the grid that spans each group: codes of bits[-1], the narrower widths nested in them.

    weight: (out, in) float32, finite. shared: as in `nest`. Raises ConfigError for a step beyond float16.
    """
    scale, zero = minmax_grid(weight, bits[-1], group_size, sym)
    codes = encode(weight, scale, zero, bits[-1], group_size)
    return nest(weight, codes, scale, zero, bits, group_size, shared=shared)
