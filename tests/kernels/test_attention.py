"""Attention against float64, and what its bits must not depend on."""

import numpy as np
import pytest

from lilliput.engine import native


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, cap: float) -> tuple[np.ndarray, float]:
    """Attention of one query in float64, and how much an error of one float32 unit in every score can move it."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    scores = k @ q * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return p @ v, float((np.abs(k) @ np.abs(q)).max() * scale)


def rounded(x: np.ndarray) -> np.ndarray:
    """What an int8 cache keeps of (positions, head_dim)."""
    most = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / most))
    return (codes * (most / np.float32(127))).astype(np.float32)


@pytest.mark.parametrize("variant", native.variants("attention"))
@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("dim", [1, 8, 24, 64, 80, 130])
@pytest.mark.parametrize(
    ("position", "queries", "window"),
    [(0, 1, 0), (0, 5, 0), (15, 2, 0), (63, 3, 0), (64, 1, 1), (200, 7, 65), (300, 1, 0), (280, 20, 130), (290, 9, 12)],
)
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_queries_are_within_the_rounding_of_their_sums(
    dim: int, position: int, queries: int, window: int, cap: float, kv: native.KV, variant: str
) -> None:
    rng = np.random.default_rng(dim + position)
    q = rng.standard_normal((queries, 3, dim), dtype=np.float32)
    k, v = rng.standard_normal((2, 310, dim), dtype=np.float32)
    scale = dim**-0.5
    y = native.attention(q, k, v, position=position, window=window, scale=scale, softcap=cap, kv=kv, variant=variant)
    if kv == "int8":
        k, v = rounded(k), rounded(v)
    for n in range(queries):
        last = position + n
        first = max(0, last - window + 1) if window else 0
        for head in range(3):
            expected, reach = exact(q[n, head], k[first : last + 1], v[first : last + 1], scale, cap)
            # each weight is off by the error of its score, of exp (2 ulp), of one factor a page, and of the sums over
            # keys, all relative; an int8 cache has two more factors in every product
            pages = last // native.PAGE - first // native.PAGE + 1
            relative = 2**-24 * (2 * (dim + 8) * reach + 12 + 8 * pages + 2 * (last - first + 1))
            assert (np.abs(y[n, head] - expected) <= relative * np.abs(v[first : last + 1]).max()).all()


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("window", [0, 40, 100])
def test_variants_shares_and_chunks_agree_bit_for_bit(window: int, kv: native.KV) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((150, 5, 40), dtype=np.float32)
    k, v = rng.standard_normal((2, 400, 40), dtype=np.float32)
    whole = native.attention(q, k, v, position=90, window=window, scale=0.2, kv=kv, share=1, variant="reference")
    for variant in native.variants("attention"):
        for share in (1, 3, 16):
            y = native.attention(q, k, v, position=90, window=window, scale=0.2, kv=kv, share=share, variant=variant)
            assert np.array_equal(y, whole)
        for n in (0, 37, 149):  # alone, one head alone
            y = native.attention(
                q[n : n + 1, 2:3], k, v, position=90 + n, window=window, scale=0.2, kv=kv, variant=variant
            )
            assert np.array_equal(y[0, 0], whole[n, 2])


@pytest.mark.parametrize("variant", native.variants("attention"))
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_keys_and_values_out_of_sight_do_not_matter_even_if_they_are_no_numbers(kv: native.KV, variant: str) -> None:
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 4, 24), dtype=np.float32)
    k, v = rng.standard_normal((2, 300, 24), dtype=np.float32)
    for position, window in [(0, 0), (100, 70), (126, 0), (190, 64)]:
        first, last = max(0, position - window + 1) if window else 0, position + 1
        other_k, other_v = k.copy(), v.copy()
        other_k[:first], other_v[:first], other_k[last + 1 :], other_v[last + 1 :] = np.nan, np.inf, np.inf, np.nan
        alone, same = (
            native.attention(q, *kept, position=position, window=window, scale=0.2, kv=kv, variant=variant)
            for kept in ((k, v), (other_k, other_v))
        )
        assert np.array_equal(alone, same)


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_what_is_no_number_is_not_lost(kv: native.KV) -> None:
    k, v = np.ones((2, 70, 8), dtype=np.float32)
    v[3, 2] = np.nan
    y = native.attention(np.ones((1, 1, 8), np.float32), k, v, position=69, scale=1.0, kv=kv)
    assert np.isnan(y[0, 0, 2])


def test_equal_scores_give_the_mean_and_huge_ones_do_not_overflow() -> None:
    v = np.arange(200, dtype=np.float32)[:, None]
    flat = native.attention(np.zeros((1, 1, 1), np.float32), v, v, position=199, scale=1.0)
    assert flat[0, 0, 0] == pytest.approx(99.5, rel=1e-5)
    for kv in ("float", "int8"):
        sharp = native.attention(np.full((1, 1, 1), 1e5, np.float32), v, v, position=199, scale=1.0, kv=kv)
        assert sharp[0, 0, 0] == pytest.approx(199, rel=1e-6)
