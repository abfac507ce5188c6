"""Who runs when. A pure function."""

from collections.abc import Mapping, Sequence
from typing import Any

COMPARED = ("8", "q8_0", "int8"), ("4", "q4_0", "int4"), ("3", "q3_k_m"), ("2", "q2_k")


def turn(contenders: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Order of one round: those that are compared run one after the other, and no place belongs to anyone.

    Rounds begin with another group each time, and every second round goes through a group the other way round.
    """
    alike = [[c for c in contenders if c["contender"].split()[-1] in names] for names in COMPARED]
    rest = [c for c in contenders if not any(c in group for group in alike)]
    groups = [group for group in alike if group] + [[c] for c in rest]
    if not groups:
        return []
    shift = number % len(groups)
    groups = groups[shift:] + groups[:shift]
    return [c for group in groups for c in (group if number % 2 == 0 else group[::-1])]
