"""Norms, rotation and elementwise functions against float64."""

import math

import numpy as np
import pytest

from lilliput.engine import native

ULP = 2.0**-23


@pytest.mark.parametrize("n", [1, 7, 16, 33, 300])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_is_its_formula(n: int, layer: bool, biased: bool) -> None:
    rng = np.random.default_rng(n)
    x, weight, bias = rng.standard_normal((3, n), dtype=np.float32)
    x += 2
    y = native.norm(x, weight, bias if biased else None, eps=1e-5, offset=1.0, layer=layer)
    wide = x.astype(np.float64)
    centred = wide - wide.mean() if layer else wide
    factor = (weight + np.float64(1)) / np.sqrt((centred**2).mean() + 1e-5)
    expected = centred * factor + (bias if biased else 0)
    # the mean is off by up to n units of its terms; 8 more for the other operations
    bound = (n + 8) * ULP * ((np.abs(wide).max() + 1) * np.abs(factor) + np.abs(expected) + 1)
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("n", [1, 16, 47, 300])
@pytest.mark.parametrize("layer", [False, True])
def test_variants_of_norm_agree_bit_for_bit(n: int, layer: bool) -> None:
    x, weight, bias = np.random.default_rng(n).standard_normal((3, n), dtype=np.float32)
    made = [
        native.norm(x, weight, bias, eps=1e-5, offset=0.5, layer=layer, variant=variant)
        for variant in native.variants("norm")
    ]
    for y in made[1:]:
        assert np.array_equal(made[0], y)


def test_rotary_turns_the_leading_channels_and_leaves_the_rest() -> None:
    x = np.random.default_rng(0).standard_normal(24, dtype=np.float32)
    inv_freq = (10000.0 ** (-np.arange(5) / 5)).astype(np.float32)
    y = native.rotary(x, inv_freq, position=777, scale=1.25)
    angle = (np.float32(777) * inv_freq).astype(np.float64)
    a, b = x[:5], x[5:10]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    np.testing.assert_allclose(y[:10], 1.25 * np.concatenate(turned), rtol=0, atol=8 * ULP * 1.25 * np.abs(x).max())
    assert np.array_equal(y[10:], x[10:])


GRID = np.concatenate([np.linspace(-30, 30, 4001), np.geomspace(1e-9, 1, 99), [-100.0, 100.0, 0.0, -0.0]])
ERF = np.vectorize(math.erf)
EXACT = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v / 2 * (1 + ERF(v / math.sqrt(2))),
    "gelu_tanh": lambda v: v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
}


@pytest.mark.parametrize("kind", EXACT)
def test_activations_are_their_formulas(kind: str) -> None:
    x = GRID.astype(np.float32)
    up = np.random.default_rng(0).standard_normal(len(x), dtype=np.float32)
    expected = EXACT[kind](x.astype(np.float64))
    bound = 12 * ULP * np.abs(x)  # a few units of x: the factor is within [0, 1] and loses what 1 + tanh cancels
    assert (np.abs(native.activation(kind, x) - expected) <= bound).all()
    assert (np.abs(native.activation(kind, x, up) - expected * up) <= 2 * bound * np.abs(up)).all()


def test_exponential_is_within_two_units_and_ends_in_zero() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(native.exponential(x) - expected) <= 2 * ULP * expected).all()
    ends = native.exponential(np.array([-88, -np.inf, 0, np.nan, np.inf], np.float32))
    assert list(ends[:3]) == [0, 0, 1]
    assert np.isnan(ends[3])
    assert np.isfinite(ends[4])


def test_softcap_keeps_small_values_and_bounds_large_ones() -> None:
    x = np.concatenate([GRID, GRID * 1e3]).astype(np.float32)
    expected = 30 * np.tanh(x.astype(np.float64) / 30)
    assert (np.abs(native.softcap(x, 30.0) - expected) <= 4 * ULP * np.abs(expected)).all()
