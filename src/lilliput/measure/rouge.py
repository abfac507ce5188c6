"""ROUGE-L: how much of a text stands in another in the same order.

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.2, the F-measure of one sentence;
the longest common subsequence by Crochemore et al., "A fast and practical bit-vector algorithm for the longest common
subsequence problem", 2001.
Deviation: over token ids instead of stemmed words, so that it needs no language; precision and recall count alike.
"""

from collections.abc import Sequence


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest sequence that stands in both, gaps allowed."""
    places: dict[int, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    every = (1 << len(a)) - 1
    row = every  # bit i is 0 where one more of a[: i + 1] than of a[:i] is matched
    for token in b:
        met = row & places.get(token, 0)
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()


def rouge_l(written: Sequence[int], reference: Sequence[int]) -> float:
    """Return twice the common subsequence over both lengths, 0..1; 1 where both are empty."""
    total = len(written) + len(reference)
    return 2 * common_subsequence(written, reference) / total if total else 1.0
