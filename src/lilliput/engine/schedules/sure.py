"""Schedules that go down a rung when the model is sure of its next token, by thresholds it sets itself.

Source: Chen et al., arXiv 2410.13461, the confidence scheduler they compare with: after 10 steps the threshold is the
mean plus one standard deviation of the top-1 probability, and passing it switches.
Deviation: every rung sets a threshold of its own from the first `measure` forwards at it, so that passing one once does
not fall down the whole ladder; entropy may also raise the width again.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from lilliput.core.errors import ConfigError
from lilliput.engine.schedules.base import Run, Schedule, Signals


@dataclass(frozen=True, kw_only=True)
class _Sure(Schedule):
    """measure: forwards at a rung before its threshold is set. deviations: of the threshold from their mean."""

    measure: int = 10
    deviations: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure < 2:
            what = f"{self.measure} forwards have no standard deviation"
            raise ConfigError(what, where=f"schedule {self.name}.measure", fix="Give 2 or more, such as 10")
        if not 0 <= self.deviations < 100:
            what = f"{self.deviations} is no count of deviations"
            raise ConfigError(what, where=f"schedule {self.name}.deviations", fix="Give a number such as 1")


class _Measured(Run):
    """The values seen at the rung in force, and its threshold once there are enough."""

    def __init__(self, config: _Sure) -> None:
        self._config = config
        self.reset(0, 0)

    def reset(self, prompt_len: int, max_new_tokens: int) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def _settled(self, value: float) -> bool:
        """Take in one value; False while the rung is still measured."""
        if self.count >= self._config.measure:
            return True
        self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value
        return False

    def _mean(self) -> float:
        return self.total / self.count

    def _deviation(self) -> float:
        return sqrt(max(0.0, self.squares / self.count - self._mean() ** 2))

    def _move(self, bits: int, by: int) -> int:
        ladder = self._config.ladder
        place = min(max(ladder.index(bits) + by, 0), len(ladder) - 1)
        if ladder[place] != bits:
            self.reset(0, 0)
        return ladder[place]


@dataclass(frozen=True, kw_only=True)
class Confidence(_Sure):
    """Down a rung when the top-1 probability exceeds its mean at this rung by `deviations` standard deviations."""

    name: ClassVar[str] = "confidence"

    def start(self) -> Run:
        """Return the state of one fresh sequence."""
        return _Confident(self)


class _Confident(_Measured):
    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        if cur_bits == self._config.ladder[-1]:
            return cur_bits
        sure = signals.top1()
        if not self._settled(sure) or sure <= self._mean() + self._config.deviations * self._deviation():
            return cur_bits
        return self._move(cur_bits, 1)


@dataclass(frozen=True, kw_only=True)
class Entropy(_Sure):
    """Down a rung when the entropy falls below its mean at this rung by `deviations` standard deviations.

    With allow_raise, up a rung when it exceeds that mean by `spike` of them.
    """

    name: ClassVar[str] = "entropy"
    spike: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.spike < 100:
            what = f"{self.spike} deviations are no spike"
            raise ConfigError(what, where="schedule entropy.spike", fix="Give a number such as 3")

    def start(self) -> Run:
        """Return the state of one fresh sequence."""
        return _Calm(self, self.spike)


class _Calm(_Measured):
    def __init__(self, config: Entropy, spike: float) -> None:
        super().__init__(config)
        self._spike = spike

    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        config = self._config
        if cur_bits == config.ladder[-1] and not config.allow_raise:
            return cur_bits
        entropy = signals.entropy()
        if not self._settled(entropy):
            return cur_bits
        if entropy < self._mean() - config.deviations * self._deviation():
            return self._move(cur_bits, 1)
        if config.allow_raise and entropy > self._mean() + self._spike * self._deviation():
            return self._move(cur_bits, -1)
        return cur_bits
