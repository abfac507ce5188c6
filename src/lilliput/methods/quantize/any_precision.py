"""Any-precision: nested codes whose levels are clusters of the weights, each weight counted by what the loss feels of it.

The narrowest width is a weighted k-means of every row; each wider one cuts every cluster in two where that lowers the
weighted squared error most, so the codes of a width are the top bits of those of the next.

Source: Park et al., "Any-Precision LLM", ICML 2024, section 3 (seed and incremental upscaling); the seed's objective is
eq. 5 of Kim et al., "SqueezeLLM", ICML 2024: the sum of F (w - level)^2, F the squared gradients of the loss.
Deviation: clusters are found among the positions of the weights in their group, so groups may have scales of their own
(group_size -1 is the paper's row); cuts are the best ones, not a fixed point of 2-means; all widths are refined
together afterwards (`refine: 0` for the paper's); levels have 7 bits over each group's span, and scale and zero are
refitted at every width; F counts with a share of its row's mean (`floor`), since it is a noisy estimate. `affine`
keeps evenly spaced levels instead and only weighs their fit, as every kernel of 8 bits needs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.core.errors import ConfigError
from lilliput.methods.base import Quantizer, Statistic
from lilliput.numerics.clusters import Runs, lloyd, start
from lilliput.numerics.codebooks import positions, refit, round_table
from lilliput.numerics.grids import Refit, encode, grouped, minmax_grid, nest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import LEVEL_BITS, TABLE_BITS

_CHUNK = 1 << 21  # weights solved at once: a dozen arrays of float64 beside them


@dataclass(frozen=True, kw_only=True)
class AnyPrecision(Quantizer):
    """Cluster every row; the seed is the narrowest of `bits`.

    refine: rounds in which all widths improve together; 0 for none. floor: share of a row's mean sensitivity that
    every weight of it has at least. affine: evenly spaced levels, needed for widths above 4.
    """

    needs: ClassVar[Statistic] = Statistic.FISHER
    bits: tuple[int, ...] = (2, 3, 4)
    refine: int = 20
    floor: float = 0.1
    affine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ladders = [self.bits, self.end_bits, *self.layer_bits.values()]
        if not self.affine and any(b > TABLE_BITS for ladder in ladders for b in ladder):
            wide = next(b for ladder in ladders for b in ladder if b > TABLE_BITS)
            what = f"a ladder has {wide} bits, and a table of levels has at most {TABLE_BITS}"
            fix = f"Keep to widths up to {TABLE_BITS}, or set affine: true for evenly spaced levels"
            raise ConfigError(what, where=f"{self.name}.bits", fix=fix)
        if self.refine < 0:
            what = f"refine is {self.refine}"
            raise ConfigError(what, where=f"{self.name}.refine", fix="Give 0 for none, or about 20 rounds")
        if not self.floor >= 0:
            what = f"floor is {self.floor}"
            raise ConfigError(what, where=f"{self.name}.floor", fix="Give a share of the mean such as 0.1, or 0")

    @property
    def tables(self) -> tuple[int, ...]:
        """All widths, unless the levels are evenly spaced."""
        return () if self.affine else self.bits

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Cluster one matrix; see `LayerMethod.solve`. stat: (out, in) float32, not negative; None for equal weights.

        Raises ConfigError for a step beyond float16.
        """
        rows = max(1, _CHUNK // weight.shape[1])
        parts = []
        for at in range(0, len(weight), rows):
            part = weight[at : at + rows]
            felt = torch.ones_like(part) if stat is None else felt_of(part, stat[at : at + rows], self.floor)
            parts.append(self._even(part, felt) if self.affine else self._clustered(part, felt))
        return Quantized.stack(parts)

    def _even(self, weight: Tensor, felt: Tensor) -> Quantized:
        widest, size = self.bits[-1], self.group_size
        scale, zero = minmax_grid(weight, widest, size, self.sym)
        codes, fit = encode(weight, scale, zero, widest, size), Refit(weight, size, felt)
        for _ in range(self.refine):
            moved = encode(weight, *fit.grid(codes, widest, self.sym), widest, size)
            if torch.equal(moved, codes):
                break
            codes = moved
        if self.shared:
            return nest(weight, codes, *fit.grid(codes, widest, self.sym), self.bits, size, felt, shared=True)
        grids = {b: fit.grid(codes >> (widest - b), b, self.sym) for b in self.bits}
        zeros = {b: z for b, (_, z) in grids.items() if z is not None}
        return Quantized(codes, self.bits, size, {b: s for b, (s, _) in grids.items()}, zeros)

    def _clustered(self, weight: Tensor, felt: Tensor) -> Quantized:
        size, widest = self.group_size, self.bits[-1]
        scale, zero = minmax_grid(weight, LEVEL_BITS, size, self.sym)
        # An error of one position is one step of the group's grid in the weight.
        steps = grouped(felt, size)[0] * scale.to(torch.float32).square()[..., None]
        found = tree(
            positions(weight, scale, zero, size), steps.flatten(1)[:, : weight.shape[1]], self.bits, self.refine
        )
        tables = {b: round_table(centres) for b, centres in found.centres.items()}
        grids = {b: refit(weight, found.codes >> (widest - b), t, size, self.sym, felt) for b, t in tables.items()}
        zeros = {b: z for b, (_, z) in grids.items() if z is not None}
        return Quantized(found.codes, self.bits, size, {b: s for b, (s, _) in grids.items()}, zeros, tables)


@dataclass(frozen=True)
class Tree:
    """codes: (out, in) uint8 of the widest width. centres[b]: (out, 2**b) float32, non-decreasing along a row.

    A centre is the weighted mean of the values whose codes have its number as their top b bits, where there are any.
    """

    codes: Tensor
    centres: dict[int, Tensor]


def felt_of(weight: Tensor, fisher: Tensor, floor: float) -> Tensor:
    """What counts of each weight's error: its sensitivity, with `floor` of its row's mean added; 0 for a pruned weight.

    weight, fisher: (out, in) float32. A row that feels nothing counts all its weights alike.
    """
    mean = fisher.mean(1, keepdim=True)
    felt = torch.where(mean > 0, fisher / mean.clamp_min(1e-38) + floor, torch.ones_like(fisher))
    felt = felt * (weight != 0)
    return torch.where(felt.sum(1, keepdim=True) > 0, felt, torch.ones_like(felt))


def tree(values: Tensor, felt: Tensor, bits: tuple[int, ...], refine: int) -> Tree:
    """Nested clusters of every row: k-means of 2**bits[0], then the best cut of each cluster, a bit at a time.

    values, felt: (out, in) float32, felt not negative. bits: ascending. refine: rounds of joint improvement.
    """
    ordered, index = values.sort(1)
    runs = Runs(ordered, felt.gather(1, index))
    borders = {bits[0]: min_cost(runs, 2 ** bits[0])}
    for b in range(bits[0] + 1, bits[-1] + 1):
        borders[b] = runs.split(borders[b - 1])
    leaves = borders[bits[-1]]
    if refine and len(bits) > 1:
        # A width counts by how much of its own error is saved, or the narrowest would outweigh the others.
        share = {b: 1 / runs.cost(borders[b]).clamp_min(1e-30) for b in bits}
        for _ in range(refine):
            moved = assign(runs, leaves, bits, share)
            if torch.equal(moved, leaves):
                break
            leaves = moved
    leaves = _between_values(ordered, leaves)
    place = torch.arange(values.shape[1], device=values.device).expand(values.shape).contiguous()
    rank = torch.searchsorted(leaves[:, 1:-1].contiguous(), place, right=True)
    codes = torch.empty_like(values, dtype=torch.uint8).scatter_(1, index, rank.to(torch.uint8))
    return Tree(codes, {b: runs.means(_coarse(leaves, bits[-1] - b)) for b in bits})


def min_cost(runs: Runs, k: int) -> Tensor:
    """Borders of k-means of each row, the better of two starts: (out, k + 1) int64."""
    tried = [lloyd(runs, start(runs, k, init)) for init in ("tree", "quantile")]
    better = runs.cost(tried[1]) < runs.cost(tried[0])
    return torch.where(better[:, None], tried[1], tried[0])


def assign(runs: Runs, leaves: Tensor, bits: tuple[int, ...], share: dict[int, Tensor]) -> Tensor:
    """Borders of the leaves nearest to each value over all widths: those that minimise sum_b share_b (x - T_b)^2.

    The sum is, for each leaf, one parabola in x of the same opening, so what a leaf wins is a run of values: the leaves
    above the j-th win from where one of them is below all the others on.
    """
    widest = bits[-1]
    total = torch.stack([share[b] for b in bits]).sum(0)[:, None]
    first, second = torch.zeros(1), torch.zeros(1)
    for b in bits:
        level = runs.means(_coarse(leaves, widest - b)).to(torch.float64).repeat_interleave(2 ** (widest - b), 1)
        first = first + share[b][:, None] / total * level
        second = second + share[b][:, None] / total * level.square()
    run = first[:, None, :] - first[:, :, None]  # (out, from leaf, to leaf)
    rise = second[:, None, :] - second[:, :, None]
    flat = run <= 1e-12
    meet = torch.where(flat, torch.where(rise < 0, -torch.inf, torch.inf), rise / (2 * run.clamp_min(1e-12)))
    count = first.shape[1]
    inner = [meet[:, :j, j:].amax(1).amin(1) for j in range(1, count)]
    return _bordered(runs.values, torch.stack(inner, 1).to(torch.float32))


def _bordered(values: Tensor, marks: Tensor) -> Tensor:
    inner = torch.searchsorted(values, marks.contiguous())
    return pad(pad(inner, (1, 0)), (0, 1), value=values.shape[1])


def _between_values(values: Tensor, borders: Tensor) -> Tensor:
    """Borders moved down to the first of equal values, so that equal weights have equal codes in any order."""
    inner = borders[:, 1:-1]
    last = values.shape[1]
    first = torch.searchsorted(values, values.gather(1, inner.clamp_max(last - 1)).contiguous())
    return pad(pad(torch.where(inner < last, first, inner), (1, 0)), (0, 1), value=last)


def _coarse(leaves: Tensor, bits: int) -> Tensor:
    """Borders of the clusters so many bits above the leaves."""
    return leaves[:, :: 2**bits].contiguous()
