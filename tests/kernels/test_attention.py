import numpy as np
import pytest

from lilliput.engine import native


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, last: int, scale: float, cap: float
) -> tuple[np.ndarray, float]:
    """Attention in float64, and how much an error of one float32 unit in every score can move it."""
    q, k, v = (a.astype(np.float64) for a in (q, k[first : last + 1], v[first : last + 1]))
    scores = k @ q * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return p @ v, float((np.abs(k) @ np.abs(q)).max() * scale)


@pytest.mark.parametrize("variant", native.variants("attention"))
@pytest.mark.parametrize("dim", [1, 8, 24, 64, 80])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 15), (0, 16), (3, 77), (255, 256), (0, 300), (250, 599)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_one_query_is_within_the_rounding_of_its_sums(
    dim: int, first: int, last: int, cap: float, variant: str
) -> None:
    rng = np.random.default_rng(dim + last)
    q = rng.standard_normal(dim, dtype=np.float32)
    k, v = rng.standard_normal((2, 600, dim), dtype=np.float32)
    scale = dim**-0.5
    y = native.attention(q, k, v, first=first, last=last, scale=scale, softcap=cap, variant=variant)
    expected, reach = exact(q, k, v, first, last, scale, cap)
    # each weight is off by the error of its score, of exp (2 ulp) and of the sums over keys, all relative
    relative = 2**-24 * (2 * (dim + 4) * reach + 8 + 2 * (last - first + 1))
    assert (np.abs(y - expected) <= relative * np.abs(v[first : last + 1]).max()).all()


def test_variants_agree_bit_for_bit_and_keys_outside_the_range_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal(40, dtype=np.float32)
    k, v = rng.standard_normal((2, 400, 40), dtype=np.float32)
    for first, last in [(0, 5), (17, 390), (100, 260)]:
        other_k, other_v = k.copy(), v.copy()
        other_k[:first], other_v[:first], other_k[last + 1 :], other_v[last + 1 :] = 9, 9, -9, 9
        alone = native.attention(q, k, v, first=first, last=last, scale=0.2, variant="reference")
        for variant in native.variants("attention"):
            for keys, values in [(k, v), (other_k, other_v)]:
                y = native.attention(q, keys, values, first=first, last=last, scale=0.2, variant=variant)
                assert np.array_equal(y, alone)


def test_equal_scores_give_the_mean_and_huge_ones_do_not_overflow() -> None:
    v = np.arange(200, dtype=np.float32)[:, None]
    flat = native.attention(np.zeros(1, np.float32), v, v, first=0, last=199, scale=1.0)
    assert flat[0] == pytest.approx(99.5, rel=1e-5)
    sharp = native.attention(np.full(1, 1e5, np.float32), v, v, first=0, last=199, scale=1.0)
    assert sharp[0] == 199
