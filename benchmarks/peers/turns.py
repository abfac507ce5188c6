"""Who runs when. A pure function."""

from collections.abc import Mapping, Sequence
from typing import Any

PAIRED = ("8", "q8_0"), ("4", "q4_0"), ("3", "q3_k_m"), ("2", "q2_k")


def turn(contenders: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Order of one round: those that are compared run one after the other, and no place belongs to anyone.

    Rounds begin with another pair each time, and in every second round the other one of a pair goes first.
    """
    pairs = [[c for c in contenders if c["contender"].split()[-1] in pair] for pair in PAIRED]
    rest = [c for c in contenders if not any(c in pair for pair in pairs)]
    groups = [pair for pair in pairs if pair] + [[c] for c in rest]
    if not groups:
        return []
    shift = number % len(groups)
    groups = groups[shift:] + groups[:shift]
    return [c for group in groups for c in (group if number % 2 == 0 else group[::-1])]
