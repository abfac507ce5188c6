import itertools

import pytest
import torch
from torch import Tensor

from lilliput.numerics.clusters import Init, Runs, lloyd, sort, start


def heavy(out: int = 7, count: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(out, count, generator=generator) ** 3 + 5
    return sort(values, torch.rand(count, generator=generator) ** 4)


def kmeans(values: Tensor, weights: Tensor | None, k: int, init: Init) -> Tensor:
    runs = Runs(*sort(values, weights))
    return runs.means(lloyd(runs, start(runs, k, init)))


def spread(values: Tensor, weights: Tensor, centres: Tensor) -> float:
    """Weighted squared distance to the nearest centre, one row, in float64."""
    distance = (values.double()[:, None] - centres.double()[None]).square().amin(1)
    return float((distance * weights.double()).sum() / weights.double().sum())


def test_sums_agree_with_the_points() -> None:
    values, weights = heavy()
    runs = Runs(values, weights)
    borders = start(runs, 4, "quantile")
    means, cost = runs.means(borders), runs.cost(borders)
    for row in range(len(values)):
        total = 0.0
        for j, (a, b) in enumerate(borders[row].unfold(0, 2, 1).tolist()):
            v, w = values[row, a:b].double(), weights[row, a:b].double()
            mean = float((v * w).sum() / w.sum())
            assert float(means[row, j]) == pytest.approx(mean, rel=1e-5)
            total += float((w * (v - mean) ** 2).sum())
        assert float(cost[row]) == pytest.approx(total / float(weights[row].double().sum()), rel=1e-6)


def test_a_split_is_the_best_of_all_splits() -> None:
    values, weights = heavy()
    runs = Runs(values, weights)
    borders = start(runs, 2, "quantile")
    made = runs.split(borders)
    assert torch.equal(made[:, ::2], borders)
    for row in range(len(values)):
        one = Runs(values[row : row + 1], weights[row : row + 1])
        for a, b in borders[row].unfold(0, 2, 1).tolist():
            costs = [float(one.cost(torch.tensor([[0, a, t, b, values.shape[1]]]))) for t in range(a + 1, b + 1)]
            cut = int(made[row][(made[row] > a) & (made[row] <= b)].amin())
            assert costs[cut - a - 1] == pytest.approx(min(costs), rel=1e-9)


@pytest.mark.parametrize("init", ["quantile", "even", "tree"])
def test_lloyd_only_lowers_the_cost_and_its_means_are_nearest(init: Init) -> None:
    values, weights = heavy()
    runs = Runs(values, weights)
    borders = start(runs, 8, init)
    costs = [runs.cost(borders)]
    for _ in range(5):
        borders = lloyd(runs, borders, 1)
        costs.append(runs.cost(borders))
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(costs))
    centres = runs.means(lloyd(runs, borders))
    assert bool((centres.diff(dim=1) >= 0).all())
    for row in range(len(values)):
        assert spread(values[row], weights[row], centres[row]) <= float(costs[0][row]) * (1 + 1e-6)


def test_two_clusters_of_the_tree_are_the_best_there_are() -> None:
    values, weights = heavy()
    made = kmeans(values, weights, 2, "tree")
    for row in range(len(values)):
        one = Runs(values[row : row + 1], weights[row : row + 1])
        best = min(float(one.cost(torch.tensor([[0, t, values.shape[1]]]))) for t in range(1, values.shape[1]))
        assert spread(values[row], weights[row], made[row]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("init", ["quantile", "even", "tree"])
def test_the_order_of_the_values_and_the_size_of_the_weights_do_not_matter(init: Init) -> None:
    values, weights = heavy()
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(1))
    made = kmeans(values, weights, 4, init)
    assert torch.allclose(made, kmeans(values[:, shuffled], 3e-9 * weights[:, shuffled], 4, init), rtol=1e-5)


@pytest.mark.parametrize("init", ["quantile", "even", "tree"])
def test_equal_values_missing_weights_and_few_values_do_no_harm(init: Init) -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    for weights in (None, torch.zeros(5), torch.tensor([0.0, 0.0, 1e-30, 0.0, 0.0])):
        made = kmeans(values, weights, 8, init)
        assert bool(torch.isfinite(made).all())
        assert bool((made.diff(dim=1) >= 0).all())
        assert bool((made[0] == 1).all())
        assert bool(((made >= values.amin(1, keepdim=True)) & (made <= values.amax(1, keepdim=True))).all())


def test_a_tree_has_a_power_of_two_of_leaves() -> None:
    with pytest.raises(ValueError, match="not 6"):
        kmeans(*heavy(), 6, "tree")
