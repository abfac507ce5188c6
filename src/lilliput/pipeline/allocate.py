"""Which width each layer gets, so that the loss predicted is least and the bytes stay inside a budget (NumPy).

Every layer offers choices, each with its bytes and the loss it is predicted to add; one is taken of each. The best sum
of losses for every sum of bytes follows from layer to layer: a partial sum that costs no less than another and loses no
less can be dropped, since whatever completes it completes the other as well. What is left in the end is the frontier of
all budgets at once.

Source: the multiple-choice knapsack by dynamic programming over undominated states, Kellerer, Pferschy and Pisinger,
"Knapsack Problems", 2004, chapter 11. That the losses of layers add up is an approximation; see docs/budgets.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STATES = 1 << 17
"""Partial sums kept a layer. Layers of one model share their shapes and so their costs, which keeps sums few; where
they are more than this, the best of each of this many intervals of cost stays, which keeps to every budget as well."""


@dataclass(frozen=True)
class Choice:
    """One way to store one layer: its width in bits, the bytes it takes, the loss it is predicted to add in nats."""

    bits: int
    cost: int
    loss: float


class Frontier:
    """The best choices for every budget. cost: (points,) int64, ascending; loss: (points,) float64, descending."""

    def __init__(self, layers: Sequence[Sequence[Choice]], states: int = STATES) -> None:
        if not layers or not all(layers):
            raise ValueError("every layer needs a choice, and there must be a layer")
        self._layers = layers
        self._steps: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]] = []
        self.cost, self.loss = np.zeros(1, np.int64), np.zeros(1)
        for choices in layers:
            self._take(choices, states)

    def _take(self, choices: Sequence[Choice], states: int) -> None:
        cost = (self.cost[:, None] + np.array([c.cost for c in choices], np.int64)).ravel()
        loss = (self.loss[:, None] + np.array([c.loss for c in choices])).ravel()
        order = np.lexsort((loss, cost))  # stable: of equals the one whose earlier layers are cheaper
        cost, loss = cost[order], loss[order]
        lowest = np.minimum.accumulate(loss)
        keep = np.flatnonzero(np.concatenate(([True], loss[1:] < lowest[:-1])))
        if len(keep) > states:
            place = (cost[keep] - cost[keep[0]]) * (states - 1) // max(1, int(cost[keep[-1]] - cost[keep[0]]))
            last = np.concatenate((place[1:] != place[:-1], [True]))
            last[0] = True  # the cheapest of all must stay
            keep = keep[last]
        self.cost, self.loss = cost[keep], loss[keep]
        chosen = order[keep]
        self._steps.append(((chosen // len(choices)).astype(np.int32), (chosen % len(choices)).astype(np.int8)))

    def best(self, budget: int) -> int | None:
        """The point of least loss that costs at most `budget`; None where even the cheapest costs more."""
        at = int(np.searchsorted(self.cost, budget, side="right"))
        return at - 1 if at else None

    def widths(self, point: int) -> list[int]:
        """The width of every layer at that point of the frontier."""
        found = []
        for (parent, choice), choices in zip(reversed(self._steps), reversed(self._layers), strict=True):
            found.append(choices[choice[point]].bits)
            point = int(parent[point])
        return found[::-1]


def fit(frontier: Frontier, limit: int, size: Callable[[int], int]) -> int | None:
    """A point whose `size`, its cost and what no layer's choice decides alone, is at most `limit`; None where none is.

    size: bytes as they will be stored, at least the point's cost. Alignment makes it no function of the cost, so it is
    asked again after every step down, and the point found is the last that fits but for the alignment of its tensors.
    """
    budget = limit
    while (point := frontier.best(budget)) is not None:
        over = size(point) - limit
        if over <= 0:
            return point
        budget = int(frontier.cost[point]) - over
    return 0 if size(0) <= limit else None  # a step may be longer than what is left below, by the padding in it


def falling(losses: Sequence[float]) -> list[float]:
    """Losses of ascending widths with noise taken out: none above that of a narrower width.

    Two that rise are replaced by their mean, again and again (the pool-adjacent-violators rule), so what is measured
    about both is kept.
    """
    pools: list[list[float]] = []
    for loss in losses:
        pools.append([loss])
        while len(pools) > 1 and _mean(pools[-1]) > _mean(pools[-2]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [_mean(pool) for pool in pools for _ in pool]


def spread(frontier: Frontier, count: int) -> list[int]:
    """Up to `count` points of the frontier, evenly apart in cost, its two ends among them."""
    marks = np.linspace(float(frontier.cost[0]), float(frontier.cost[-1]), count)
    return sorted({int(np.searchsorted(frontier.cost, mark + 0.5, side="right")) - 1 for mark in marks})


def _mean(pool: Sequence[float]) -> float:
    return sum(pool) / len(pool)
