"""Attention against float64, and what its bits must not depend on."""

import numpy as np
import pytest

from lilliput.engine import native


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, cap: float) -> np.ndarray:
    """Attention of one query in float64."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    scores = k @ q * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return p @ v


def rounded(x: np.ndarray) -> np.ndarray:
    """What an int8 cache keeps of (positions, head_dim)."""
    most = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / most))
    return (codes * (most / np.float32(127))).astype(np.float32)


def on_grid(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to 4 bits along `axis`, with float16 scale and minimum; and the sizes of the two terms added up."""
    least, most = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    zero = least.astype(np.float16).astype(np.float32)
    scale = ((most - least) / np.float32(15)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.clip(np.rint((x - zero) * inverse), 0, 15)
    return zero + codes * scale, np.abs(zero) + codes * scale


def seen_at(position: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values (positions, head_dim) as a query at `position` finds them in an int4 cache, and their sizes."""
    k, v, k_size, v_size = k.copy(), v.copy(), np.abs(k), np.abs(v)
    for start in range(native.GROUP, position // native.GROUP * native.GROUP, native.GROUP):
        group = slice(start, start + native.GROUP)
        k[group], k_size[group] = on_grid(k[group], axis=0)
        for first in range(0, k.shape[1], native.GROUP):
            block = slice(first, first + native.GROUP)
            v[group, block], v_size[group, block] = on_grid(v[group, block], axis=1)
    return k, v, k_size, v_size


@pytest.mark.parametrize("variant", native.variants("attention"))
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
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
    k_size, v_size, own_k, own_v = np.abs(k), np.abs(v), k, v
    for n in range(queries):
        last = position + n
        first = max(0, last - window + 1) if window else 0
        if kv == "int4":
            k, v, k_size, v_size = seen_at(last, own_k, own_v)
        for head in range(3):
            expected = exact(q[n, head], k[first : last + 1], v[first : last + 1], scale, cap)
            # how much an error of one float32 unit in every score can move it
            reach = float((k_size[first : last + 1] @ np.abs(q[n, head])).max() * scale)
            # each weight is off by the error of its score, of exp (2 ulp), of one factor a page, and of the sums over
            # keys, all relative; a rounded cache has two more factors in every product
            pages = last // native.PAGE - first // native.PAGE + 1
            relative = 2**-24 * (2 * (dim + 8) * reach + 12 + 8 * pages + 2 * (last - first + 1))
            assert (np.abs(y[n, head] - expected) <= relative * v_size[first : last + 1].max()).all()


@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
@pytest.mark.parametrize("window", [0, 40, 100])
def test_variants_shares_and_chunks_agree_bit_for_bit(window: int, kv: native.KV) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((150, 5, 40), dtype=np.float32)
    k, v = rng.standard_normal((2, 400, 40), dtype=np.float32)
    whole = native.attention(q, k, v, position=90, window=window, scale=0.2, kv=kv, share=1, variant="reference")
    for variant in native.variants("attention"):
        for share in (1, 3, 16, 128):
            y = native.attention(q, k, v, position=90, window=window, scale=0.2, kv=kv, share=share, variant=variant)
            assert np.array_equal(y, whole)
        for n in (0, 37, 149):  # alone, one head alone
            y = native.attention(
                q[n : n + 1, 2:3], k, v, position=90 + n, window=window, scale=0.2, kv=kv, variant=variant
            )
            assert np.array_equal(y[0, 0], whole[n, 2])


@pytest.mark.parametrize("variant", native.variants("attention"))
@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
def test_keys_and_values_out_of_sight_do_not_matter_even_if_they_are_no_numbers(kv: native.KV, variant: str) -> None:
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 4, 24), dtype=np.float32)
    k, v = rng.standard_normal((2, 300, 24), dtype=np.float32)
    for position, window in [(0, 0), (100, 70), (126, 0), (190, 64)]:
        first, last = max(0, position - window + 1) if window else 0, position + 1
        other_k, other_v = k.copy(), v.copy()
        # an int4 cache rounds keys together that a window parts
        whole = first // native.GROUP * native.GROUP if kv == "int4" and first > native.GROUP else first
        other_k[:whole], other_v[:first], other_k[last + 1 :], other_v[last + 1 :] = np.nan, np.inf, np.inf, np.nan
        alone, same = (
            native.attention(q, *kept, position=position, window=window, scale=0.2, kv=kv, variant=variant)
            for kept in ((k, v), (other_k, other_v))
        )
        assert np.array_equal(alone, same)


@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
@pytest.mark.parametrize("at", [3, 40, 69])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_no_number_is_not_lost(kv: native.KV, at: int, where: str) -> None:
    k, v = np.ones((2, 70, 8), dtype=np.float32)
    (k if where == "keys" else v)[at, 2] = np.nan
    y = native.attention(np.ones((1, 1, 8), np.float32), k, v, position=69, scale=1.0, kv=kv)
    assert np.isnan(y[0, 0, 2])


def test_equal_scores_give_the_mean_and_huge_ones_do_not_overflow() -> None:
    v = np.arange(200, dtype=np.float32)[:, None]
    flat = native.attention(np.zeros((1, 1, 1), np.float32), v, v, position=199, scale=1.0)
    assert flat[0, 0, 0] == pytest.approx(99.5, rel=1e-5)
    for kv in ("float", "int8", "int4"):
        sharp = native.attention(np.full((1, 1, 1), 1e5, np.float32), v, v, position=199, scale=1.0, kv=kv)
        assert sharp[0, 0, 0] == pytest.approx(199, rel=1e-6)


def test_an_int4_cache_is_the_float_one_while_nothing_is_rounded() -> None:
    """Queries of the first 64 positions find the first group and their own in float32: not a bit differs."""
    rng = np.random.default_rng(2)
    q = rng.standard_normal((100, 3, 40), dtype=np.float32)
    k, v = rng.standard_normal((2, 100, 40), dtype=np.float32)
    for variant in native.variants("attention"):
        exact_y, rounded_y = (
            native.attention(q, k, v, position=0, scale=0.2, kv=kv, variant=variant) for kv in ("float", "int4")
        )
        assert np.array_equal(exact_y[:64], rounded_y[:64])
        assert not (exact_y[64:] == rounded_y[64:]).all(axis=(1, 2)).any()


def test_groups_of_equal_and_of_tiny_values_keep_them() -> None:
    """A range of nothing has a scale of 0; what float16 holds comes back as it was."""
    q = np.ones((1, 1, 8), np.float32)
    k, v = np.zeros((200, 8), np.float32), np.full((200, 8), -2.5, np.float32)
    y = native.attention(q, k, v, position=199, scale=1.0, kv="int4")
    assert y == pytest.approx(-2.5, rel=1e-5)
    k[:, 1], v[:, 1] = 1e-9, 1e-9
    y = native.attention(q, k, v, position=199, scale=1.0, kv="int4")
    assert np.isfinite(y).all()
    v[:] = 1e6  # beyond float16: lost, but not in silence
    assert np.isnan(native.attention(q, k, v, position=199, scale=1.0, kv="int4")).all()
