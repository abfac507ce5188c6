"""Every operation of the integer arithmetic against Python's own integers and fractions, and against the real numbers."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.core.graph import Attend, Grid, Rotate
from lilliput.numerics import fixed

RNG = np.random.default_rng(0)
G8 = Grid(bits=8, scale=0.05, zero=-7)
G16 = Grid(bits=16, scale=0.001, zero=123)


def codes_of(grid: Grid, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(grid.low, grid.high + 1, shape)


def held(value: int, grid: Grid) -> int:
    return min(max(value + grid.zero, grid.low), grid.high)


def rq(a: int, m: int, s: int) -> int:
    return (a * m + 2 ** (s - 1)) // 2**s


@given(st.floats(1e-30, 2.0**22 - 1, allow_subnormal=False))
def test_a_multiplier_is_the_nearest_there_is(factor: float) -> None:
    m, s = fixed.multiplier(factor)
    assert 1 <= s <= 62
    assert 0 <= m < 2**23
    if factor >= 2.0**-40:
        assert m >= 2**22
        assert abs(Fraction(m, 2**s) - Fraction(factor)) <= Fraction(factor) / 2**22 / 2
    else:
        assert s == 62
        assert abs(Fraction(m, 2**s) - Fraction(factor)) <= Fraction(1, 2**63)


@pytest.mark.parametrize("factor", [2.0**22, math.inf, math.nan, -1.0])
def test_factors_without_a_multiplier_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="a factor"):
        fixed.multiplier(factor)


def test_a_factor_just_below_a_power_of_two_rounds_to_it() -> None:
    assert fixed.multiplier(math.nextafter(1.0, 0)) == (2**22, 22)


def test_requantize_equals_python_integers_up_to_its_limit() -> None:
    a = np.concatenate([RNG.integers(-(2**39), 2**39, 500), [2**39, -(2**39), 0, 1, -1]])
    for m, s in [(2**23 - 1, 1), (2**22, 22), (2**23 - 1, 62), (0, 62), (2**22 + 3, 40)]:
        assert fixed.requantize(a, m, s).tolist() == [rq(int(x), m, s) for x in a]
    with pytest.raises(ValueError, match="cannot be rescaled"):
        fixed.requantize(np.array([2**39 + 1]), 1, 1)


@given(st.integers(0, 2**62 - 1))
def test_isqrt_and_bit_length_are_those_of_python(x: int) -> None:
    around = np.array([x, max(x - 1, 0), math.isqrt(x) ** 2, max(math.isqrt(x) ** 2 - 1, 0)])
    assert fixed.isqrt(around).tolist() == [math.isqrt(int(y)) for y in around]
    assert fixed.bit_length(around).tolist() == [int(y).bit_length() for y in around]


@pytest.mark.parametrize("grid", [G8, G16])
@pytest.mark.parametrize("blas", [True, False])
def test_a_linear_layer_equals_python_integers(grid: Grid, blas: bool) -> None:
    x, w = codes_of(grid, 3, 70), RNG.integers(-128, 128, (5, 70), dtype=np.int8)
    bias, m = RNG.integers(-(10**6), 10**6, 5), RNG.integers(2**22, 2**23, 5).astype(np.int32)
    s = np.array([30, 31, 35, 40, 45], np.int8)
    found = fixed.linear(x, w, bias, m, s, G16, blas=blas)
    for i in range(3):
        for n in range(5):
            total = sum(int(a) * int(b) for a, b in zip(x[i], w[n], strict=True)) + int(bias[n])
            assert found[i, n] == held(rq(total, int(m[n]), int(s[n])), G16)


def test_sums_too_large_for_floats_are_taken_in_integers() -> None:
    a, b = np.full((1, 3), 2**30), np.array([[2**30, 2**30, 1]])
    assert fixed.matmul(a, b, 2**60, blas=True).item() == 2**61 + 2**30


def exact_norm(row: list[int], gain: list[int], offset: list[int] | None, kind: str, eps: int, h: int) -> list[int]:
    n = len(row)
    if kind == "layer":
        c = (64 * sum(row) + n // 2) // n
        row = [64 * d - c for d in row]
    s = max(sum(d * d for d in row) + eps, 1)
    e = (62 - s.bit_length()) // 2 * 2
    inverse, t = 2**61 // math.isqrt(s << e), 31 - e // 2
    u = [(d * inverse + 2 ** (t - 1)) >> t for d in row]
    return [(u[i] * gain[i] + (offset[i] if offset else 0) + 2 ** (h - 1)) >> h for i in range(n)]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_norm_equals_python_integers_and_is_near_the_real_one(kind: str, biased: bool, heads: int) -> None:
    x, n = codes_of(G16, 6, 32), 32 // heads
    x[0], x[1] = G16.zero, G16.zero + 1  # nothing at all, and one value everywhere
    x[2, 1:] = G16.zero  # one channel alone
    weight, bias = RNG.normal(1, 0.3, 32), RNG.normal(0, 0.5, 32) if biased else None
    gain, offset, eps, shift = fixed.norm_constants(kind, weight, bias, n, 1e-5, G16, G8)
    found = fixed.norm(x, G16, gain, offset, G8, kind=kind, heads=heads, eps=eps, shift=shift)
    for i in range(len(x)):
        for head in range(heads):
            at = slice(head * n, head * n + n)
            row = [int(v) - G16.zero for v in x[i, at]]
            own = None if offset is None else offset[at].tolist()
            exact = exact_norm(row, gain[at].tolist(), own, kind, eps, shift)
            assert found[i, at].tolist() == [held(v, G8) for v in exact]
    real = fixed.values(x, G16).reshape(len(x), heads, n)
    real = real - real.mean(-1, keepdims=True) if kind == "layer" else real
    real = (real / np.sqrt((real**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape) * weight
    real = np.clip(real + (0 if bias is None else bias), G8.scale * (G8.low - G8.zero), G8.scale * (G8.high - G8.zero))
    assert np.abs(fixed.values(found, G8) - real).max() <= G8.scale * 0.51


@pytest.mark.parametrize("value", [-(2**15), 2**15 - 1])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_largest_norms_do_not_overflow(kind: str, value: int) -> None:
    grid = Grid(bits=16, scale=1e-9, zero=-value - 1 if value > 0 else 2**15 - 1)
    x = np.full((1, 4096), value)
    x[0, ::2] = -value - 1
    gain, offset, eps, shift = fixed.norm_constants(kind, np.ones(4096), None, 4096, 1.0, grid, G8)
    assert eps == 2**61
    row = [int(v) - grid.zero for v in x[0]]
    exact = [held(v, G8) for v in exact_norm(row, gain.tolist(), None, kind, eps, shift)]
    found = fixed.norm(x, grid, gain, offset, G8, kind=kind, heads=1, eps=eps, shift=shift)
    assert found[0].tolist() == exact


def test_a_rotation_equals_python_integers_and_is_near_the_real_one() -> None:
    freqs, dim, width = (1.0, 0.1), 4, 6
    cos, sin = fixed.turns(freqs, 9)
    to = Grid(bits=16, scale=0.0011, zero=0)
    m, s = fixed.multiplier(1.25 * G16.scale / to.scale / 2**14)
    pm, ps = fixed.multiplier(G16.scale / to.scale / 2**14)
    node = Rotate(
        x="x", y="y", head_dim=width, dim=dim, multiplier=m, shift=s, plain_multiplier=pm, plain_shift=ps
    )  # fmt: skip
    x = np.random.default_rng(3).integers(-9000, 9000, (9, 2 * width))
    found = fixed.rotate(x, G16, cos, sin, node, to)
    for i in range(9):
        for head in range(2):
            row = [int(v) - G16.zero for v in x[i, head * width : head * width + width]]
            wanted = [0] * width
            for j in range(2):
                a, b, c, d = row[j], row[j + 2], int(cos[i, j]), int(sin[i, j])
                wanted[j], wanted[j + 2] = held(rq(a * c - b * d, m, s), to), held(rq(b * c + a * d, m, s), to)
                angle = i * freqs[j]
                real = 1.25 * G16.scale * (a * math.cos(angle) - b * math.sin(angle))
                assert abs(fixed.values(np.array(wanted[j]), to) - real) <= to.scale * (0.51 + 9000 * 2**-14)
            for j in (4, 5):
                wanted[j] = held(rq(row[j] << 14, pm, ps), to)
            assert found[i, head * width : head * width + width].tolist() == wanted


def attention(**changes: object) -> Attend:
    scores = Grid(bits=16, scale=0.0005, zero=-40)
    m, s = fixed.multiplier(0.4 * G8.scale * G8.scale / scores.scale)
    out = fixed.multiplier(G8.scale / (65535 * G8.scale))
    told = {
        "q": "q", "k": "k", "v": "v", "y": "y", "heads": 4, "kv_heads": 2, "head_dim": 3, "scores": scores,
        "multiplier": m, "shift": s, "scale": 0.4, "out_multiplier": out[0], "out_shift": out[1],
    }  # fmt: skip
    return Attend.model_validate(told | changes)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("one", [255, 65535])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("start", [0, 4])
def test_attention_equals_python_integers(window: int, one: int, capped: bool, start: int) -> None:
    cap_grid = Grid(bits=16, scale=0.0001, zero=5) if capped else None
    m, s = fixed.multiplier(1 / one)
    node = attention(
        window=window, probability=one, out_multiplier=m, out_shift=s, capped=cap_grid, softcap=3.0 if capped else None
    )
    hi, lo = fixed.exponentials((cap_grid or node.scores).scale)
    real = fixed.values(np.arange(-(2**15), 2**15), node.scores)
    cap = fixed.codes(3 * np.tanh(real / 3), cap_grid) if cap_grid else None
    keys = 7
    q, k, v = codes_of(G8, keys - start, 12, seed=1), codes_of(G8, keys, 6, seed=2), codes_of(G8, keys, 6, seed=3)
    told: list[np.ndarray] = []
    found = fixed.attend(q, k, v, (G8, G8, G8, G8), node, (hi, lo, cap), start=start, scores=told)
    assert np.array_equal(found, fixed.attend(q, k, v, (G8,) * 4, node, (hi, lo, cap), start=start, blas=False))
    for i in range(len(q)):
        for head in range(4):
            mine, kv = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
            seen = [j for j in range(keys) if j <= start + i and (not window or start + i - j < window)]
            t = {}
            for j in seen:
                dot = sum((int(a) - G8.zero) * (int(b) - G8.zero) for a, b in zip(q[i, mine], k[j, kv], strict=True))
                t[j] = held(rq(dot, node.multiplier, node.shift), node.scores)
                assert told[0][head, i, j] == t[j]
                if cap is not None:
                    t[j] = int(cap[t[j] + 2**15])
                    assert told[1][head, i, j] == t[j]
            delta = {j: max(t.values()) - t[j] for j in seen}
            e = {j: (int(hi[d >> 8]) * int(lo[d & 255]) + 2**15) >> 16 for j, d in delta.items()}
            p = {j: (e[j] * ((one << 31) // sum(e.values())) + 2**30) >> 31 for j in seen}
            for c in range(3):
                total = sum(p[j] * (int(v[j, kv][c]) - G8.zero) for j in seen)
                assert found[i, 3 * head + c] == held(rq(total, m, s), G8)


def test_attention_is_near_the_real_softmax_and_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    node, to = attention(), Grid(bits=16, scale=1e-3, zero=0)
    m, s = fixed.multiplier(G8.scale / (65535 * to.scale))
    node = node.model_copy(update={"out_multiplier": m, "out_shift": s})
    hi, lo = fixed.exponentials(node.scores.scale)
    q, k, v = codes_of(G8, 40, 12, seed=4), codes_of(G8, 40, 6, seed=5), codes_of(G8, 40, 6, seed=6)
    told: list[np.ndarray] = []
    found = fixed.attend(q, k, v, (G8, G8, G8, to), node, (hi, lo, None), start=0, scores=told)
    logits = fixed.values(told[0], node.scores)
    logits[:, ~np.tri(40, dtype=bool)] = -np.inf
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    real = np.concatenate([share[h] @ fixed.values(v, G8)[:, 3 * (h // 2) :][:, :3] for h in range(4)], axis=1)
    assert np.abs(fixed.values(found, to) - real).max() <= 2 * to.scale
    monkeypatch.setattr(fixed, "_CELLS", 500)
    again: list[np.ndarray] = []
    assert np.array_equal(
        found, fixed.attend(q, k, v, (G8, G8, G8, to), node, (hi, lo, None), start=0, scores=again)
    )
    assert np.array_equal(told[0], again[0])


def test_products_and_sums_equal_python_integers() -> None:
    a, b = codes_of(G8, 4, 9, seed=7), codes_of(G16, 4, 9, seed=8)
    m, s = fixed.multiplier(G8.scale * G16.scale / G8.scale)
    (m1, m2), shift = fixed.sum_constants([G8.scale, G16.scale], G16)
    assert max(m1, m2) < 2**30 <= 2 * max(m1, m2) + 1
    times, plus = fixed.multiply(a, G8, b, G16, m, s, G8), fixed.add([(a, G8), (b, G16)], (m1, m2), shift, G16)
    for i in range(4):
        for j in range(9):
            x, y = int(a[i, j]) - G8.zero, int(b[i, j]) - G16.zero
            assert times[i, j] == held(rq(x * y, m, s), G8)
            assert plus[i, j] == held((x * m1 + y * m2 + 2 ** (shift - 1)) >> shift, G16)


def test_a_table_is_looked_up_from_the_lowest_code_on() -> None:
    table = np.arange(256, dtype=np.int16)[::-1]
    assert fixed.look_up(np.array([-128, 0, 127]), table, 8).tolist() == [255, 127, 0]


def test_the_exponentials_fall_from_one_to_nothing() -> None:
    hi, lo = fixed.exponentials(0.001)
    assert (int(hi[0]), int(lo[0])) == (1 << 16, 1 << 16)
    assert all(a >= b for side in (hi, lo) for a, b in pairwise(side))
    delta = np.arange(1 << 16)
    product = (hi[delta >> 8].astype(np.int64) * lo[delta & 255] + 2**15) >> 16
    assert np.abs(product / 2**16 - np.exp(-delta * 0.001)).max() <= 1.5 * 2**-16 + 2**-40


@pytest.mark.parametrize("grid", [G8, G16])
def test_codes_and_values_are_each_others_inverse(grid: Grid) -> None:
    every = np.arange(grid.low, grid.high + 1)
    assert np.array_equal(fixed.codes(fixed.values(every, grid), grid), every)


def test_constants_that_nothing_holds_are_refused() -> None:
    tiny = Grid(bits=16, scale=1e-30, zero=0)
    with pytest.raises(ValueError, match="too large beside the scale"):
        fixed.norm_constants("rms", np.full(8, 1.0), None, 8, 1e-5, G16, tiny)
    with pytest.raises(ValueError, match="too large beside the scale"):
        fixed.sum_constants([1.0], tiny)
