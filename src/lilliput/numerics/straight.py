"""Rounding to a fixed grid with gradients for what is rounded, for the step and for the zero (needs torch).

With u = x / step and k = clamp(round(u) + zero) - zero, the value is k * step, and inside the clamp its derivatives are 1 by
x, round(u) - u by the step and 0 by the zero; outside they are 0, k and -step.

Source: Tan et al., "MobileQuant", EMNLP Findings 2024, section 3, whose grids these are; the gradients are those of
Bhalgat et al., "LSQ+", CVPR Workshops 2020, eqs. 3 to 6, without scaling.
Deviation: none.
"""

from typing import Any

import torch
from torch import Tensor

from lilliput.numerics.grids import F16_MIN, half_scale
from lilliput.numerics.nested import Quantized


class _Rounded(torch.autograd.Function):
    """k * step of every element; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        """x: any shape. step: a scalar, or one a row. zero: a whole scalar within low .. high."""
        near, shift = (x / step).round_(), float(zero)
        code = near.clamp(low - shift, high - shift)
        inside = near == code
        out = code.mul_(step)
        ctx.save_for_backward(x, out, inside, step)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, inside, step = ctx.saved_tensors
        by_x = grad * inside
        by_step = by_zero = None
        if ctx.needs_input_grad[1]:
            by_step = (grad * out - by_x * x).sum_to_size(step.shape) / step
        if ctx.needs_input_grad[2]:
            by_zero = (by_x - grad).sum() * step
        return by_x if ctx.needs_input_grad[0] else None, by_step, by_zero, None, None


def on_grid(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x rounded to step * (code - round(zero)), code in -2**(bits - 1) .. 2**(bits - 1) - 1: the shape of x.

    step, zero: scalars; the gradient passes straight through the rounding of zero.
    """
    top = 2 ** (bits - 1)
    whole = zero + (zero.detach().round().clamp(-top, top - 1) - zero.detach())
    out: Tensor = _Rounded.apply(x, step, whole, -top, top - 1)  # type: ignore[no-untyped-call]
    return out


def row_steps(weight: Tensor, share: Tensor | float, bits: int) -> Tensor:
    """Steps of symmetric rows: (out, 1) float32 that float16 holds, with the gradient of what they were before.

    share: (out, 1) or a number, how much of the reach of a row its grid has.
    """
    top = 2 ** (bits - 1)
    reach = torch.maximum(weight.amax(1, keepdim=True) / (top - 1), -weight.amin(1, keepdim=True) / top) * share
    # A row of zeros has any step.
    reach = torch.where(reach > 0, reach, torch.full_like(reach, F16_MIN))
    return reach + (half_scale(reach.detach()).to(torch.float32) - reach.detach())


def on_rows(weight: Tensor, share: Tensor | float, bits: int, nudge: Tensor | None = None) -> Tensor:
    """A matrix rounded row by row to step * w, w in -2**(bits - 1) .. 2**(bits - 1) - 1: (out, in).

    nudge: (out, in), added to weight / step before it is rounded, or None.
    """
    step, top = row_steps(weight, share, bits), 2 ** (bits - 1)
    if nudge is not None:
        weight = weight + nudge * step.detach()
    out: Tensor = _Rounded.apply(weight, step, torch.zeros(()), -top, top - 1)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def coded_rows(weight: Tensor, share: Tensor | float, bits: int, nudge: Tensor | None = None) -> Quantized:
    """The codes of `on_rows`, as an artifact keeps them: w + 2**(bits - 1), zeros of one half, one group a row."""
    step, top = row_steps(weight, share, bits), 2 ** (bits - 1)
    if nudge is not None:
        weight = weight + nudge * step
    codes = (torch.round(weight / step).clamp(-top, top - 1) + top).to(torch.uint8)
    half = torch.full_like(step, 0.5).half()
    return Quantized(codes, (bits,), -1, {bits: step.half()}, {bits: half})


@torch.no_grad()
def best_share(weight: Tensor, energy: Tensor, bits: int) -> Tensor:
    """Share of each row's reach, of 0.4 .. 1, whose rounding costs least: (out, 1). energy: (in,), E[x**2] of the inputs."""
    best = torch.ones(len(weight), 1)
    least = torch.full((len(weight), 1), torch.inf)
    for percent in range(100, 38, -2):
        error = ((on_rows(weight, percent / 100, bits) - weight).square() @ energy)[:, None]
        best = torch.where(error < least, percent / 100, best)
        least = torch.minimum(error, least)
    return best
