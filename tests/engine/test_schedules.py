"""Schedules in the engine: widths used and told, sequences side by side, keys and values of several widths, drafts."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact import amend
from lilliput.artifact.entries import ScheduleEntry
from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, InputCorrupt
from lilliput.engine import Engine, Generation, Sampling, load, native
from lilliput.engine.schedules import Schedule, Signals
from lilliput.engine.schedules.base import Run
from lilliput.engine.schedules.callback import Callback
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.engine.schedules.sure import Confidence
from lilliput.engine.schedules.text import parse
from support.small_artifact import llama_spec, write_small_artifact

WARM = Sampling(temperature=2.0, seed=3)
SPEC = llama_spec().model_copy(update={"context": 256})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules") / "small.lilliput"
    write_small_artifact(path, SPEC)
    return path


@pytest.fixture(scope="module", params=["float", "int8", "int4"])
def any_cache(folder: Path, request: pytest.FixtureRequest) -> Engine:
    engine = load(folder, threads=2, kv=request.param)
    engine.tokenizer.eos_ids = ()  # so that answers have the length asked for
    return engine


@pytest.fixture(scope="module")
def small(folder: Path) -> Engine:
    engine = load(folder, threads=2)
    engine.tokenizer.eos_ids = ()
    return engine


def fall(step: int, cur: int, _: Signals) -> int:
    return 8 if step < 30 else 4 if step < 60 else 2


FALL = Callback(function=fall, ladder=(8, 4, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_constant_schedule_is_the_plain_run(any_cache: Engine, bits: int) -> None:
    for sampling in (Sampling(), WARM):
        options: dict[str, Any] = {"max_new_tokens": 80, "sampling": sampling}
        plain = any_cache.generate("Once", bits=bits, **options)
        assert plain.widths == (bits,) * 79
        for schedule in (Constant(bits=bits), Callback(function=lambda *_, b=bits: b, ladder=(bits,))):
            done = any_cache.generate("Once", schedule=schedule, **options)
            assert (done.tokens, done.text, done.widths) == (plain.tokens, plain.text, plain.widths)
            assert (done.prefill_bits, done.average_bits) == (bits, bits)


def test_steps_beyond_the_answer_and_from_its_start(small: Engine) -> None:
    high, low = (small.generate("Once", max_new_tokens=30, bits=bits, sampling=WARM) for bits in (8, 2))
    late = small.generate("Once", max_new_tokens=30, schedule=parse("8@0,2@29"), sampling=WARM)
    assert (late.tokens, late.widths) == (high.tokens, (8,) * 29)
    early = small.generate("Once", max_new_tokens=30, schedule=parse("8@prompt,2@0"), sampling=WARM)
    assert (early.prefill_bits, early.widths) == (8, (2,) * 29)
    assert early.tokens[0] == high.tokens[0]
    first = small.generate("Once", max_new_tokens=30, schedule=parse("8@0,2@1"), sampling=WARM)
    assert first.widths == (8,) + (2,) * 28
    assert first.tokens[:2] == high.tokens[:2]
    assert low.tokens not in (early.tokens, first.tokens)


def test_the_trace_has_one_entry_for_every_decode_forward(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = parse("4@0,3@5,2@9")
    done = small.generate("Once", max_new_tokens=20, schedule=schedule, sampling=WARM)
    assert done.widths == (4,) * 5 + (3,) * 4 + (2,) * 10
    assert done.average_bits == sum(done.widths) / len(done.widths) == (20 + 12 + 20) / 19
    assert list(done.widths) == sorted(done.widths, reverse=True)
    ended = done.tokens[12]
    monkeypatch.setattr(small.tokenizer, "eos_ids", (ended,))
    short = small.generate("Once", max_new_tokens=20, schedule=schedule, sampling=WARM)
    at = done.tokens.index(ended)
    assert (short.finish_reason, len(short.tokens)) == ("stop", at)
    assert short.widths == done.widths[:at]  # the forward that chose the end counts
    one = small.generate("Once", max_new_tokens=1, schedule=schedule)
    assert (one.widths, one.average_bits) == ((), None)


def test_what_is_told_of_each_token_is_the_width_that_chose_it(small: Engine) -> None:
    told: list[int] = []
    done = small.generate("Once", max_new_tokens=9, schedule=parse("8@prompt,4@0,2@3"), on_bits=told.append)
    assert told == [8, *done.widths]


@pytest.mark.parametrize("late", ["4@0,3@20,2@35", "4@0,2@20", "4@0"])
def test_what_happens_after_a_step_changes_nothing_before_it(any_cache: Engine, late: str) -> None:
    base = any_cache.generate("Once", max_new_tokens=60, schedule=parse("4@0,3@20"), sampling=WARM)
    other = any_cache.generate("Once", max_new_tokens=60, schedule=parse(late), sampling=WARM)
    assert other.tokens[:21] == base.tokens[:21]
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def watch(name: str, width: int) -> Callback:
        def choose(step: int, cur: int, signals: Signals) -> int:
            kept.setdefault(name, []).append((signals.keys(), signals.values()))
            return 4 if step < 20 else width

        return Callback(function=choose, ladder=(4, 3, 2))

    for name, width in (("a", 3), ("b", 2)):
        any_cache.generate("Once", max_new_tokens=60, schedule=watch(name, width), sampling=WARM)
    for one, two in zip(kept["a"][:21], kept["b"][:21], strict=True):
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1], two[1])
    assert not np.array_equal(kept["a"][22][0], kept["b"][22][0])


def test_keys_and_values_of_a_wide_step_are_read_as_they_were_written(any_cache: Engine) -> None:
    """Bit for bit, after fifty steps at 2 bits; but for what an int4 cache rounds meanwhile."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def choose(step: int, cur: int, signals: Signals) -> int:
        seen.append((signals.keys(), signals.values()))
        return 8 if step < 40 else 2

    any_cache.generate([7] * 20, max_new_tokens=92, schedule=Callback(function=choose, ladder=(8, 2)), sampling=WARM)
    for step, (keys, values) in enumerate(seen):
        assert keys.shape == values.shape == (SPEC.num_kv_heads, 20 + step, SPEC.head_dim)
    exact = slice(0, 32) if any_cache.kv == "int4" else slice(0, 60)
    for early, late in zip(seen[40], seen[-1], strict=True):
        assert np.array_equal(early[:, exact], late[:, exact])
        if any_cache.kv == "int4":  # 15 steps of a channel's or a block's range
            assert np.abs(early[:, 32:60] - late[:, 32:60]).max() <= np.ptp(early[:, 32:60]) / 29
            assert not np.array_equal(early[:, 32:60], late[:, 32:60])


def test_keys_and_values_are_those_of_every_cache(folder: Path) -> None:
    """Position by position: an int8 cache is within half a step of the float one."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    prompt = np.random.default_rng(0).integers(0, 261, 150).tolist()

    def keep(name: str) -> Callback:
        def choose(step: int, cur: int, signals: Signals) -> int:
            found[name] = signals.keys(), signals.values()
            return cur

        return Callback(function=choose, ladder=(8,))

    one_layer = folder.with_name("one")
    write_small_artifact(one_layer, llama_spec(layers=1).model_copy(update={"context": 256}))
    for kv in ("float", "int8", "int4"):
        load(one_layer, kv=kv).generate(prompt, max_new_tokens=2, schedule=keep(kv))
    for part in (0, 1):
        plain, small, tiny = (found[kv][part] for kv in ("float", "int8", "int4"))
        step = np.abs(plain).max(axis=2, keepdims=True) / 127
        assert (np.abs(plain - small) <= step * 0.51).all()
        assert np.array_equal(plain[:, :32], tiny[:, :32])
        assert np.array_equal(plain[:, 128:], tiny[:, 128:])
        groups = plain[:, 32:128].reshape(plain.shape[0], 3, 32, -1)
        ranges = np.ptp(groups, axis=2 if part == 0 else 3, keepdims=True)
        assert (np.abs(groups - tiny[:, 32:128].reshape(groups.shape)) <= ranges / 29 + 1e-3).all()


def test_a_batch_of_schedules_answers_as_each_alone(any_cache: Engine) -> None:
    prompts: list[Any] = ["a", "Once upon a time", [1, 2, 3], "Once", [9] * 70]
    schedules: list[Schedule] = [
        parse("8@0,4@7,2@30"), Constant(bits=3), FALL, Confidence(ladder=(4, 3, 2), measure=4),
        parse("8@prompt,2@0"),
    ]  # fmt: skip
    options: dict[str, Any] = {"max_new_tokens": 90, "sampling": Sampling(temperature=1.0, seed=8)}
    together = any_cache.generate_batch(prompts, schedule=schedules, **options)
    for prompt, schedule, done in zip(prompts, schedules, together, strict=True):
        alone = any_cache.generate(prompt, schedule=schedule, **options)
        assert (alone.tokens, alone.widths, alone.prefill_bits) == (done.tokens, done.widths, done.prefill_bits)
    assert len({done.widths for done in together}) == 5
    same = any_cache.generate_batch(prompts[:3], schedule=FALL, **options)
    assert [done.widths for done in same] == [(8,) * 30 + (4,) * 30 + (2,) * 29] * 3


def test_each_turn_begins_at_the_schedules_start(small: Engine) -> None:
    schedule = Callback(function=fall, ladder=(8, 4, 2), prefill=8)
    first = small.generate("Once", max_new_tokens=70, schedule=schedule)
    second = small.generate("Once" + first.text + " and", max_new_tokens=70, schedule=schedule)
    assert first.widths == second.widths
    assert second.widths[0] == 8


def test_signals_are_of_the_last_forward_and_end_with_the_call(small: Engine) -> None:
    tokens: list[int] = []
    kept: list[Signals] = []

    class Watch(Run):
        def on_prefill(self, signals: Signals) -> None:
            kept.append(signals)

        def next_bits(self, step: int, cur_bits: int, signals: Signals) -> int:
            tokens.append(int(signals.logits().argmax()))
            kept.append(signals)
            return cur_bits

    class Watching(Schedule):
        name = "watching"

        def start(self) -> Run:
            return Watch()

    done = small.generate(
        "Once", max_new_tokens=10, schedule=Watching(ladder=(4,)), sampling=Sampling(repetition_penalty=1.5)
    )
    plain = small.generate("Once", max_new_tokens=10, bits=4, sampling=Sampling(repetition_penalty=1.5))
    assert done.tokens == plain.tokens  # looking at logits before the penalty leaves the penalty alone
    path = [*small.tokenizer.encode("Once"), *done.tokens]
    rows = small.logits(path, bits=4)
    assert tokens == [int(row.argmax()) for row in rows[4:-2]]
    with pytest.raises(ValueError, match="signals are gone"):
        kept[-1].keys()


def test_a_static_schedule_never_calls_python(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise AssertionError("asked")

    monkeypatch.setattr("lilliput.engine.engine._Runs.next_bits", fail)
    assert small.generate("Once", max_new_tokens=20, schedule=parse("4@0,2@9")).widths == (4,) * 9 + (2,) * 10
    with pytest.raises(AssertionError, match="asked"):
        small.generate("Once", max_new_tokens=20, schedule=Confidence(ladder=(4, 2)))


def test_what_a_schedule_raises_comes_through(small: Engine) -> None:
    def fail(step: int, cur: int, signals: Signals) -> int:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        small.generate("Once", schedule=Callback(function=fail, ladder=(4,)))
    with pytest.raises(ConfigError, match=r"^schedule callback: went up from 2 to 4 bits at decode forward 2\. "):
        small.generate("Once", schedule=Callback(function=lambda s, *_: 4 if s == 2 else 2, ladder=(4, 2)))
    assert small.generate("Once", max_new_tokens=3).tokens  # and the engine goes on


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks the Linux kernel")
def test_a_switch_copies_no_weights(folder: Path, tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", llama_spec(hidden=512, heads=8, inter=1536))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    big = load(tmp_path / "a", threads=1)
    for bits in (2, 4, 8):
        big.generate("Once", max_new_tokens=20, bits=bits)
    before = resident()
    for _ in range(3):
        big.generate("Once", max_new_tokens=20, schedule=parse("8@0,4@5,2@10"))
    assert resident() - before < big.weight_bytes(2) // 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": parse("5@0,2@9")},
            r"^schedule 5@0,2@9: 5 bits are not in this artifact, which has 2, 3, 4, 8\. ",
        ),
        ({"schedule": parse("4"), "bits": 4}, r"^bits: a width and a schedule were given\. Give one of them\.$"),
        ({"draft_bits": 4, "bits": 4}, r"^draft_bits: drafts at 4 bits are no cheaper than the answer at 4\. "),
        ({"draft_bits": 5}, r"^bits: 5 bits are not in this artifact"),
        ({"draft_bits": 2, "draft_tokens": 0}, r"^draft_tokens: 0 tokens cannot be drafted at a time\. "),
        ({"draft_bits": 2, "schedule": parse("4@0,3@9")}, r"^draft_bits: the schedule 4@0,3@9 changes the width"),
        ({"draft_bits": 2, "schedule": FALL}, r"^draft_bits: the schedule callback \(fall\) changes the width"),
    ],
)
def test_options_without_sense_are_one_line(small: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.generate("x", **options)
    with pytest.raises(ConfigError, match=r"^schedule: 1 schedules for 2 prompts\. "):
        small.generate_batch(["a", "b"], schedule=[parse("4")])


def test_a_text_can_be_followed_as_if_it_were_written(any_cache: Engine) -> None:
    """Row for row what `generate` saw: the same tokens come out of it, at the same widths."""
    for schedule in (parse("8@prompt,4@0,3@40,2@90"), FALL):
        done = any_cache.generate("Once", max_new_tokens=120, schedule=schedule)
        ids = any_cache.tokenizer.encode("Once")
        rows, widths = any_cache.follow([*ids, *done.tokens], len(ids), schedule)
        assert widths[:-1] == done.widths
        assert rows.shape == (121, 261)
        assert rows[:-1].argmax(axis=1).tolist() == list(done.tokens)
    plain = any_cache.logits([*ids, *done.tokens], bits=3)
    rows, _ = any_cache.follow([*ids, *done.tokens], len(ids), Constant(bits=3))
    assert np.array_equal(rows, plain[len(ids) - 1 :])
    with pytest.raises(ConfigError, match=r"^prompt_tokens: a prompt of 4 tokens is no beginning of 3\. "):
        any_cache.follow([1, 2, 3], 4, Constant(bits=3))


# Drafts.


@pytest.mark.parametrize("bits", [3, 8])
def test_drafts_change_no_token_of_a_greedy_answer(
    any_cache: Engine, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cost, share in (("_FIXED_COST", 1.0), ("_ROW_COST", -1.0)):  # drafts are free, so each is as long as may be
        monkeypatch.setattr(f"lilliput.engine.engine.{cost}", share)
    prompts: list[Any] = ["a", "Once upon a time", [1, 2, 3], list(range(200, 231)), [4] * 64]
    kept = 0
    for sampling in (Sampling(), Sampling(repetition_penalty=1.3)):
        plain = any_cache.generate_batch(prompts, max_new_tokens=180, bits=bits, sampling=sampling)
        for most in (1, 3, 8):
            drafted = any_cache.generate_batch(
                prompts, max_new_tokens=180, bits=bits, sampling=sampling, draft_bits=2, draft_tokens=most
            )
            assert [d.tokens for d in drafted] == [p.tokens for p in plain]
            assert [d.text for d in drafted] == [p.text for p in plain]
            kept += sum(d.accepted for d in drafted)
            for done in drafted:
                assert set(done.widths) <= {2, bits}
                assert done.widths.count(2) == done.drafted >= done.accepted
                assert done.widths.count(bits) == len(done.tokens) - 1 - done.accepted
    assert kept > 0


def test_drafts_that_always_agree_are_kept_whole(tmp_path: Path) -> None:
    """A ladder whose matrices all run at 4 bits: the low rung is the high one, so passes are as few as can be."""
    names = [name for layer in range(2) for name in SPEC.linears(layer)]
    plan = write_plan(names)
    write_small_artifact(tmp_path / "same", plan=plan)
    engine = load(tmp_path / "same", threads=1)
    plain = engine.generate("Once", max_new_tokens=100, bits=8)
    done = engine.generate("Once", max_new_tokens=100, bits=8, draft_bits=4, draft_tokens=8)
    assert done.tokens == plain.tokens
    assert (done.acceptance, plain.acceptance) == (1.0, None)


def write_plan(names: list[str]) -> Any:
    from support.small_artifact import small_plan

    ladders: dict[str, tuple[int, ...]] = dict.fromkeys(names, (4,))
    return small_plan(SPEC, (4, 8), ladders=ladders | {names[0]: (4, 8)})


def test_an_end_a_stop_and_the_limit_may_come_within_a_block(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: dict[str, Any] = {"draft_bits": 3, "draft_tokens": 6}
    free = small.generate("Once", max_new_tokens=60, bits=8)
    for most in range(1, 20):
        options: dict[str, Any] = {"max_new_tokens": most, "bits": 8}
        assert small.generate("Once", **options, **drafts).tokens == free.tokens[:most]
    heard: list[str] = []
    for count in range(1, 12):
        heard.clear()

        def listen(piece: str, count: int = count) -> bool:
            heard.append(piece)
            return len(heard) < count

        done = small.generate("Once", max_new_tokens=60, bits=8, on_token=listen, **drafts)
        assert (done.tokens, done.finish_reason) == (free.tokens[:count], "cancelled")
    rest = small.generate([5] * 240, max_new_tokens=100, bits=8, **drafts)
    assert (len(rest.tokens), rest.finish_reason) == (16, "length")
    for token in dict.fromkeys(free.tokens):
        monkeypatch.setattr(small.tokenizer, "eos_ids", (token,))
        ended = small.generate("Once", max_new_tokens=60, bits=8, **drafts)
        assert (ended.tokens, ended.finish_reason) == (free.tokens[: free.tokens.index(token)], "stop")


def test_a_stop_string_within_a_block_ends_the_answer_before_it(small: Engine) -> None:
    free = small.generate("Once", max_new_tokens=60, bits=8)
    changes = [i for i in range(1, 60) if free.tokens[i] != free.tokens[i - 1]]
    stop = small.tokenizer.decode(free.tokens[: changes[-1] + 1])[-2:]
    for text in (stop, free.text[:3]):
        plain = small.generate("Once", max_new_tokens=60, bits=8, stop=text)
        drafted = small.generate("Once", max_new_tokens=60, bits=8, stop=text, draft_bits=3, draft_tokens=6)
        assert (drafted.text, drafted.tokens, drafted.finish_reason) == (plain.text, plain.tokens, "stop")


def test_drafts_are_told_by_their_width(small: Engine) -> None:
    told: list[int] = []
    done = small.generate("Once", max_new_tokens=60, bits=8, draft_bits=3, on_bits=told.append)
    assert len(told) == len(done.tokens)
    assert told.count(3) == done.accepted


def test_a_draft_that_is_never_right_is_hardly_tried(folder: Path) -> None:
    """Its length falls to none, but for a try now and then; with one that is right it grows."""
    engine = load(folder, threads=1)
    wild = Sampling(temperature=50.0, seed=1, repetition_penalty=1.0)
    done = engine.generate("Once", max_new_tokens=250, bits=8, draft_bits=2, sampling=wild)
    calm = engine.generate("Once", max_new_tokens=250, bits=8, draft_bits=4, draft_tokens=8)
    assert done.tokens
    assert calm.widths.count(8) < 250


def draws(engine: Engine, count: int, sampling: dict[str, Any], **options: Any) -> list[list[int]]:
    """Answers of three tokens for seeds 0 .. count - 1."""
    options |= {"bits": 8, "max_new_tokens": 3, "context": 100, "eos": ()}
    chosen = [Sampling(**({"temperature": 0.2, "seed": seed} | sampling)) for seed in range(count)]
    return [engine._model.generate([[3, 4, 5]], sampling=one, **options)[0].tokens for one in chosen]


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 12}, {"top_p": 0.85}, {"min_p": 0.05, "temperature": 0.4}, {"repetition_penalty": 1.4}]
)
def test_drafts_leave_the_distribution_of_samples_alone(folder: Path, sampling: dict[str, Any]) -> None:
    """Chi-square of the second and third token against exact probabilities, fixed seeds.

    The first token comes of the prompt; the second is the first that a pass may accept, reject or draw anew.
    """
    small, count = load(folder, threads=1), 1500
    exact = exact_pairs(small, Sampling(**({"temperature": 0.2} | sampling)))
    drafting = native.Drafting(bits=2, most=3, cost=0.3, row_cost=0.01)
    drafted = draws(small, count, sampling, drafting=drafting)
    seen = Counter((tokens[0], tokens[1]) for tokens in drafted)
    assert statistic(seen, exact, count) < 3.0
    third = Counter(tokens[2] for tokens in drafted)
    plain = Counter(tokens[2] for tokens in draws(small, count, sampling))
    assert two_samples(third, plain) < 3.0


def exact_pairs(engine: Engine, sampling: Sampling) -> dict[tuple[int, int], float]:
    """Probability of each first and second token, by drawing nothing."""
    found: dict[tuple[int, int], float] = {}
    first = cut(engine.logits([3, 4, 5], bits=8)[-1], sampling, {3, 4, 5})
    for token in np.flatnonzero(first):
        second = cut(engine.logits([3, 4, 5, int(token)], bits=8)[-1], sampling, {3, 4, 5, int(token)})
        found |= {(int(token), int(n)): float(first[token] * second[n]) for n in np.flatnonzero(second)}
    return found


def cut(row: np.ndarray, sampling: Sampling, seen: set[int]) -> np.ndarray:
    """The distribution that `Sampling` describes, in float64."""
    logits = row.astype(np.float64)
    for token in seen:
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        held = np.cumsum(weights[order])
        weights[order[np.searchsorted(held, sampling.top_p * held[-1]) + 1 :]] = 0
    weights[weights < sampling.min_p * weights.max()] = 0
    return weights / weights.sum()


def statistic(seen: Counter[tuple[int, int]], exact: dict[tuple[int, int], float], count: int) -> float:
    """How many standard deviations chi-square lies above its mean; cells that expect less than 5 are one cell."""
    assert set(seen) <= {pair for pair, p in exact.items() if p > 0}
    common = {pair: p for pair, p in exact.items() if p * count >= 5}
    expected = [p * count for p in common.values()]
    found = [seen[pair] for pair in common]
    rest = count - sum(expected)
    if rest >= 5:
        expected.append(rest)
        found.append(count - sum(found))
    chi = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    free = len(expected) - 1
    assert free >= 5
    return float((chi - free) / np.sqrt(2 * free))


def two_samples(one: Counter[int], two: Counter[int]) -> float:
    """The same for two samples of one size."""
    common = [t for t in one.keys() | two.keys() if one[t] + two[t] >= 10]
    pairs = [(one[t], two[t]) for t in common]
    pairs.append((one.total() - sum(a for a, _ in pairs), two.total() - sum(b for _, b in pairs)))
    chi = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    free = len(pairs) - 1
    return float((chi - free) / np.sqrt(2 * free))


def test_the_same_seed_drafts_the_same_tokens_in_any_company(small: Engine) -> None:
    prompts: list[Any] = ["a", "Once", [1, 2, 3]]
    options: dict[str, Any] = {"max_new_tokens": 60, "bits": 8, "draft_bits": 3, "sampling": WARM}
    together = small.generate_batch(prompts, **options)
    for prompt, done in zip(prompts, together, strict=True):
        alone: Generation = small.generate(prompt, **options)
        assert (alone.tokens, alone.widths, alone.accepted) == (done.tokens, done.widths, done.accepted)


# The schedule an artifact keeps.


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.lilliput"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_the_stored_schedule_is_followed_unless_something_else_is_said(copy: Path) -> None:
    amend.set_schedule(copy, parse("8@prompt,4@0,2@5").entry())
    engine = load(copy, threads=1)
    assert str(engine.schedule) == "8@prompt,4@0,2@5"
    done = engine.generate("Once", max_new_tokens=10)
    assert (done.prefill_bits, done.widths) == (8, (4,) * 5 + (2,) * 4)
    assert set(engine.generate("Once", max_new_tokens=10, bits=3).widths) == {3}
    assert engine.generate("Once", max_new_tokens=10, schedule=Static(at=((0, 3), (2, 2)))).widths[:3] == (3, 3, 2)
    assert engine.generate("Once", max_new_tokens=10, draft_bits=2).widths[-1] == 8
    assert [d.widths for d in engine.generate_batch(["a", "b"], max_new_tokens=10)] == [done.widths] * 2


def test_a_copy_without_the_schedules_widths_does_without(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    amend.set_schedule(copy, parse("8@0,2@5").entry())
    (copy / "bits-8.safetensors").unlink()
    engine = load(copy, threads=1)
    assert set(engine.generate("Once", max_new_tokens=10).widths) == {4}
    assert "this copy lacks 8 bits, so its schedule is left out" in caplog.text


def test_what_was_learned_for_another_model_or_horizon_is_one_line(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = {"query": np.ones((2, 3), dtype=np.float32)}
    entry = ScheduleEntry(name="confidence", prefill_bits=4, ladder=(4, 2), horizon=64)
    manifest = amend.set_schedule(copy, entry, learned)
    assert load(copy).schedule == Confidence(ladder=(4, 2))
    other = tmp_path / "other"
    write_small_artifact(other, SPEC, seed=5)
    with Artifact.open(copy) as opened:
        tensors, said = opened.schedule_tensors()
        assert np.array_equal(tensors["query"], learned["query"])
        assert said["horizon"] == "64"
        wrong = opened.manifest.model_copy(
            update={"schedule": opened.manifest.schedule.model_copy(update={"horizon": 32})}  # type: ignore[union-attr]
        )
    monkeypatch.setattr(Artifact, "manifest", wrong, raising=False)
    assert manifest.schedule is not None
    engine = load(copy)
    engine.artifact.manifest = wrong
    with pytest.raises(ConfigError, match=r": schedule: confidence was learned for answers of 64 tokens, not of 32\. "):
        engine.generate("Once")
    engine = load(copy)
    said_of = {"schedule": manifest.schedule.model_copy(update={"model": "0" * 64})}
    engine.artifact.manifest = manifest.model_copy(update=said_of)
    with pytest.raises(ConfigError, match=r": schedule: confidence was learned from another model than this\. "):
        engine.generate("Once")


def test_a_damaged_file_and_a_schedule_nobody_knows_are_one_line(copy: Path) -> None:
    entry = ScheduleEntry(name="confidence", prefill_bits=4, ladder=(4, 2), horizon=64)
    manifest = amend.set_schedule(copy, entry, {"query": np.ones((2, 3), dtype=np.float32)})
    assert manifest.schedule is not None
    file = copy / str(manifest.schedule.file)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputCorrupt, match=r"the contents do not match their SHA-256"):
        load(copy).generate("Once")
    amend.set_schedule(copy, entry.model_copy(update={"options": {"measured": 5}}))
    with pytest.raises(ConfigError, match=r": schedule: confidence cannot be made of what is stored \(.*measured"):
        load(copy).generate("Once")
    assert load(copy).generate("Once", max_new_tokens=2, bits=4).tokens  # a width needs no schedule


def test_threads_may_share_a_schedule(small: Engine) -> None:
    expected = small.generate("Once", max_new_tokens=60, schedule=FALL, sampling=WARM).tokens
    results: list[tuple[int, ...]] = []

    def work() -> None:
        results.append(small.generate("Once", max_new_tokens=60, schedule=FALL, sampling=WARM).tokens)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 4


def test_threads_run_one_engine_at_widths_of_their_own(small: Engine) -> None:
    """Card section 5, trap 8: a width is an argument of a forward and not a state of the weights."""
    schedules: list[Schedule] = [FALL, Constant(bits=2), parse("8@prompt,3@0,2@20"), Constant(bits=8)]
    options: dict[str, Any] = {"max_new_tokens": 60, "sampling": WARM}
    alone = [small.generate("Once", schedule=one, **options).tokens for one in schedules]
    together: dict[int, tuple[int, ...]] = {}

    def work(index: int) -> None:
        together[index] = small.generate("Once", schedule=schedules[index], **options).tokens

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [together[index] for index in range(4)] == alone
    assert len(set(alone)) == 4
