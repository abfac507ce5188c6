"""Grids that training may move, and roundings too, with gradients passed straight through the rounding (needs torch).

The widest grid of B bits spans [a * min, b * max] of every group, a and b in (0, 1) (LWC). The codes of a narrower
width b are its top bits; if nothing else moved, their levels would be the middles of the cells, scale * 2**(B - b) and
zero / 2**(B - b). Each narrower width has a factor on the one and a shift of the other, both learned, which start
where the least-squares refit of the first codes puts them; of a shared grid a factor a row, and no shift.

Source: Shao et al., "OmniQuant", ICLR 2024, eq. 2, for the bounds; Cheng et al., "Optimize Weight Rounding via Signed
Gradient Descent", 2024, eq. 3, for the learned offset of the rounding; Bengio et al., 2013, for the straight-through gradient.
Deviation: nested widths, with grids of their own over shared codes.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lilliput.numerics.grids import (
    Refit,
    encode,
    flat_grid,
    furthest,
    grouped,
    near_scale,
    nest,
    offset_grid,
    shared_grid,
    stored_scale,
    stored_zero,
    straight,
)
from lilliput.numerics.nested import Quantized


class LearnedGrid:
    """The trainable grids of one matrix. weight: (out, in) float32, which may itself change later on.

    bounds: one or two (out, groups) logits. factors, shifts: (out, groups) for every width but the widest; no shifts
    where `sym`. shared: one grid a group for all widths, with factors (out, 1) and no shifts. nudge: (out, in) offset of
    the rounding in steps of the widest grid, or None.
    """

    def __init__(
        self, weight: Tensor, bits: tuple[int, ...], group_size: int, sym: bool, rounding: bool, shared: bool = False
    ) -> None:
        self.bits, self.group_size, self.sym, self.shared = bits, group_size, sym, shared and len(bits) > 1
        weight = weight.detach()
        full, self._mask = grouped(weight, group_size)
        shape = full.shape[:2]
        # The paper starts at sigmoid(4) = 0.982 of the range, a quarter of a step of 4 bits; so do we at every width.
        start = math.log(4 * (2 ** bits[-1] - 1) - 1)
        self.bounds = [torch.full(shape, start) for _ in range(1 if sym else 2)]
        self.nudge = torch.zeros_like(weight) if rounding else None
        self.factors: dict[int, Tensor] = {}
        self.shifts: dict[int, Tensor] = {}
        with torch.no_grad():
            scale, zero = self._stored(weight)
            codes = self._codes(weight, scale, zero)
            fit = Refit(weight, group_size)
            one = nest(weight, codes, scale, zero, bits, group_size, shared=True) if self.shared else None
            for width in bits[:-1]:
                cells = 2 ** (bits[-1] - width)
                if one is not None:
                    self.factors[width] = (one.factor(width) / one.factor(bits[-1]) / cells).log()
                    continue
                own, off = fit.grid(codes // cells, width, sym)
                step = scale.float() * cells
                # A flat group may have no step, or none at this width; its factor of 1 is as good as any.
                ratio = own.float() / torch.where(step > 0, step, torch.ones_like(step))
                self.factors[width] = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).log()
                if zero is not None and off is not None:
                    self.shifts[width] = off.float() - zero.float() / cells
        for tensor in self.parameters:
            tensor.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """All that training may change, the bounds first."""
        extra = [] if self.nudge is None else [self.nudge]
        return [*self.bounds, *self.factors.values(), *self.shifts.values(), *extra]

    @property
    def grids(self) -> list[Tensor]:
        """The factors and shifts."""
        return [*self.factors.values(), *self.shifts.values()]

    def _widest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Step and middle of the widest grid before any rounding: (out, groups) each."""
        full = grouped(weight, self.group_size)[0]
        top = 2 ** self.bits[-1] - 1
        if self.sym:
            reach = full.abs().amax(-1) * torch.sigmoid(self.bounds[0])
            return reach * (2 / top), torch.zeros_like(reach)
        low = full.masked_fill(~self._mask, torch.inf).amin(-1)
        high = full.masked_fill(~self._mask, -torch.inf).amax(-1)
        flat = high == low  # as in minmax_grid: a level, half a step from the middle, on the value
        middle = (high + low) / 2
        alone, rest = 2 * middle.abs(), torch.zeros_like(middle)
        if self.shared:  # as in nest: levels of all widths are next to the value
            alone, rest = flat_grid(middle, self.bits[0])
            alone = alone / 2 ** (self.bits[-1] - self.bits[0])
        low, high = low * torch.sigmoid(self.bounds[0]), high * torch.sigmoid(self.bounds[1])
        step = torch.where(flat, alone, (high - low).clamp_min(0) / top)
        return step, torch.where(flat, rest, (high + low) / 2)

    def at(self, weight: Tensor, width: int) -> Tensor:
        """The (out, in) float32 matrix a width means, differentiable in the parameters and in `weight`."""
        out, columns = weight.shape
        step, zero = self._rounded(*self._widest(weight))
        safe = torch.where(step > 0, step, torch.ones_like(step))
        top = 2 ** self.bits[-1] - 1
        code = grouped(weight, self.group_size)[0] / safe[..., None] + (top / 2 + zero)[..., None]
        if self.nudge is not None:
            code = code + grouped(self.nudge, self.group_size)[0]
        code = straight(code, code.detach().round()).clamp(0, top)
        if width != self.bits[-1]:
            cells = 2 ** (self.bits[-1] - width)
            code = code / cells
            code = straight(code, code.detach().floor())
            factor = self.factors[width].exp()
            step, zero = step * cells * factor, zero / cells
            if self.shared:
                zero = zero / factor
            else:
                step = straight(step, near_scale(step.detach()))
            if width in self.shifts:
                zero = zero + self.shifts[width]
                zero = straight(zero, stored_zero(zero.detach(), width))
        made = (code - ((2**width - 1) / 2 + zero)[..., None]) * step[..., None]
        kept: Tensor = made.reshape(out, -1)[:, :columns]
        return kept

    def _rounded(self, step: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero of the widest grid as they are stored, in float32 and differentiable."""
        first = self.bits[0] if self.shared else self.bits[-1]
        cells = 2 ** (self.bits[-1] - first)
        step = torch.maximum(step * cells, middle.abs() / furthest(first, step.shape[1]))
        step = straight(step, near_scale(step.detach()))
        zero = -middle / torch.where(step > 0, step, torch.ones_like(step))
        if not self.sym:
            zero = straight(zero, stored_zero(zero.detach(), first))
        return step / cells, zero * cells

    def _stored(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        step, middle = self._widest(weight)
        return (stored_scale(step), None) if self.sym else offset_grid(step, middle, self.bits[-1])

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if self.nudge is not None:
            full, step = grouped(self.nudge, self.group_size)[0], scale.float()
            moved = (full * step[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
            weight = weight + moved
        return encode(weight, scale, zero, self.bits[-1], self.group_size)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> Quantized:
        """What is stored: the grids rounded and the codes chosen for them.

        Raises ConfigError for a step beyond float16.
        """
        scale, zero = self._stored(weight)
        codes = self._codes(weight, scale, zero)
        if self.shared:
            step, middle = self._widest(weight)
            times = {width: factor.exp()[:, 0] for width, factor in self.factors.items()}
            step = step * 2 ** (self.bits[-1] - self.bits[0])
            made = shared_grid(codes, self.bits, self.group_size, step, None if self.sym else middle, times)
            return replace(made, codes=self._codes(weight, *made.grid(self.bits[-1])))
        scales, zeros = {self.bits[-1]: scale}, {} if zero is None else {self.bits[-1]: zero}
        for width, factor in self.factors.items():
            cells = 2 ** (self.bits[-1] - width)
            scales[width] = stored_scale(scale.float() * cells * factor.exp())
            if zero is not None:
                zeros[width] = stored_zero(zero.float() / cells + self.shifts[width], width)
        return Quantized(codes, self.bits, self.group_size, scales, zeros)


def signed_step(tensor: Tensor, lr: float, reach: float) -> None:
    """Move a tensor against the sign of its gradient by `lr`, staying within [-reach, reach]; then forget the gradient."""
    if tensor.grad is not None:
        with torch.no_grad():
            tensor.sub_(lr * tensor.grad.sign()).clamp_(-reach, reach)
        tensor.grad = None


def cosine(step: int, steps: int) -> float:
    """Share of a learning rate at `step` of `steps`: from 1 down along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
