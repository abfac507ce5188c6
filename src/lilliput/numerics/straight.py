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

from lilliput.numerics.grids import F16_MIN, half_scale, straight
from lilliput.numerics.nested import Quantized


class _Rounded(torch.autograd.Function):
    """k * step of every element; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        """x: any shape. step: a scalar, or one a row. zero: the same, whole, within low .. high."""
        near = (x / step).round_()
        shift: Any = zero if zero.dim() else float(zero)
        code = near.clamp(low - shift, high - shift)
        inside = near == code
        out = code.mul_(step)
        ctx.save_for_backward(x, out, inside, step, zero)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, inside, step, zero = ctx.saved_tensors
        by_x = grad * inside
        by_step = by_zero = None
        if ctx.needs_input_grad[1]:
            by_step = (grad * out - by_x * x).sum_to_size(step.shape) / step
        if ctx.needs_input_grad[2]:
            by_zero = ((by_x - grad) * step).sum_to_size(zero.shape)
        return by_x if ctx.needs_input_grad[0] else None, by_step, by_zero, None, None


def on_grid(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x rounded to step * (code - round(zero)), code in -2**(bits - 1) .. 2**(bits - 1) - 1: the shape of x.

    step, zero: scalars; the gradient passes straight through the rounding of zero.
    """
    top = 2 ** (bits - 1)
    whole = _whole(zero, -top, top - 1)
    out: Tensor = _Rounded.apply(x, step, whole, -top, top - 1)  # type: ignore[no-untyped-call]
    return out


def _whole(zero: Tensor, low: int, high: int) -> Tensor:
    """The nearest whole number within low .. high, with the gradient of what it was before."""
    return straight(zero, zero.detach().round().clamp(low, high))


def row_grids(weight: Tensor, share: Tensor | float, bits: int) -> tuple[Tensor, Tensor]:
    """(step, zero) of rows, value = step * (c - zero), c in 0 .. 2**bits - 1: (out, 1) steps that float16 holds and whole
    zeros, float32 both, with the gradients of what they were before.

    share: how much of its reach a row's grid has. (out, 1) or a number: symmetric rows, whose zero is 2**(bits - 1);
    (out, 2), down and up: the grid spans what is between the least and the greatest weight, and 0.
    """
    top = 2 ** (bits - 1)
    if isinstance(share, Tensor) and share.shape[1] == 2:
        low = weight.amin(1, keepdim=True).clamp_max(0) * share[:, :1]
        high = weight.amax(1, keepdim=True).clamp_min(0) * share[:, 1:]
        step = _stored((high - low) / (2**bits - 1))
        return step, _whole(-low / step, 0, 2**bits - 1)
    reach = torch.maximum(weight.amax(1, keepdim=True) / (top - 1), -weight.amin(1, keepdim=True) / top) * share
    step = _stored(reach)
    return step, torch.full_like(step, float(top))


def _stored(step: Tensor) -> Tensor:
    """Steps as float16 holds them."""
    # A row of zeros has any step.
    step = torch.where(step > 0, step, torch.full_like(step, F16_MIN))
    return straight(step, half_scale(step.detach()))


def on_rows(weight: Tensor, share: Tensor | float, bits: int, nudge: Tensor | None = None) -> Tensor:
    """A matrix rounded row by row to the values of `row_grids`: (out, in).

    nudge: (out, in), added to weight / step before it is rounded, or None.
    """
    step, zero = row_grids(weight, share, bits)
    if nudge is not None:
        weight = weight + nudge * step.detach()
    out: Tensor = _Rounded.apply(weight, step, zero, 0, 2**bits - 1)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def coded_rows(weight: Tensor, share: Tensor | float, bits: int, nudge: Tensor | None = None) -> Quantized:
    """The codes of `on_rows`, as an artifact keeps them: one group a row, zeros from the middle of the codes."""
    step, zero = row_grids(weight, share, bits)
    if nudge is not None:
        weight = weight + nudge * step
    codes = (torch.round(weight / step) + zero).clamp(0, 2**bits - 1).to(torch.uint8)
    return Quantized(codes, (bits,), -1, {bits: step.half()}, {bits: (zero - (2**bits - 1) / 2).half()})


@torch.no_grad()
def best_share(weight: Tensor, energy: Tensor, bits: int, *, sym: bool = True) -> Tensor:
    """Share of each row's reach, of 0.4 .. 1, whose rounding costs least: (out, 1), or (out, 2) where rows are not `sym`,
    down and up first alike, then one after the other. energy: (in,), E[x**2] of the inputs.
    """
    best = torch.ones(len(weight), 1 if sym else 2)
    least = torch.full((len(weight), 1), torch.inf)
    for sides in [slice(None)] if sym else [slice(None), slice(0, 1), slice(1, 2)]:
        start = best.clone()
        for percent in range(100, 38, -2):
            share = start.clone()
            share[:, sides] = percent / 100
            error = ((on_rows(weight, share, bits) - weight).square() @ energy)[:, None]
            best = torch.where(error < least, share, best)
            least = torch.minimum(error, least)
    return best
