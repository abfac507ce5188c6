"""The cheapest steps on a grid: card section 8, item 9."""

import numpy as np
import pytest

from lilliput.engine.schedules.base import average_bits
from lilliput.scheduling.search import bits_of, choices_of, grid_of, smallest, static

GRID, LADDER, N = grid_of(96, 6), (4, 3, 2), 96


def widths(choice: tuple[int, ...], forwards: int) -> list[int]:
    schedule = static(LADDER, choice, N)
    steps = schedule.steps()
    assert steps is not None
    return [next(bits for start, bits in reversed(steps) if start <= t) for t in range(forwards)]


def test_the_grid_ends_at_never_and_repeats_nothing() -> None:
    assert grid_of(256, 6) == (0, 43, 85, 128, 171, 213, 256)
    assert grid_of(4, 8) == (0, 1, 2, 3, 4) or len(set(grid_of(4, 8))) == len(grid_of(4, 8))


@pytest.mark.parametrize("choice", choices_of(GRID, 2))
def test_a_choice_becomes_the_schedule_it_means(choice: tuple[int, ...]) -> None:
    used = widths(choice, N - 1)
    assert used == [LADDER[sum(start <= t for start in choice)] for t in range(N - 1)]
    assert average_bits(used) == pytest.approx(bits_of(LADDER, choice, [N - 1]))
    assert static(LADDER, choice, N).prefill_bits == 4
    assert not static(LADDER, choice, N).remarks(N)  # no step that an answer never meets


def test_the_search_finds_what_scoring_everything_finds_and_scores_less() -> None:
    """Ten random harms that fall when any step comes later; the least bits within each tolerance."""
    draw, saved = np.random.default_rng(0), 0
    for _ in range(10):
        harm = np.sort(draw.random((2, len(GRID))), axis=1)[:, ::-1]
        total = {c: sum(harm[i][GRID.index(s)] for i, s in enumerate(c)) for c in choices_of(GRID, 2)}
        for tolerance in np.linspace(min(total.values()), 2, 7):
            asked: list[tuple[int, ...]] = []

            def holds(choice: tuple[int, ...], total=total, tolerance=tolerance, asked=asked) -> bool:  # type: ignore[no-untyped-def]
                asked.append(choice)
                return bool(total[choice] <= tolerance)

            def cost(choice: tuple[int, ...]) -> float:
                return bits_of(LADDER, choice, [95, 60])

            found = smallest(total, cost, holds)
            assert found is not None
            assert cost(found) == min(cost(c) for c in total if total[c] <= tolerance)
            assert len(set(asked)) == len(asked)
            saved += len(total) - len(asked)
            assert smallest(total, cost, holds, exhaustive=True) == found
    assert saved > 700  # of 1,960


def test_scoring_everything_finds_a_dip_that_the_search_may_pass_by() -> None:
    choices = choices_of(GRID, 1)
    assert smallest(choices, lambda c: c[0], lambda c: c[0] in (16, 96), exhaustive=True) == (16,)


def test_nothing_may_hold() -> None:
    assert smallest(choices_of(GRID, 1), lambda c: c[0], lambda c: False) is None
