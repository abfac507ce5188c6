"""Weighted clusters on a line, for all rows of a matrix at once, from prefix sums (needs torch).

On a line a cluster is a run of the sorted values, so its weight, mean and squared error are differences of prefix sums:
one Lloyd step costs a binary search a border, not a pass over the values, and the best place to cut a run in two is found
exactly by looking at every place.

Borders are places between sorted values: cluster j of row n is values[n, borders[n, j] : borders[n, j + 1]], with
borders[:, 0] = 0 and borders[:, -1] = values a row. A run may be empty.

Source: weighted k-means a row as in Zhang and Shrivastava, "LeanQuant", ICLR 2025, section 3.2; Lloyd, "Least squares
quantization in PCM", 1982; the halving of clusters is that of Park et al., "Any-Precision LLM", ICML 2024, section 3.2.
Deviation: prefix sums instead of passes over the points; three starts, see `Init`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Init = Literal["quantile", "even", "tree"]
"""Where k-means starts: runs of equally many values, levels evenly spaced from least to largest, or the tree of best cuts,
each run cut in two where the weighted squared error falls most. A tree of k clusters needs k = 2**b."""


class Runs:
    """Prefix sums over sorted rows.

    values: (out, n) float32, ascending along a row. weights: (out, n) float32, not negative, in the same order; where all
    of a row's are zero they count as equal.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        share = weights.to(torch.float64)
        total = share.sum(1, keepdim=True)
        share = torch.where(total > 0, share / total, torch.full_like(share, 1 / values.shape[1]))
        self.values = values
        # Measured from the mean of the row, or the squares of a row far from zero would swamp its spread.
        wide = values.to(torch.float64)
        self._mean = (wide * share).sum(1, keepdim=True)
        wide = wide - self._mean
        self._weight = pad(share.cumsum(1), (1, 0))
        self._first = pad((share * wide).cumsum(1), (1, 0))
        self._second = (share * wide.square()).sum(1)

    def means(self, borders: Tensor) -> Tensor:
        """Weighted mean of every run: (out, k) float32, non-decreasing.

        A run without weight has the plain mean of its values; an empty one stands on the border it would open.
        """
        weight, first = self._inside(self._weight, borders), self._inside(self._first, borders)
        places = self.values.shape[1] - 1
        left, right = borders[:, :-1], borders[:, 1:]
        middle = (
            self.values.gather(1, left.clamp(0, places)) + self.values.gather(1, (right - 1).clamp(0, places))
        ) / 2
        mean = (first / weight.clamp_min(1e-300) + self._mean).to(torch.float32)
        mean = torch.where(weight > 1e-13, mean, middle)  # below that, differences of sums near one are rounding
        return mean.cummax(1).values

    def nearest(self, centres: Tensor) -> Tensor:
        """Borders of the values nearest to each of the centres (out, k), which are non-decreasing: (out, k + 1) int64."""
        between = (centres[:, 1:] + centres[:, :-1]) / 2
        inner = torch.searchsorted(self.values, between.contiguous())
        return pad(pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def cost(self, borders: Tensor) -> Tensor:
        """Weighted squared distance to the means, the weights of a row summing to one: (out,) float64."""
        weight, first = self._inside(self._weight, borders), self._inside(self._first, borders)
        return (self._second - (first.square() / weight.clamp_min(1e-300)).sum(1)).clamp_min(0)

    def split(self, borders: Tensor) -> Tensor:
        """Borders after every run is cut in two where that lowers the cost most: (out, 2 k + 1) int64.

        Of places that serve equally the first. A run of one value or none leaves its second half empty.
        """
        runs, count = borders.shape[1] - 1, self.values.shape[1]
        place = torch.arange(1, count + 1, device=borders.device).expand(len(borders), -1).contiguous()
        # A cut after value t belongs to the run that holds value t - 1; at the end of a run its second half is empty.
        run = torch.searchsorted(borders[:, 1:].contiguous(), place).clamp_max(runs - 1)
        left, right = borders.gather(1, run), borders.gather(1, run + 1)
        gain = self._score(left, place) + self._score(place, right)
        best = torch.full((len(borders), runs), -torch.inf, dtype=torch.float64, device=borders.device)
        best = best.scatter_reduce(1, run, gain, "amax")
        first = torch.where(gain >= best.gather(1, run), place, count + 1)
        cut = torch.full((len(borders), runs), count + 1, device=borders.device).scatter_reduce(1, run, first, "amin")
        cut = torch.minimum(cut, borders[:, 1:])  # a run that is empty holds no place
        return torch.cat([torch.stack([borders[:, :-1], cut], 2).flatten(1), borders[:, -1:]], 1)

    @staticmethod
    def _inside(sums: Tensor, borders: Tensor) -> Tensor:
        return sums.gather(1, borders).diff(dim=1)

    def _score(self, left: Tensor, right: Tensor) -> Tensor:
        """What the runs left..right take off the cost."""
        weight = self._weight.gather(1, right) - self._weight.gather(1, left)
        first = self._first.gather(1, right) - self._first.gather(1, left)
        return torch.where(weight > 1e-13, first.square() / weight.clamp_min(1e-300), torch.zeros_like(first))


def sort(values: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in ascending order and their weights with them: two (out, n) float32.

    values: (out, n) float32. weights: (out, n), or (n,) for all rows, or None for equal ones.
    """
    ordered, index = values.sort(1)
    if weights is None:
        return ordered, torch.ones_like(ordered)
    return ordered, weights.expand(values.shape).gather(1, index)


def start(runs: Runs, k: int, init: Init) -> Tensor:
    """Borders to begin with: (out, k + 1) int64."""
    values = runs.values
    out, count = values.shape
    if init == "even":
        share = torch.linspace(0, 1, k, device=values.device)
        return runs.nearest(values[:, :1] + (values[:, -1:] - values[:, :1]) * share)
    if init == "quantile":
        return (torch.arange(k + 1, device=values.device) * count // k).expand(out, -1).contiguous()
    if k & (k - 1):
        raise ValueError(f"a tree of cuts has 2**b clusters, not {k}")
    borders = torch.tensor([0, count], device=values.device).expand(out, -1).contiguous()
    while borders.shape[1] - 1 < k:
        borders = runs.split(borders)
    return borders


def lloyd(runs: Runs, borders: Tensor, rounds: int = 100) -> Tensor:
    """Move borders between the means of the runs beside them until none moves: (out, k + 1) int64; the cost only falls."""
    for _ in range(rounds):
        moved = runs.nearest(runs.means(borders))
        if torch.equal(moved, borders):
            break
        borders = moved
    return borders
