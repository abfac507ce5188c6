"""A nested matrix whose codes and grids can be trained (needs torch).

The weight behind the codes is a float; its code is where it falls on the widest grid as that was in the beginning, and a
narrower code is the top bits of it, as in the store. Levels are trained apart from the places where codes change: a
weight reaches another code by moving, a code another value by its grid.

Source: straight-through gradients after Bengio, Leonard and Courville, 2013; trained scales after Esser et al.,
"Learned Step Size Quantization", ICLR 2020, eq. 2 to 5.
Deviation: the gradient of a weight is that of its dequantized value, whatever the width, and 0 while the weight is beyond
the widest grid, in whichever direction it would move.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lilliput.numerics.grids import grouped, near_scale, ratio_of, round_ratio, stored_scale, stored_zero, straight
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import TABLE_BITS, counted_bits


class _Level(torch.autograd.Function):
    """scale * (code - middle - zero) of every weight; see the module."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, own: Tensor, inside: Tensor) -> Tensor:
        """weight: (out, in). scale, zero: (out, groups). own: (out, groups, size) codes from their middle, padded.

        inside: (out, in) bool, whether a weight is within the widest grid. Returns (out, in).
        """
        out, columns = weight.shape
        centred = own - zero[..., None]
        ctx.save_for_backward(centred, scale, inside)
        return (centred * scale[..., None]).view(out, -1)[:, :columns].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, scale, inside = ctx.saved_tensors
        full, _ = grouped(grad, -1 if centred.shape[1] == 1 else centred.shape[2])
        by_scale = torch.einsum("ogs,ogs->og", full, centred)
        by_zero = -full.sum(-1) * scale
        by_weight = grad * inside if ctx.needs_input_grad[0] else None
        return by_weight, by_scale, by_zero, None, None


class Trainable:
    """Codes of one matrix as something an optimiser may move.

    weight: (out, in) float32 that codes and outliers stand for, left as it was; a copy is first pulled into the cell of
    its code, so that training starts from `coded` as it is. codes: train them; else only grids. Outliers stay as they are.
    """

    def __init__(self, weight: Tensor, coded: Quantized, codes: bool) -> None:
        self._coded = coded
        if coded.outliers is not None:
            self._beside = coded.outliers.places(weight.shape[1]), coded.outliers.values.float()
            weight = coded.outliers.taken_from(weight) if codes else weight  # else only its shape counts
        widest = coded.bits[-1]
        self.weight = weight.detach()  # where codes are trained, another takes its place below
        self._steps: Tensor | None = None
        self._shift = torch.tensor((2**widest - 1) / 2)
        if codes:
            scale, zero = coded.grid(widest)
            step = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]
            if zero is not None:
                self._shift = self._shift + zero[..., None]
            self._steps = step
            place = self._places(weight)
            code = grouped(coded.codes.float(), coded.group_size)[0]
            # A code that is not the nearest was meant. At the very edge of its cell the first small steps would undo it.
            away = place - code
            place = code + torch.where(away.abs() < 0.5, away, away.sign() * 0.25)
            self.weight = self._trim((place - self._shift) * step)
        self.weight.requires_grad_(codes)
        self._log = {b: torch.zeros_like(s, dtype=torch.float32).requires_grad_() for b, s in coded.scale.items()}
        # A shared zero moves every width, so it is counted in the finest steps that are ever trained on their own.
        self._unit = 2.0 ** (max((b for b in coded.bits if b <= TABLE_BITS), default=coded.bits[0]) - coded.bits[0])
        self._unit = self._unit if coded.ratio else 1.0
        self._zero = {b: (z.float() * self._unit).requires_grad_() for b, z in coded.zero.items()}
        self._times = {b: torch.zeros(len(r)).requires_grad_() for b, r in coded.ratio.items()}

    def serving(self, bits: int) -> int:
        """The width that serves `bits`; as `Quantized.serving`."""
        return self._coded.serving(bits)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, by a name of its own."""
        if self.weight.requires_grad:
            yield "weight", self.weight
        for bits, log in self._log.items():
            yield f"scale.{bits}", log
        for bits, zero in self._zero.items():
            yield f"zero.{bits}", zero
        for bits, times in self._times.items():
            yield f"ratio.{bits}", times

    def grids(self) -> list[Tensor]:
        """Logarithms of scales and of ratios relative to the first ones, and zeros, of every width that has them."""
        return [*self._log.values(), *self._zero.values(), *self._times.values()]

    def at(self, bits: int) -> Tensor:
        """The (out, in) float32 matrix at one width of the ladder, with gradients."""
        coded = self._coded
        base = coded.bits[0] if coded.ratio else bits
        scale = coded.scale[base].float() * torch.exp(self._log[base])
        scale = straight(scale, near_scale(scale.detach()))
        zero = torch.zeros_like(scale)
        if base in self._zero:
            zero = self._zero[base] / self._unit
            zero = straight(zero, stored_zero(zero.detach(), counted_bits(base, coded.table)))
        if coded.ratio:
            factor = coded.factor(bits) * torch.exp(self._times[bits])[:, None]
            scale, zero = scale * factor, zero / factor
        with torch.no_grad():
            codes, inside = self._codes()
            own, _ = grouped(coded.marks(bits, codes), coded.group_size)
        value: Tensor = _Level.apply(self.weight, scale, zero, own, inside)  # type: ignore[no-untyped-call]
        return value if coded.outliers is None else value.flatten().index_add(0, *self._beside).view_as(value)

    @torch.no_grad()
    def quantized(self, trained: int) -> Quantized:
        """What has been reached, grids rounded to what is stored.

        trained: the widest width that was trained; the bits beyond it place the first codes within its cells.
        """
        coded = self._coded
        cell = 1 << (coded.bits[-1] - trained)
        low = self._codes()[0].to(torch.int16) // cell * cell
        codes = torch.minimum(torch.maximum(coded.codes.to(torch.int16), low), low + cell - 1).to(torch.uint8)
        scale = {b: stored_scale(coded.scale[b].float() * torch.exp(log)) for b, log in self._log.items()}
        zero = {b: stored_zero(z / self._unit, counted_bits(b, coded.table)) for b, z in self._zero.items()}
        ratio = {b: round_ratio(ratio_of(r) * torch.exp(self._times[b])) for b, r in coded.ratio.items()}
        return Quantized(codes, coded.bits, coded.group_size, scale, zero, coded.table, ratio, coded.outliers)

    def _places(self, weight: Tensor) -> Tensor:
        """Where weights stand on the widest grid: (out, groups, size), whole numbers at its codes."""
        assert self._steps is not None, "codes are trained"
        return grouped(weight, self._coded.group_size)[0] / self._steps + self._shift

    def _trim(self, full: Tensor) -> Tensor:
        out, columns = self._coded.shape
        return full.reshape(out, -1)[:, :columns].contiguous()

    def _codes(self) -> tuple[Tensor, Tensor]:
        """(out, in) uint8 codes of the widest width, and whether each weight is within its grid."""
        if self._steps is None:
            return self._coded.codes, torch.ones(1, dtype=torch.bool)
        top = 2 ** self._coded.bits[-1] - 1
        place = self._trim(self._places(self.weight))
        inside = (place > -0.5) & (place < top + 0.5)
        return place.round_().clamp_(0, top).to(torch.uint8), inside
