"""Schedules known before the answer begins: one width, or a step for every rung. They cost nothing while decoding.

Source: Chen et al., arXiv 2410.13461, the static scheduler.
Deviation: a step for every rung of a ladder, each of its own, instead of one step for a pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy.typing as npt
from pydantic import JsonValue

from lilliput.artifact.entries import ScheduleEntry
from lilliput.core.errors import ConfigError
from lilliput.engine.schedules.base import Run, Schedule, Signals, Steps


class _Known(Run):
    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        return next(bits for start, bits in reversed(self._steps) if start <= step)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """One width throughout: exactly the plain run at `bits`, unless `prefill` says otherwise. Text: `4`."""

    name: ClassVar[str] = "constant"
    spelt: ClassVar[str] = "Write the width alone, as 4"
    bits: int

    def __post_init__(self) -> None:
        if self.ladder not in ((), (self.bits,)):
            what = f"the ladder {self.ladder} is not the one width {self.bits}"
            raise ConfigError(what, where="schedule constant", fix="Leave the ladder out")
        object.__setattr__(self, "ladder", (self.bits,))

    def steps(self) -> Steps:
        """One step."""
        return ((0, self.bits),)

    def options(self) -> dict[str, JsonValue]:
        """Nothing: the ladder says all of it."""
        return {}

    @classmethod
    def stored(cls, entry: ScheduleEntry, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the one width of the ladder."""
        (bits,) = entry.ladder
        return cls(bits=bits, prefill=entry.prefill)

    def start(self) -> Run:
        """Return a run that always says `bits`."""
        return _Known(self.steps())

    def __str__(self) -> str:
        """`4`, or `8@prompt,4@0`."""
        return str(self.bits) if self.prefill is None else f"{self.prefill}@prompt,{self.bits}@0"


@dataclass(frozen=True, kw_only=True)
class Static(Schedule):
    """Each width from a decode forward on: `at` is ((from, bits), ..). Text: `4@0,3@85,2@170`, with `8@prompt,` before.

    Raises ConfigError unless forwards ascend from 0 and widths fall.
    """

    name: ClassVar[str] = "static"
    spelt: ClassVar[str] = "Write the steps alone, as 4@0,3@85,2@170"
    at: Steps

    def __post_init__(self) -> None:
        text = self._text()
        starts, widths = [start for start, _ in self.at], tuple(bits for _, bits in self.at)
        if not self.at or starts[0] != 0:
            raise ConfigError("the first width does not begin at 0", f"schedule {text}", "Write it as 4@0")
        if any(b <= a for a, b in pairwise(starts)):
            what = "the steps are out of order"
            raise ConfigError(what, f"schedule {text}", "Let each width begin after the one before, as 4@0,3@85,2@170")
        if not self.allow_raise and any(b >= a for a, b in pairwise(widths)):
            what = "the widths do not fall"
            raise ConfigError(what, f"schedule {text}", "Write the widest first, as 4@0,3@85,2@170")
        object.__setattr__(self, "ladder", tuple(sorted(set(widths), reverse=True)))

    def steps(self) -> Steps:
        """As configured."""
        return self.at

    def options(self) -> dict[str, JsonValue]:
        """Nothing, unless the widths may rise: the steps say the rest."""
        return {"allow_raise": True} if self.allow_raise else {}

    @classmethod
    def stored(cls, entry: ScheduleEntry, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the steps."""
        return cls(at=entry.steps, prefill=entry.prefill, allow_raise=bool(entry.options.get("allow_raise")))

    def start(self) -> Run:
        """Return a run that reads the steps."""
        return _Known(self.at)

    def remarks(self, max_new_tokens: int) -> tuple[str, ...]:
        """Say which steps lie beyond an answer of `max_new_tokens`, whose last decode forward is that less two."""
        late = [f"{bits}@{start}" for start, bits in self.at if start >= max(1, max_new_tokens - 1)]
        if not late:
            return ()
        return (f"schedule {self}: {', '.join(late)} lies beyond an answer of {max_new_tokens} tokens",)

    def _text(self) -> str:
        first = "" if self.prefill is None else f"{self.prefill}@prompt,"
        return first + ",".join(f"{bits}@{start}" for start, bits in self.at)

    def __str__(self) -> str:
        """The steps, and the prompt's width where it is not the first rung's."""
        return self._text()
