"""Schedules by themselves: their text, what they refuse, and when they change the width."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lilliput.core.errors import ConfigError, UnknownName
from lilliput.engine.schedules import SCHEDULES, Schedule, Signals, average_bits
from lilliput.engine.schedules.base import Follower
from lilliput.engine.schedules.callback import Callback
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.engine.schedules.latency_budget import LatencyBudget
from lilliput.engine.schedules.sure import Confidence, Entropy
from lilliput.engine.schedules.text import parse

TEXTS = [
    "4",
    "8@prompt,4@0",
    "4@0,3@85,2@170",
    "8@prompt,4@0,2@40",
    "confidence",
    "confidence:ladder=4/2,measure=5,deviations=0.5",
    "entropy:prefill=8,allow_raise=True,spike=2.5",
    "latency_budget:tokens_per_s=125.5,slack=0.2",
]


def nothing() -> Any:
    raise AssertionError("nobody may look")


def seeing(top1: float, elapsed_s: float = 0.0) -> Signals:
    """Signals of a distribution over 5 tokens whose likeliest has probability `top1`."""
    row = np.log(np.array([top1, *[(1 - top1) / 4] * 4], dtype=np.float32))
    return Signals(lambda: row, nothing, lambda: elapsed_s)


def widths(schedule: Schedule, signals: list[Signals]) -> list[int]:
    follower = Follower(schedule, 10, len(signals) + 1)
    return [follower.next_bits(step, seen) for step, seen in enumerate(signals)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_back_and_so_does_what_a_manifest_keeps(text: str) -> None:
    schedule = parse(text)
    assert parse(str(schedule)) == schedule
    fitted = schedule.fitted((2, 3, 4, 8))
    kept = type(fitted.entry()).model_validate_json(fitted.entry().model_dump_json())
    assert SCHEDULES.load(kept.name).stored(kept, {}) == fitted


def test_every_registered_schedule_has_a_text_above_unless_it_is_learned() -> None:
    assert {parse(text).name for text in TEXTS} | {"learned", "features"} == SCHEDULES.keys()


def test_steps_are_as_written() -> None:
    schedule = parse("8@prompt, 4@0,3@85,2@170")
    assert schedule.steps() == ((0, 4), (85, 3), (170, 2))
    assert (schedule.prefill_bits, schedule.ladder, schedule.widths) == (8, (4, 3, 2), (8, 4, 3, 2))
    assert parse("4@0,2@9").prefill_bits == 4
    assert widths(parse("4@0,3@2,2@5"), [Signals(nothing, nothing, nothing)] * 7) == [4, 4, 3, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3@0,4@85", r"^schedule 3@0,4@85: the widths do not fall\. Write the widest first, as 4@0,3@85,2@170\.$"),
        ("4@0,4@85", r": the widths do not fall\. "),
        ("4@0,3@85,2@85", r"^schedule 4@0,3@85,2@85: the steps are out of order\. "),
        ("4@0,3@85,2@20", r": the steps are out of order\. "),
        ("4@1,3@85", r"^schedule 4@1,3@85: the first width does not begin at 0\. Write it as 4@0\.$"),
        ("4@0,3", r"^schedule 4@0,3: '3' is no width and step\. "),
        ("4@0,8@prompt", r": the width of the prompt does not stand first\. "),
        ("confidence:measured=5", r"^schedule confidence: 'measured' is no option of it; it has allow_raise, "),
        ("confidence:measure=x", r"^schedule confidence\.measure: 'x' does not fit\. Give a whole number\.$"),
        ("confidence:measure=1", r"^schedule confidence\.measure: 1 forwards have no standard deviation\. "),
        ("entropy:ladder=2/4", r"^schedule entropy: the ladder 2/4 does not fall\. "),
        ("entropy:ladder=2,4", r"^schedule entropy: '4' is no option of it"),
        ("entropy:allow_raise=1", r"^schedule entropy\.allow_raise: '1' does not fit\. Give true or false\.$"),
        ("entropy:spike=-1", r"^schedule entropy\.spike: -1\.0 deviations are no spike\. "),
        ("latency_budget", r"^schedule latency_budget: it needs tokens_per_s\. Write latency_budget:tokens_per_s="),
        ("static", r"^schedule static: it needs at\. Write the steps alone, as 4@0,3@85,2@170\.$"),
        (
            "learned",
            r"^schedule learned: it needs horizon\. Learn it with `lilliput schedule ARTIFACT --method learned`",
        ),
        ("static:at=4", r"^schedule static\.at: '4' does not fit\. "),
        ("latency_budget:tokens_per_s=0", r"^schedule latency_budget\.tokens_per_s: 0\.0 is out of range\. "),
    ],
)
def test_text_without_sense_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_an_unknown_name_is_told_with_its_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"^schedule: 'entropi' is not known\. Try entropy\.$"):
        parse("entropi")


def test_a_width_the_artifact_lacks_is_one_line() -> None:
    says = r"^schedule 5@0,2@9: 5 bits are not in this artifact, which has 2, 3, 4\. Use 2 or 3 or 4\.$"
    with pytest.raises(ConfigError, match=says):
        parse("5@0,2@9").fitted((2, 3, 4))
    with pytest.raises(ConfigError, match=r"^schedule 8@prompt,4@0: 8 bits are not in this artifact"):
        parse("8@prompt,4@0").fitted((2, 3, 4))
    with pytest.raises(ConfigError, match=r"no quantized weights\. Leave the schedule out\.$"):
        parse("confidence").fitted(())
    assert parse("confidence").fitted((2, 3, 4)).ladder == (4, 3, 2)


def test_a_step_beyond_the_answer_is_a_remark_not_an_error() -> None:
    schedule = parse("4@0,2@40")
    assert schedule.remarks(42) == ()  # forwards 0 .. 40
    assert schedule.remarks(41) == ("schedule 4@0,2@40: 2@40 lies beyond an answer of 41 tokens",)
    assert parse("4").remarks(1) == ()


def test_average_bits_is_one_figure() -> None:
    assert average_bits([4, 4, 2, 2]) == 3
    assert average_bits([]) is None


def test_signals_are_lazy_and_right() -> None:
    asked: list[str] = []

    def row() -> Any:
        asked.append("row")
        return np.log(np.array([0.5, 0.25, 0.25, 0], dtype=np.float32) + np.float32(1e-30))

    signals = Signals(row, nothing, lambda: 2.5)
    assert (asked, signals.elapsed_s()) == ([], 2.5)
    assert signals.top1() == pytest.approx(0.5)
    assert signals.entropy() == pytest.approx(1.5 * np.log(2))
    assert asked == ["row"]
    minus = Signals(lambda: np.array([0, -np.inf], dtype=np.float32), nothing, nothing)
    assert minus.entropy() == 0


def test_confidence_measures_at_every_rung_and_falls_one_at_a_time() -> None:
    """The trap of one threshold for all rungs: whoever passes it once falls down the whole ladder."""
    schedule = Confidence(ladder=(4, 3, 2), measure=3, deviations=1)
    calm, sure = [0.3, 0.5, 0.4], [0.9]
    found = widths(schedule, [seeing(p) for p in calm + sure + sure * 3 + [0.8] + [0.95] * 2])
    # three forwards set 0.4 + 0.08; the fourth passes; three more at 3 bits set 0.9 + 0, which 0.8 does not pass
    assert found == [4, 4, 4, 3, 3, 3, 3, 3, 2, 2]


def test_entropy_falls_when_calm_and_rises_at_a_spike_only_where_it_may() -> None:
    seen = [seeing(p) for p in [0.5, 0.6, 0.55, 0.999, 0.9, 0.92, 0.91, 0.2, 0.5]]
    assert widths(Entropy(ladder=(4, 2), measure=3), seen) == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    free = Entropy(ladder=(4, 2), measure=3, allow_raise=True)
    assert widths(free, seen) == [4, 4, 4, 2, 2, 2, 2, 4, 4]


def test_a_latency_budget_settles_on_the_widest_width_that_keeps_up() -> None:
    """Forwards that take a millisecond a bit, and a goal that 3 bits meet and 4 do not."""
    follower, now, bits = Follower(LatencyBudget(ladder=(4, 3, 2), tokens_per_s=290), 5, 200), 0.0, 4
    used = []
    for step in range(120):
        bits = follower.next_bits(step, Signals(nothing, nothing, lambda now=now: now))
        used.append(bits)
        slow = 2 if 20 <= step < 30 else 1  # a busy spell
        now += bits * slow / 1000
    assert used[0] == 4
    assert set(used[3:20]) == {3}
    assert used[29] == 2
    assert used[-1] == 3  # it comes back when the machine is idle again
    assert sum(a != b for a, b in pairwise(used)) <= 5


def test_a_latency_budget_without_a_raise_only_falls() -> None:
    follower = Follower(LatencyBudget(ladder=(4, 2), tokens_per_s=300, allow_raise=False), 5, 100)
    used = [follower.next_bits(step, Signals(nothing, nothing, lambda s=step: s / 290)) for step in range(10)]
    used += [follower.next_bits(10 + s, Signals(nothing, nothing, lambda s=s: 0.05 + s / 9000)) for s in range(40)]
    assert used == sorted(used, reverse=True)
    assert used[-1] == 2


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda step, cur, _: 4 if step else 2, r"^schedule callback: went up from 2 to 4 bits at decode forward 1\. "),
        (lambda step, cur, _: 3, r"asked for 3 bits at decode forward 0, off its ladder \[4, 2\]\. "),
        (lambda step, cur, _: None, r"asked for None bits"),
    ],
)
def test_a_schedule_is_held_to_its_word(choose: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        widths(Callback(function=choose, ladder=(4, 2)), [seeing(0.5)] * 2)


@pytest.mark.parametrize("text", TEXTS[4:])
def test_a_run_goes_on_where_its_state_was_taken(text: str) -> None:
    schedule = parse(text).fitted((2, 3, 4, 8))
    rng = np.random.default_rng(1)
    seen = [seeing(float(p), step * 0.01) for step, p in enumerate(rng.uniform(0.3, 0.99, 60))]
    whole, first, second = schedule.start(), schedule.start(), schedule.start()
    bits, cut = [schedule.ladder[0]], 25
    for step, signals in enumerate(seen):
        bits.append(whole.next_bits(step, bits[-1], signals))
    for step in range(cut):
        assert first.next_bits(step, bits[step], seen[step]) == bits[step + 1]
    second.load_state_dict(first.state_dict())
    for step in range(cut, 60):
        assert second.next_bits(step, bits[step], seen[step]) == bits[step + 1]
    assert len(set(bits)) > 1


def test_a_config_holds_no_state() -> None:
    schedule = Confidence(ladder=(4, 2), measure=2)
    seen = [seeing(p) for p in (0.3, 0.31, 0.9, 0.9)]
    assert widths(schedule, seen) == widths(schedule, seen) == [4, 4, 2, 2]
    with pytest.raises(AttributeError):
        schedule.measure = 3  # type: ignore[misc]
    assert hash(Static(at=((0, 4), (3, 2)))) == hash(parse("4@0,2@3"))
    assert Constant(bits=4).ladder == (4,)
