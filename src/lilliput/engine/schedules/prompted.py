"""Schedules that look at the beginning of an answer once and then know the step of every rung.

Source: Chen et al., arXiv 2410.13461, the learned scheduler: one of a few start steps, chosen by what the prompt left.
Deviation: a step for every rung, each at least the one before; steps are counts of decode forwards that are stored with
the horizon they were learned for, so another length of answer does not stretch them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from lilliput.artifact.entries import ScheduleEntry
from lilliput.core.errors import ConfigError
from lilliput.engine.schedules.base import F32, Run, Schedule, Signals


@dataclass(frozen=True, kw_only=True)
class Prompted(Schedule):
    """horizon: tokens of the answers it was learned on. grid: the steps to choose from, ascending from 0.

    weights: what it learned, by name. Raises ConfigError unless they fit ladder and grid.
    """

    shapes: ClassVar[tuple[str, ...]]
    horizon: int
    grid: tuple[int, ...]
    weights: Mapping[str, F32] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"schedule {self.name}"
        if not self.ladder or self.weights.keys() != {*self.shapes}:
            what = f"what it learned, {', '.join(self.shapes)}, is not there"
            raise ConfigError(what, where, self.spelt)
        falls = any(b <= a for a, b in zip(self.grid, self.grid[1:], strict=False))
        if len(self.grid) < 2 or self.grid[0] != 0 or falls or self.grid[-1] > self.horizon:
            what = f"the steps {list(self.grid)} do not ascend from 0 to {self.horizon} at most"
            raise ConfigError(what, where, "Learn it anew with `lilliput schedule`")
        problem = self.misfit()
        if problem:
            raise ConfigError(problem, where, "Learn it anew with `lilliput schedule`")

    @property
    def rungs(self) -> int:
        """Steps to choose: one for every width but the first."""
        return len(self.ladder) - 1

    @property
    def looks(self) -> int:
        """Once, after the prompt."""
        return 1

    @abstractmethod
    def misfit(self) -> str | None:
        """Say in which way the weights do not fit ladder and grid, None where they do."""

    @abstractmethod
    def decide(self, step: int, prompt_len: int, seen: list[Any], signals: Signals) -> tuple[int, ...] | None:
        """Return the step of every rung, or None while more forwards are to be seen; `seen` may be added to."""

    def remarks(self, max_new_tokens: int) -> tuple[str, ...]:
        """Say when an answer may be longer than those it was learned on."""
        if max_new_tokens <= self.horizon:
            return ()
        return (f"schedule {self}: an answer of {max_new_tokens} tokens stays at the last width it chose",)

    def options(self) -> dict[str, JsonValue]:
        """The grid and whatever a subclass adds; the horizon has a place of its own."""
        kept = super().options()
        return {name: value for name, value in kept.items() if name not in ("horizon", "weights", "grid")} | {
            "grid": list(self.grid)
        }

    def entry(self) -> ScheduleEntry:
        """As any schedule's, with the horizon."""
        return super().entry().model_copy(update={"horizon": self.horizon})

    def tensors(self) -> dict[str, F32]:
        """The weights."""
        return dict(self.weights)

    @classmethod
    def stored(cls, entry: ScheduleEntry, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the schedule with those weights."""
        options: dict[str, Any] = {**entry.options, "grid": tuple(entry.options["grid"])}  # type: ignore[arg-type]
        if entry.horizon is None:
            raise ValueError("no horizon")
        return cls(ladder=entry.ladder, prefill=entry.prefill, horizon=entry.horizon, weights=dict(tensors), **options)

    def start(self) -> Run:
        """Return the state of one fresh sequence."""
        return _Deciding(self)

    def __str__(self) -> str:
        """A name only: what it learned has no text."""
        return f"{self.name} ({'/'.join(map(str, self.ladder))}, learned on {self.horizon} tokens)"

    def ascending(self, steps: Sequence[int]) -> tuple[int, ...]:
        """Return the steps, each at least the one before."""
        return tuple(int(step) for step in np.maximum.accumulate(np.asarray(steps, dtype=np.int64)))


class _Deciding(Run):
    """starts: the step of every rung once it is decided. seen: what the schedule keeps of the forwards before."""

    def __init__(self, config: Prompted) -> None:
        self._config = config
        self.reset(0, 0)

    def reset(self, prompt_len: int, max_new_tokens: int) -> None:
        self.prompt_len, self.seen = prompt_len, list[Any]()
        self.starts: list[int] | None = None

    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        if self.starts is None:
            decided = self._config.decide(step, self.prompt_len, self.seen, signals)
            self.starts = None if decided is None else list(decided)
        ladder = self._config.ladder
        return ladder[sum(start <= step for start in self.starts or ())]
