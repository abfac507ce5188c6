"""A schedule that keeps up a speed: the widest width whose measured step time fits the goal.

Source: ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from lilliput.core.errors import ConfigError
from lilliput.engine.schedules.base import Run, Schedule, Signals


@dataclass(frozen=True, kw_only=True)
class LatencyBudget(Schedule):
    """Decode at `tokens_per_s` or faster, at the widest width that allows it.

    slack: how much faster than the goal a wider width has to be expected before it is taken again, as a share; it keeps
    a width from swinging to and fro. patience: forwards at a width before it is left for a wider one. allow_raise: by
    default True, since a busy machine becomes idle again.
    """

    name: ClassVar[str] = "latency_budget"
    allow_raise: bool = True
    tokens_per_s: float
    slack: float = 0.1
    patience: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = {
            "tokens_per_s": (0 < self.tokens_per_s < 1e6, "Give a speed such as 10"),
            "slack": (0 <= self.slack < 10, "Give a share such as 0.1"),
            "patience": (self.patience >= 1, "Give 1 or more"),
        }
        for option, (fine, fix) in holds.items():
            if not fine:
                what = f"{getattr(self, option)} is out of range"
                raise ConfigError(what, where=f"schedule latency_budget.{option}", fix=fix)

    def start(self) -> Run:
        """Return the state of one fresh sequence."""
        return _Timed(self)


class _Timed(Run):
    """step_s: smoothed seconds of a forward at each width tried, by its text; since: forwards at the one in force.

    What a width took fades towards what the width in force implies, since a machine that was busy may be idle by now.
    """

    def __init__(self, config: LatencyBudget) -> None:
        self._config = config
        self.reset(0, 0)

    def reset(self, prompt_len: int, max_new_tokens: int) -> None:
        self.step_s: dict[str, float] = {}
        self.before, self.since = 0.0, 0

    def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
        config, now = self._config, signals.elapsed_s()
        took, self.before = now - self.before, now
        if step == 0:
            return cur_bits
        known = self.step_s.get(str(cur_bits), took)
        measured = self.step_s[str(cur_bits)] = known + (took - known) / 4
        for width in self.step_s.keys() - {str(cur_bits)}:
            self.step_s[width] += (measured * int(width) / cur_bits - self.step_s[width]) / 16
        self.since += 1
        bits = next((width for width in config.ladder if self._fits(width, cur_bits)), config.ladder[-1])
        if bits > cur_bits and (not config.allow_raise or self.since < config.patience):
            return cur_bits
        if bits != cur_bits:
            self.since = 0
        return bits

    def _fits(self, width: int, cur_bits: int) -> bool:
        """A width never tried is expected to take as much longer as it has bits."""
        expected = self.step_s.get(str(width), self.step_s[str(cur_bits)] * width / cur_bits)
        slack = self._config.slack if width > cur_bits else 0.0
        return expected * (1 + slack) * self._config.tokens_per_s <= 1
