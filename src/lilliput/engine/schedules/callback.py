"""A schedule of the caller's own.

Source: ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lilliput.engine.schedules.base import Run, Schedule, Signals

Choose = Callable[[int, int, Signals], int]


@dataclass(frozen=True, kw_only=True)
class Callback(Schedule):
    """function(step, cur_bits, signals) returns the width of decode forward `step`, as `Run.next_bits` does.

    It is the same function for every sequence of a batch; what it remembers is its own affair.
    """

    name: ClassVar[str] = "callback"
    function: Choose

    def start(self) -> Run:
        """Return a run that asks the function."""
        return _Asking(self.function)

    def __str__(self) -> str:
        """A name only: a function has no text."""
        return f"callback ({getattr(self.function, '__name__', 'a function')})"


class _Asking(Run):
    def __init__(self, function: Choose) -> None:
        self._function = function

    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        return self._function(step, cur_bits, signals)
