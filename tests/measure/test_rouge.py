"""ROUGE-L beside its definition."""

import random
from itertools import combinations

import pytest

from lilliput.measure.rouge import common_subsequence, rouge_l


def longest(a: list[int], b: list[int]) -> int:
    """By the definition: the longest choice of places of a that stands in b in order."""
    for size in range(len(a), 0, -1):
        for kept in combinations(a, size):
            rest = iter(b)
            if all(token in rest for token in kept):
                return size
    return 0


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 2, 3, 4], [4, 3, 2, 1], 1),
        ([1, 2, 3, 4], [1, 9, 3, 9, 4], 3),
        ([], [1], 0),
        ([7, 7, 7], [7], 1),
        ([5, 1, 2], [1, 2, 5], 2),
    ],
)
def test_cases_by_hand(a: list[int], b: list[int], common: int) -> None:
    assert common_subsequence(a, b) == common_subsequence(b, a) == common
    assert rouge_l(a, b) == 2 * common / (len(a) + len(b))


def test_two_empty_texts_are_the_same() -> None:
    assert rouge_l([], []) == 1


def test_equals_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.randrange(4) for _ in range(draw.randrange(9))] for _ in range(2))
        assert common_subsequence(a, b) == longest(a, b)


def test_long_texts_take_no_time() -> None:
    text = [i % 300 for i in range(4000)]
    assert common_subsequence(text, text[::2]) == 2000
