"""Ranges of activations and the grids they give: one for each token, or one fixed in advance (needs torch).

Codes are signed: value = scale * (code - zero), code in -2**(bits - 1) .. 2**(bits - 1) - 1; zero is a whole number,
and 0 where the grid is symmetric, whose lowest code is left unused. A range always holds 0, so that padding is exact.

An Observer sees activations batch by batch and keeps a histogram, so its memory does not grow with the tokens. The
first position of a sequence often holds values a hundred times the others' (the attention sink); `apart` keeps it out
of the range, for a runner that can treat that position by itself.

Source: per-token dynamic grids as in Yao et al., "ZeroQuant", NeurIPS 2022, section 4.1; ranges by percentile and by least
squared error as in Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1.
Deviation: percentile and error come from a histogram of equal bins, exact to a bin's width; what an activation reads may
be judged by what comes out behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["minmax", "percentile", "mse"]

BINS = 1 << 13
"""Bins of a histogram; at 8 bits 32 of them make a step."""
_SHRINKS = 100
_ENDS = 32
"""Places tried for an end of a range that is judged behind a function; both ends in turn, `_TURNS` times."""
_TURNS = 3


@dataclass(frozen=True)
class StaticGrid:
    """One grid for a whole tensor. scale: positive; zero: the code of 0; bits: 2..16."""

    scale: float
    zero: int
    bits: int

    def codes(self, x: Tensor) -> Tensor:
        """The nearest codes of x, any shape: the same shape in int32."""
        top = 2 ** (self.bits - 1)
        return torch.clamp(torch.round(x / self.scale) + self.zero, -top, top - 1).to(torch.int32)

    def rounded(self, x: Tensor) -> Tensor:
        """What x is after a trip through its codes: the same shape, float32."""
        return (self.codes(x) - self.zero).to(torch.float32) * self.scale


def per_token(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes with a scale for each token: codes as x in int32, scales (.., 1) float32.

    x: (.., features). A token of zeros gets the scale 0 and codes of 0.
    """
    top = 2 ** (bits - 1) - 1
    scale = x.to(torch.float32).abs().amax(-1, keepdim=True) / top
    codes = torch.round(x / torch.where(scale > 0, scale, torch.ones_like(scale)))
    return codes.clamp(-top, top).to(torch.int32), scale


def rounded_per_token(x: Tensor, bits: int = 8) -> Tensor:
    """What x is after `per_token`: the same shape, float32."""
    codes, scale = per_token(x, bits)
    return codes * scale


class Observer:
    """Watches one activation and says what static grid suits it.

    rule: "minmax" spans all that was seen; "percentile" cuts `share` of the values off, half on each side, or all by
    size where `sym`; "mse" picks, of 100 ranges from the whole down, the one of least squared rounding error.
    apart: leave the first position of every sequence out. through: the elementwise function that alone reads it, or None;
    unless the rule is "minmax", the range is then that of least squared error behind the function, each end by itself:
    of what a GELU reads most may be cut off below and nothing above.
    """

    def __init__(
        self,
        rule: Rule = "minmax",
        bits: int = 8,
        *,
        sym: bool = False,
        share: float = 1e-4,
        apart: bool = False,
        through: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not 2 <= bits <= 16:
            raise ValueError(f"bits is {bits}, outside 2..16")
        self.rule, self.bits, self.sym, self.share, self.apart = rule, bits, sym, share, apart
        self.through = through
        self.low, self.high = 0.0, 0.0
        self._reach = 0.0
        self._counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x: (batch, length, features), any float dtype. Raises ValueError where it is not finite."""
        seen = (x[:, 1:] if self.apart else x).to(torch.float32).flatten()
        if not seen.numel():
            return
        low, high = float(seen.min()), float(seen.max())
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise ValueError("an activation is NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(abs(low), abs(high)))
        if self._reach:
            at = ((seen / self._reach + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
            self._counts += torch.bincount(at, minlength=BINS)
        else:
            self._counts[BINS // 2] += seen.numel()

    def _widen(self, reach: float) -> None:
        """Double the span of the histogram until it holds `reach`; two bins become one, so no count is split."""
        if not self._reach and reach:
            zeros = self._counts.sum()
            self._counts.zero_()
            self._counts[BINS // 2] = zeros
            self._reach = reach
        while self._reach < reach:
            inner = self._counts.view(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[BINS // 4 : BINS // 4 * 3] = inner
            self._reach *= 2

    def range(self) -> tuple[float, float]:
        """The span the rule picks: low <= 0 <= high."""
        whole = (-self._peak, self._peak) if self.sym else (self.low, self.high)
        if self.rule == "minmax" or not self._reach:
            return whole
        if self.through is not None:
            return self._least_error_behind(self.through)
        return self._percentile() if self.rule == "percentile" else self._least_error(whole)

    @property
    def _peak(self) -> float:
        return max(-self.low, self.high)

    def grid(self) -> StaticGrid:
        """The grid of the range; of a tensor that was always 0, or never seen, the grid of step 1."""
        return self._grid(*self.range())

    def _grid(self, low: float, high: float) -> StaticGrid:
        top = 2 ** (self.bits - 1)
        if self.sym:
            return StaticGrid(high / (top - 1) or 1.0, 0, self.bits)
        scale = (high - low) / (2 * top - 1) or 1.0
        return StaticGrid(scale, max(-top, min(top - 1, -top - round(low / scale))), self.bits)

    def _centres(self) -> Tensor:
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * self._reach / BINS) - self._reach

    def _percentile(self) -> tuple[float, float]:
        counts, width = self._counts, 2 * self._reach / BINS
        if self.sym:
            sizes = counts[BINS // 2 :] + counts[: BINS // 2].flip(0)
            kept = int(torch.searchsorted(sizes.cumsum(0), (1 - self.share) * sizes.sum()))
            high = min((kept + 1) * width, self._peak)
            return -high, high
        total, goal = counts.cumsum(0), self.share / 2 * counts.sum()
        first = int(torch.searchsorted(total, goal, right=True))
        last = int(torch.searchsorted(total, total[-1] - goal))
        low, high = first * width - self._reach, (last + 1) * width - self._reach
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))

    def _least_error_behind(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        centres = self._centres()
        meant = function(centres)

        def error(low: float, high: float) -> float:
            grid = self._grid(*((-max(-low, high), max(-low, high)) if self.sym else (low, high)))
            found = function(grid.rounded(centres).double())
            return float((self._counts * (found - meant).square()).sum())

        low, high = self.low, self.high
        parts = [1 - step / _ENDS for step in range(_ENDS)]
        for _ in range(_TURNS):
            low = min((self.low * part for part in parts), key=lambda end: error(end, high))
            high = min((self.high * part for part in parts), key=lambda end: error(low, end))
        return (-max(-low, high), max(-low, high)) if self.sym else (low, high)

    def _least_error(self, whole: tuple[float, float]) -> tuple[float, float]:
        centres = self._centres()
        best, least = whole, torch.inf
        for step in range(_SHRINKS):
            span = tuple(end * (1 - step / _SHRINKS) for end in whole)
            grid = self._grid(span[0], span[1])
            error = float((self._counts * (grid.rounded(centres) - centres).square()).sum())
            if error < least:
                best, least = (span[0], span[1]), error
        return best
