"""The parts of the benchmark of schedules that need no trained model: who is measured, what is compared."""

import importlib
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lilliput.engine import Engine, load
from lilliput.engine.schedules.fixed import Constant
from lilliput.engine.schedules.sure import Entropy
from lilliput.engine.schedules.text import parse
from lilliput.measure.continuations import Case, Notebook, Widest, write_answers
from lilliput.scheduling.search import static
from support.small_artifact import llama_spec, write_small_artifact

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def pmpd(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("pmpd")


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    write_small_artifact(tmp_path / "small.lilliput", llama_spec().model_copy(update={"context": 512}))
    return load(tmp_path / "small.lilliput", threads=1)


def test_no_document_is_both_fitted_on_and_measured_on(pmpd: ModuleType) -> None:
    documents = [f"document {i}" for i in range(41)]
    fit, test = pmpd.parted(documents)
    assert sorted(fit + test) == sorted(documents)
    assert len(fit) == 10
    assert pmpd.parted(documents) == (fit, test)


def test_prompts_are_disjoint_pieces_that_begin_as_the_model_wants(pmpd: ModuleType, engine: Any) -> None:
    text = "".join(chr(97 + i % 26) for i in range(3000))
    prompts = pmpd.cut([text, "short"], engine, 100, 0)
    assert len(prompts) == 4  # of the long one, at 0, 750, 1500, 2250; the short one gives none
    assert all(prompt[0] == engine.tokenizer.bos_id and 32 <= len(prompt) <= 192 for prompt in prompts)


def test_prompts_of_several_kinds_are_known_by_kind(pmpd: ModuleType, engine: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = ("".join(f'{{"said": "{name} {i} {"x" * 60}"}}\n' for i in range(20)), "")
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    sources = [f"{name}={tmp_path / name}.jsonl:said" for name in ("a", "b")]
    fit, test = pmpd.prompts_of(sources, engine, pmpd.Size(6, 9, 24, 1))
    assert [len(fit[name]) for name in "ab"] == [3, 3]
    assert [len(test[name]) for name in "ab"] == [5, 5]
    assert not {tuple(prompt) for prompt in fit.all()} & {tuple(prompt) for prompt in test.all()}
    cases = [Case(tuple(prompt), (1, 2)) for prompt in reversed(test.all())]
    assert test.of(cases) == ["b"] * 5 + ["a"] * 5
    assert all(
        engine.tokenizer.decode(case.prompt)[0] == kind for case, kind in zip(cases, test.of(cases), strict=True)
    )


def test_a_line_says_what_each_kind_gets(pmpd: ModuleType) -> None:
    kl, ones = np.array([0.1, 0.3, 0.5, 0.7]), np.ones(4)
    rows = {
        name: pmpd.Rows(kl, ones, ones, ones * bits * 10, ones * 10) for name, bits in (("4", 4), ("3", 3), ("2", 2))
    }
    told = pmpd.report("mixed", rows, dict.fromkeys(rows, ""), list(rows), pmpd.QUICK, ["a", "a", "b", "b"])
    assert [line["kl_by_kind"] for line in told] == [{"a": 0.2, "b": 0.6}] * 3
    assert told[1]["bits_by_kind"] == {"a": 3, "b": 3}


def test_random_switching_deals_the_same_widths(pmpd: ModuleType) -> None:
    cases = [Case((1,), tuple(range(count))) for count in (30, 25, 2)]
    steps = static((4, 3, 2), (10, 20), 30)
    for case, dealt in zip(cases, pmpd.shuffled(steps, cases), strict=True):
        at = dealt.steps()
        widths = [next(bits for start, bits in reversed(at) if start <= t) for t in range(case.forwards)]
        plain = [4 if t < 10 else 3 if t < 20 else 2 for t in range(case.forwards)]
        assert sorted(widths) == sorted(plain)
        assert dealt.prefill_bits == 4
        if case.forwards > 20:
            assert widths != plain


def test_a_line_through_constants_is_what_mixing_them_gives(pmpd: ModuleType) -> None:
    def rows(bits: float, kl: float) -> Any:
        return pmpd.Rows(np.full(3, kl), np.ones(3), np.ones(3), np.full(3, bits * 10), np.full(3, 10.0))

    told = {"4": rows(4, 0.1), "3": rows(3, 0.3), "2": rows(2, 1.1)}
    assert pmpd.interpolated(told, ["4", "3", "2"], 2.25, slice(None)) == pytest.approx(0.9)
    told["bad"] = rows(2.5, 2.0)  # a point above the line is not needed, and does not bend it
    assert pmpd.interpolated(told, list(told), 2.25, slice(None)) == pytest.approx(0.9)
    told["good"] = rows(2.5, 0.35)  # and one below makes 3 bits useless
    assert pmpd.interpolated(told, list(told), 3.0, slice(None)) == pytest.approx(0.35 - 0.25 / 3)
    value, (low, high) = pmpd.interval(lambda of: float(np.arange(50.0)[of].mean()), 50)
    assert low < value == 24.5 < high


def test_figures_along_answers_and_of_what_is_written(pmpd: ModuleType, engine: Any) -> None:
    draw = random.Random(0)
    prompts = [[257, *(draw.randrange(200) for _ in range(6))] for _ in range(4)]
    size, author = pmpd.Size(4, 4, 24, 1), Widest(engine)
    cases = write_answers(prompts, author, size.tokens, Notebook(None, {}))
    runs = {"8": Constant(bits=8), "2": Constant(bits=2), "each": [Constant(bits=4)] * len(cases)}
    rows = pmpd.along(engine, author, cases, runs, Notebook(None, {}))
    pmpd.written(engine, cases, runs, rows, size)
    assert [round(rows[name].average_bits(), 6) for name in runs] == [8, 2, 4]
    assert rows["8"].kl.max() < 1e-5 < rows["2"].kl.min()
    assert (rows["8"].rouge == 1).all()
    assert rows["2"].tail_tokens.tolist() == [len(case.answer) - len(case.answer) * 2 // 3 for case in cases]


def test_a_stopped_run_goes_on_and_asks_for_nothing_twice(
    pmpd: ModuleType, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case((257, 4, 5), (7, 9, 11, 13, 15)), Case((257, 6), (8, 10, 12))]
    runs = {"8": Constant(bits=8), "falls": parse("8@0,4@2"), "late": parse("8@0,4@4"), "entropy": Entropy()}
    whole = pmpd.along(engine, Widest(engine), cases, runs, Notebook(None, {}))
    left, real = [5], Engine.follow

    def counted(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Engine, "follow", counted)
    notebook = Notebook(tmp_path / "along.jsonl", {})
    with pytest.raises(KeyboardInterrupt):
        pmpd.along(engine, Widest(engine), cases, runs, notebook)
    notebook.close()
    left[0] = 100
    notebook = Notebook(tmp_path / "along.jsonl", {})
    again = pmpd.along(engine, Widest(engine), cases, runs, notebook)
    notebook.close()
    assert left[0] == 100 - 2  # of the second answer 8 bits, to which both steps come, and entropy
    for name in runs:
        assert (again[name].kl == whole[name].kl).all()
        assert (again[name].bits == whole[name].bits).all()


def test_knowing_every_loss_spends_bits_where_they_help(pmpd: ModuleType) -> None:
    """Half of the cases lose nothing at 2 bits; what 1 % allows is spent on none of the others."""
    ones = np.ones(10)
    lost = np.where(np.arange(10) < 5, 0.0, 0.5)
    four, two = (pmpd.Rows(kl, ones, ones, ones * bits * 9, ones * 9) for kl, bits in ((ones * 0, 4), (lost, 2)))
    told = pmpd.knowing([two, four], four, 0.01)
    assert told.average_bits() == 3
    assert told.kl.max() == 0
    assert pmpd.knowing([two, four], four, 0.6).average_bits() == 2


def test_speed_tells_whether_drafts_changed_a_token(pmpd: ModuleType, engine: Any, monkeypatch: Any) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(pmpd, "emit", lambda name, **fields: kept.append(fields))
    size = pmpd.Size(0, 0, 16, 2)
    runs = pmpd.speed_runs(["4@0,2@8"], size, True)
    found = pmpd.speed(engine, runs, [257, 5, 6], size)
    assert found["4"]["times_constant_4"] == 1
    assert found["4, drafts at 2"]["same_tokens_as_4"]
    assert found["4@0,2@8"]["average_bits"] == pytest.approx((8 * 4 + 7 * 2) / 15)
    assert found["4@0,2@8 in random order"]["average_bits"] == found["4@0,2@8"]["average_bits"]
    assert len(kept) == len(runs) == 7
    assert len(pmpd.speed_runs(["4@0,2@8"], size, False)) == 5
