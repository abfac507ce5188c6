import numpy as np
import pytest

from lilliput.core.errors import ConfigError
from lilliput.engine import Sampling, native

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def drawn(logits: np.ndarray = LOGITS, draws: int = 4000, **options: float) -> np.ndarray:
    """Shares of the tokens in many draws."""
    sampling = Sampling(**{"temperature": 1.0, "seed": 5} | options)
    return np.bincount(native.sample(logits, sampling, draws=draws), minlength=len(logits)) / draws


def close(shares: np.ndarray, expected: list[float]) -> bool:
    p = np.array(expected) / np.sum(expected)
    return bool((np.abs(shares - p) <= 4 * np.sqrt(p * (1 - p) / 4000)).all())  # four standard deviations; zeros exact


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert native.sample(LOGITS, Sampling(), draws=2) == [1, 1]
    assert native.sample(np.array([0, 3, 3], np.float32), Sampling()) == [1]


def test_shares_follow_the_distribution_after_each_cut() -> None:
    assert close(drawn(), [0.1, 0.4, 0.05, 0.25, 0.2])
    assert close(drawn(temperature=0.5), [0.01, 0.16, 0.0025, 0.0625, 0.04])
    assert close(drawn(top_k=2), [0, 0.4, 0, 0.25, 0])
    assert close(drawn(top_p=0.6), [0, 0.4, 0, 0.25, 0])
    assert close(drawn(top_p=0.7), [0, 0.4, 0, 0.25, 0.2])
    assert close(drawn(top_p=1e-6), [0, 1, 0, 0, 0])
    assert close(drawn(min_p=0.4), [0, 0.4, 0, 0.25, 0.2])
    assert close(drawn(top_k=4, top_p=0.9, min_p=0.6), [0, 0.4, 0, 0.25, 0])


def test_equal_logits_are_cut_by_the_lower_id() -> None:
    assert close(drawn(np.zeros(4, np.float32), top_k=2), [1, 1, 0, 0])


def test_a_seed_repeats_and_another_does_not() -> None:
    one, again, other = (native.sample(LOGITS, Sampling(temperature=1, seed=s), draws=50) for s in (1, 1, 2))
    assert one == again
    assert one != other


def uniform(seed: int, n: int) -> float:
    """Draw n of a seed: SplitMix64 of a counter, the top 53 bits."""
    mask = 2**64 - 1
    z = (seed * 0xD1342543DE82EF95 + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_draws_invert_the_distribution_at_a_counter_based_uniform() -> None:
    # what a seed means must not change between versions or machines, so the generator is spelled out
    edges = np.cumsum([0.1, 0.4, 0.05, 0.25, 0.2])
    expected = [int(np.searchsorted(edges, uniform(42, n), side="right")) for n in range(200)]
    assert native.sample(LOGITS, Sampling(temperature=1, seed=42), draws=200) == expected


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    assert native.sample(logits, Sampling(repetition_penalty=1.5), seen=[0]) == [1]
    low = np.array([-1.0, -1.5], np.float32)
    assert native.sample(low, Sampling(repetition_penalty=1.4), seen=[0, 0]) == [0]
    assert native.sample(low, Sampling(repetition_penalty=1.6), seen=[0]) == [1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_refused_with_a_fix(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^sampling\.{field}: .* is out of range\. Give .*\.$"):
        Sampling(**{field: value})
