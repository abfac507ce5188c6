"""Which precision at which step. A schedule is a config; `text.parse` reads one, `Engine.generate` follows it."""

from lilliput.core.registry import Registry
from lilliput.engine.schedules.base import Run, Schedule, Signals, average_bits

__all__ = ["SCHEDULES", "Run", "Schedule", "Signals", "average_bits"]

SCHEDULES = Registry(
    "schedule",  # callback is not here: a function has no text
    confidence="lilliput.engine.schedules.sure:Confidence",
    constant="lilliput.engine.schedules.fixed:Constant",
    entropy="lilliput.engine.schedules.sure:Entropy",
    features="lilliput.engine.schedules.features:Features",
    latency_budget="lilliput.engine.schedules.latency_budget:LatencyBudget",
    learned="lilliput.engine.schedules.learned:Learned",
    static="lilliput.engine.schedules.fixed:Static",
)
