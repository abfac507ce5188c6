"""The contract of a schedule: which width reads the prompt, and which width each decode forward runs at.

A schedule is a frozen config; what it learns about one answer is in a `Run`, so every sequence of a batch has its own.
The engine forwards the token it chose last, at the width the schedule says, to get the logits of the next one: those are
the decode forwards, counted from 0. An answer of n tokens takes n - 1 of them, the first token being the prompt's, or n
where it ended with an end-of-sequence token.

Source: Chen et al., "Progressive Mixed-Precision Decoding for Efficient LLM Inference", arXiv 2410.13461.
Deviation: a width is decided before a forward and noted as that forward used it; rungs are left one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from lilliput.artifact.entries import ScheduleEntry
from lilliput.core.errors import ConfigError

F32 = npt.NDArray[np.float32]
Steps = tuple[tuple[int, int], ...]
"""(from decode forward, bits), ascending from 0."""


class Signals:
    """What a schedule may look at, computed when it is asked for, and only while `next_bits` runs.

    All of it is of the last forward, which chose the token that will be forwarded next.
    """

    def __init__(
        self,
        logits: Callable[[], F32],
        keys_values: Callable[[], tuple[F32, F32]],
        elapsed_s: Callable[[], float],
    ) -> None:
        """logits: returns (vocab,). keys_values: returns both of the last layer. elapsed_s: since the prompt was read."""
        self._logits, self._keys_values, self.elapsed_s = logits, keys_values, elapsed_s
        self._row: F32 | None = None
        self._cache: tuple[F32, F32] | None = None

    def logits(self) -> F32:
        """The last logits, (vocab,) float32, before penalties and temperature; a copy."""
        if self._row is None:
            self._row = self._logits()
        return self._row

    def keys(self) -> F32:
        """Keys of the last layer, (kv_heads, tokens, head_dim) float32, rotated, as attention reads them; a copy."""
        return self._both()[0]

    def values(self) -> F32:
        """Values of the last layer, shaped as `keys`."""
        return self._both()[1]

    def entropy(self) -> float:
        """Entropy of the next token's distribution, nats."""
        log = self._log_probabilities()
        return float(-(np.exp(log) * log).sum())

    def top1(self) -> float:
        """Probability of the likeliest next token."""
        return float(np.exp(self._log_probabilities().max()))

    def _log_probabilities(self) -> npt.NDArray[np.float64]:
        row = self.logits().astype(np.float64)
        row -= row.max()
        kept: npt.NDArray[np.float64] = row - np.log(np.exp(row).sum())
        return np.maximum(kept, -800.0)  # a logit of minus infinity has probability 0, and 0 times it is 0

    def _both(self) -> tuple[F32, F32]:
        if self._cache is None:
            self._cache = self._keys_values()
        return self._cache


class Run(ABC):
    """What a schedule knows of one answer. One for each sequence, made by `Schedule.start`."""

    def reset(self, prompt_len: int, max_new_tokens: int) -> None:
        """Begin an answer: tokens of its prompt, and the most it may have. A turn of a chat is an answer of its own."""
        return

    def on_prefill(self, signals: Signals) -> None:
        """See the prompt, once it is read and before the first `next_bits`."""
        return

    @abstractmethod
    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        """Return the width of decode forward `step`.

        cur_bits: of the forward before, for step 0 the first rung. Signals are of the forward before as well.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that `next_bits` depends on besides its arguments, as JSON values."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        vars(self).update(state)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A way to choose widths. Subclasses are frozen dataclasses; their fields are the options of the text form.

    ladder: widths it may use while decoding, falling; empty until `fitted` for every width of the artifact.
    prefill: width that reads the prompt, None for the ladder's first. allow_raise: whether a width may be followed by
    a wider one; the engine holds every schedule to it.
    """

    name: ClassVar[str]
    spelt: ClassVar[str] = ""
    """What to do instead of NAME:option=value, where that is not how one is made."""
    ladder: tuple[int, ...] = ()
    prefill: int | None = None
    allow_raise: bool = False

    def __post_init__(self) -> None:
        if any(a <= b for a, b in pairwise(self.ladder)):
            what = f"the ladder {'/'.join(map(str, self.ladder))} does not fall"
            raise ConfigError(what, where=f"schedule {self.name}", fix="Write the widest first, such as 4/3/2")

    @property
    def prefill_bits(self) -> int:
        """Width that reads the prompt."""
        return self.ladder[0] if self.prefill is None else self.prefill

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width it may use, falling."""
        own = self.ladder if self.prefill is None else (self.prefill, *self.ladder)
        return tuple(sorted(set(own), reverse=True))

    def fitted(self, bits: Sequence[int]) -> Self:
        """Return this schedule for an artifact of widths `bits`. Raises ConfigError for a width that is not there."""
        absent = [width for width in self.widths if width not in bits]
        if absent or not bits:
            have = ", ".join(map(str, bits)) if bits else "no quantized weights"
            what = f"{absent[0] if absent else 'any'} bits are not in this artifact, which has {have}"
            fix = f"Use {' or '.join(map(str, bits))}" if bits else "Leave the schedule out"
            raise ConfigError(what, where=f"schedule {self}", fix=fix)
        ladder = self.ladder or tuple(sorted(bits, reverse=True))
        return replace(self, ladder=ladder, prefill=None if self.prefill == ladder[0] else self.prefill)

    def remarks(self, max_new_tokens: int) -> tuple[str, ...]:
        """What a user should know before an answer of that length: one line each, no error."""
        return ()

    def steps(self) -> Steps | None:
        """The widths, where they are known beforehand: then nothing is asked while decoding. None: ask `start()`."""
        return None

    @property
    def looks(self) -> int | None:
        """Forwards at which it asks for signals before all widths are decided, 1 being the prompt's alone; None where it
        may ask at every one."""
        return None

    def entry(self) -> ScheduleEntry:
        """Return what a manifest says of this schedule, once it is `fitted`; `tensors` go beside it."""
        return ScheduleEntry(
            name=self.name,
            prefill_bits=self.prefill_bits,
            ladder=self.ladder,
            steps=self.steps() or (),
            options=self.options(),
        )

    def options(self) -> dict[str, JsonValue]:
        """Return what `entry` keeps besides the widths: the options that are not at their defaults."""
        told = (option for option in fields(self) if option.name not in ("ladder", "prefill"))
        return {o.name: getattr(self, o.name) for o in told if getattr(self, o.name) != o.default}

    def tensors(self) -> dict[str, F32]:
        """Return what it learned, by name, for a file of its own."""
        return {}

    @classmethod
    def stored(cls, entry: ScheduleEntry, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the schedule that `entry` and `tensors` were made of. Raises ConfigError or TypeError."""
        options: dict[str, Any] = dict(entry.options)
        return cls(ladder=entry.ladder, prefill=entry.prefill, **options)

    @abstractmethod
    def start(self) -> Run:
        """Return the state of one fresh sequence."""

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        told = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value != option.default:
                told.append(f"{option.name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return f"{self.name}:{','.join(told)}" if told else self.name


def average_bits(widths: Sequence[int]) -> float | None:
    """Mean width of the decode forwards, the one definition: their bits summed, over how many there were.

    The prompt does not count. None where there was no decode forward.
    """
    return sum(widths) / len(widths) if widths else None


class Follower:
    """Asks one sequence's run and holds it to the contract."""

    def __init__(self, schedule: Schedule, prompt_len: int, max_new_tokens: int) -> None:
        self.schedule, self.run, self.cur = schedule, schedule.start(), schedule.ladder[0]
        self.run.reset(prompt_len, max_new_tokens)

    def next_bits(self, step: int, signals: Signals) -> int:
        """Width of decode forward `step`. Raises ConfigError for one off the ladder, or wider than may be."""
        if step == 0:
            self.run.on_prefill(signals)
        bits = self.run.next_bits(step, self.cur, signals)
        if bits not in self.schedule.ladder:
            what = f"asked for {bits!r} bits at decode forward {step}, off its ladder {list(self.schedule.ladder)}"
            raise ConfigError(what, where=f"schedule {self.schedule.name}", fix="Return one of the ladder's widths")
        if bits > self.cur and not self.schedule.allow_raise:
            what = f"went up from {self.cur} to {bits} bits at decode forward {step}"
            raise ConfigError(what, where=f"schedule {self.schedule.name}", fix="Set allow_raise, or only go down")
        self.cur = int(bits)
        return self.cur
