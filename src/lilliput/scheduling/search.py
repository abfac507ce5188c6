"""The cheapest steps that keep a task within its tolerance.

Source: Chen et al., arXiv 2410.13461, section on the static scheduler: candidates on a grid, the smallest that holds.
Deviation: a step for every rung; candidates that a worse or better one has settled are not scored, which assumes that
more bits never make a task worse; `exhaustive` does not assume it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.features import all_choices
from lilliput.engine.schedules.fixed import Constant, Static

Choice = tuple[int, ...]
"""The decode forward from which each rung but the first holds, non-descending; the horizon is never."""


def grid_of(horizon: int, parts: int) -> tuple[int, ...]:
    """Return 0 to `horizon` in about equal parts, ascending, none twice."""
    return tuple(sorted({round(horizon * part / parts) for part in range(parts + 1)}))


def static(ladder: Sequence[int], choice: Choice, horizon: int, prefill: int | None = None) -> Schedule:
    """Return the schedule that leaves rung i at forward choice[i]; rungs that no forward meets are left out.

    An answer of `horizon` tokens has decode forwards 0 to horizon - 2. prefill: None for the ladder's first.
    """
    at = {0: ladder[0]}
    for start, bits in zip(choice, ladder[1:], strict=True):
        if start < horizon - 1 or start == 0:
            at[start] = bits
    read = ladder[0] if prefill is None else prefill
    first = at[0]
    told = None if read == first else read
    if len(at) == 1:
        return Constant(bits=first, prefill=told)
    return replace(Static(at=tuple(sorted(at.items()))), prefill=told)


def bits_of(ladder: Sequence[int], choice: Choice, forwards: Sequence[int]) -> float:
    """Return the average bits over answers of so many decode forwards each."""
    total = 0
    for count in forwards:
        edges = [0, *(min(start, count) for start in choice), count]
        total += sum(bits * (b - a) for bits, a, b in zip(ladder, edges, edges[1:], strict=False))
    return total / sum(forwards)


def smallest(
    choices: Iterable[Choice],
    cost: Callable[[Choice], float],
    holds: Callable[[Choice], bool],
    *,
    exhaustive: bool = False,
) -> Choice | None:
    """Return the choice of the least cost that holds, None where none does.

    Asks `holds` of few: a choice that fails settles all whose every step is earlier or the same, one that holds settles
    all that cost as much or more. exhaustive: asks it of all.
    """
    open_ = sorted(choices, key=lambda choice: (cost(choice), choice))
    if exhaustive:
        return next((choice for choice in [c for c in open_ if holds(c)]), None)
    best: Choice | None = None
    while open_:
        asked = open_[len(open_) // 2]
        if holds(asked):
            best = asked
            open_ = [c for c in open_ if (cost(c), c) < (cost(asked), asked)]
        else:
            open_ = [c for c in open_ if any(a > b for a, b in zip(c, asked, strict=True))]
    return best


def choices_of(grid: Sequence[int], rungs: int) -> list[Choice]:
    """Return every choice of steps on the grid."""
    return all_choices(grid, rungs)
