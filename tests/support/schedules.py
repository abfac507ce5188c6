"""Schedules that decide by the beginning of an answer, of random numbers: for tests of whatever follows one."""

from typing import Any

import numpy as np

from lilliput.engine.schedules.features import Features, all_choices, features_of
from lilliput.engine.schedules.learned import Learned

GRID = (0, 10, 20, 30)


def learned(heads: int = 2, dim: int = 16, seed: int = 0, **options: Any) -> Learned:
    draw = np.random.default_rng(seed)
    shapes = {"query": (heads, dim), "inv_freq": (dim // 2,), "mean": (heads * dim,), "spread": (heads * dim,)}
    shapes |= {"hidden": (8, heads * dim), "hidden_bias": (8,), "out": (8, 8), "out_bias": (8,)}
    weights = {name: draw.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["spread"] = np.abs(weights["spread"]) + 1
    return Learned(**{"ladder": (4, 3, 2), "horizon": 30, "grid": GRID, "weights": weights, **options})


def features(watch: int, slope: float = 0.0) -> Features:
    """Losses fall with the entropy of the first forward; a step is worth its price in bits."""
    choices, count = all_choices(GRID, 2), len(features_of(1, [(0.0, 1.0)] * (watch + 1)))
    bits = np.array([2 + (a + b) / 30 for a, b in choices])
    weights = {"mean": np.zeros(count), "spread": np.ones(count), "slope": np.zeros((len(choices), count))}
    weights["slope"][:, 1] = slope * (30 - bits)
    weights |= {"intercept": np.zeros(len(choices)), "bits": bits}
    return Features(
        ladder=(4, 3, 2),
        horizon=30,
        grid=GRID,
        watch=watch,
        price=1.0,
        weights={name: array.astype(np.float32) for name, array in weights.items()},
    )
