"""The knapsack that gives layers their widths."""

from itertools import product

import numpy as np
import pytest

from lilliput.pipeline.allocate import Choice, Frontier, falling, fit, spread


def layers(seed: int, count: int = 6, scale: int = 1000) -> list[list[Choice]]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        weights, feels = int(draw.integers(10, scale)), float(draw.exponential())
        found.append([Choice(b, b * weights + int(draw.integers(5)), feels * 4.0**-b) for b in (2, 3, 4, 8)])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_budget_gets_what_trying_all_would_find(seed: int) -> None:
    given = layers(seed)
    frontier = Frontier(given)
    every = [(sum(c.cost for c in taken), sum(c.loss for c in taken)) for taken in product(*given)]
    low, high = min(c for c, _ in every), max(c for c, _ in every)
    assert frontier.best(low - 1) is None
    for budget in np.linspace(low, high + 10, 40).astype(int):
        point = frontier.best(int(budget))
        assert point is not None
        assert frontier.loss[point] == pytest.approx(min(loss for cost, loss in every if cost <= budget), rel=1e-12)


@pytest.mark.parametrize("states", [8, 100, 1 << 17])
def test_what_is_chosen_costs_and_loses_what_the_frontier_says_and_more_budget_never_loses_more(states: int) -> None:
    given = layers(7, count=30)
    frontier = Frontier(given, states)
    assert len(frontier.cost) <= states + 1
    assert (np.diff(frontier.cost) > 0).all()
    assert (np.diff(frontier.loss) < 0).all()
    for point in range(0, len(frontier.cost), max(1, len(frontier.cost) // 50)):
        widths = frontier.widths(point)
        taken = [next(c for c in own if c.bits == bits) for own, bits in zip(given, widths, strict=True)]
        assert sum(c.cost for c in taken) == frontier.cost[point]
        assert sum(c.loss for c in taken) == pytest.approx(frontier.loss[point], rel=1e-9)
    assert frontier.widths(0) == [2] * 30  # the cheapest is there, however few states are kept


def test_one_layer_that_feels_much_more_gets_the_bits() -> None:
    given = [[Choice(b, 100 * b, feels * 4.0**-b) for b in (2, 3, 4, 8)] for feels in (1.0, 1.0, 1000.0, 1.0)]
    frontier = Frontier(given)
    point = frontier.best(4 * 300)
    assert point is not None
    assert frontier.widths(point)[2] == 4
    assert frontier.loss[point] < 0.5 * 1003 * 4.0**-3  # what 3 bits for all would lose


def test_a_size_that_is_more_than_the_sum_of_costs_is_kept_to() -> None:
    frontier = Frontier(layers(3))

    def size(point: int) -> int:  # whole pages of 64 and a header
        return -(-int(frontier.cost[point]) // 64) * 64 + 100

    least = size(0)
    assert fit(frontier, least - 1, size) is None
    for limit in range(least, size(len(frontier.cost) - 1) + 200, 97):
        point = fit(frontier, limit, size)
        assert point is not None
        assert size(point) <= limit
        assert point + 1 == len(frontier.cost) or frontier.cost[point + 1] > limit - 100 - 2 * 64


def test_noise_that_rises_with_the_width_is_pooled() -> None:
    assert falling([4.0, 1.0, 2.0, 0.5]) == [4.0, 1.5, 1.5, 0.5]
    assert falling([1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]
    assert falling([3.0, 2.0, 1.0]) == [3.0, 2.0, 1.0]


def test_a_report_shows_both_ends_of_the_frontier() -> None:
    frontier = Frontier(layers(1))
    points = spread(frontier, 5)
    assert points[0] == 0
    assert points[-1] == len(frontier.cost) - 1
    assert len(points) <= 5


def test_a_layer_without_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="every layer needs a choice"):
        Frontier([[Choice(2, 1, 1.0)], []])
