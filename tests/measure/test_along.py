"""Schedules along reference answers: the figures, who is asked how often, and what a trained model loses by them."""

import json
from pathlib import Path

import numpy as np
import pytest

from lilliput.core.errors import ConfigError, InputMissing
from lilliput.engine import Engine, load
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.engine.schedules.sure import Entropy
from lilliput.engine.schedules.text import parse
from lilliput.measure.along import AlongJob, along, measure_along, shipped_prompts
from lilliput.measure.continuations import Case, Judge, Notebook, Widest, write_answers
from lilliput.measure.metrics import KL, Agreement
from lilliput.numerics.divergence import divergence, log_softmax
from support.small_artifact import write_small_artifact

TALES = Path(__file__).parents[2] / "assets" / "tales7m"
PROMPTS = [[257, 5, 6, 7], [257, 90, 12], [257, 40, 41, 42, 43]]
FALL = parse("8@0,4@3,2@9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("along") / "small.lilliput"
    write_small_artifact(path)
    return path


@pytest.fixture(scope="module")
def small(folder: Path) -> Engine:
    return load(folder, threads=1)


def test_every_token_of_an_answer_has_its_figures(small: Engine) -> None:
    (case,) = write_answers(PROMPTS[:1], Widest(small), 16, Notebook(None, {}))
    narrow, wide, fall = along(small, Widest(small), case, [Constant(bits=3), Constant(bits=8), FALL])
    ids, at = np.array(case.prompt + case.answer[:-1]), len(case.prompt) - 1
    reference, said = small.logits(ids)[at:], small.logits(ids, bits=3)[at:]
    kl, same = divergence(reference, said)
    np.testing.assert_allclose(narrow.kl, kl, atol=1e-5)
    assert narrow.same.tolist() == same.tolist()
    nll = -log_softmax(said)[np.arange(len(said)), list(case.answer)]
    np.testing.assert_allclose(narrow.surprise, nll, rtol=1e-4)
    assert wide.kl.max() < 1e-5
    assert wide.same.all()
    assert fall.widths == ((8,) * 3 + (4,) * 6 + (2,) * 99)[: case.forwards]
    assert (
        fall.kl[:4].max() < 1e-5 < fall.kl[4:].max()
    )  # row i is of the forward that chose token i, the first the prompt's


def test_means_are_those_a_search_compares_and_the_reference_meets_an_answer_once(folder: Path, small: Engine) -> None:
    job = AlongJob(prompt_tokens=12, new_tokens=14, limit=3)
    schedules: list[Schedule] = [Constant(bits=8), FALL, Constant(bits=2), Entropy(ladder=(4, 2), measure=2)]
    rows = measure_along(folder, job, schedules, threads=1)
    prompts = [small.tokenizer.encode(text)[:12] for text in shipped_prompts()[:1]]
    asked: list[int] = []

    class Counting(Widest):
        def logits(self, tokens):  # type: ignore[no-untyped-def]
            asked.append(len(tokens))
            return super().logits(tokens)

    assert rows[0].kl < 1e-5 < rows[1].kl < rows[2].kl
    assert rows[0].top1_agreement == 1
    assert (rows[0].average_bits, rows[2].average_bits) == (8, 2)
    assert 2 < rows[1].average_bits < 8
    assert {row.answers for row in rows} == {3}
    assert all(row.kl_ci95 is not None and row.kl_ci95[0] <= row.kl <= row.kl_ci95[1] for row in rows)
    cases = write_answers(prompts, Widest(small), 14, Notebook(None, {}))
    (case,) = cases
    along(small, Counting(small), case, schedules)
    assert asked == [len(case.prompt) + len(case.answer) - 1]
    one = measure_along(folder, AlongJob(prompt_tokens=12, new_tokens=14, limit=1), schedules, threads=1)
    for schedule, row in zip(schedules, one, strict=True):
        for metric, value in ((KL(), row.kl), (Agreement(), row.top1_agreement)):
            scored = Judge(small, cases, metric, Widest(small), 14).score(schedule)
            assert value == pytest.approx(scored.score, abs=1e-9)
        assert row.average_bits == scored.average_bits
        assert (row.kl_ci95, row.answers, row.tokens) == (None, 1, len(case.answer))


def test_the_interval_is_of_a_mean_over_answers(folder: Path, small: Engine) -> None:
    (row,) = measure_along(folder, AlongJob(prompt_tokens=12, new_tokens=14, limit=4), [Constant(bits=2)], threads=1)
    prompts = [small.tokenizer.encode(text)[:12] for text in shipped_prompts()[:4]]
    cases = write_answers(prompts, Widest(small), 14, Notebook(None, {}))
    scores = Judge(small, cases, KL(), Widest(small), 14).score(Constant(bits=2)).scores
    half = 1.96 * scores.std(ddof=1) / 2
    assert row.kl_ci95 == pytest.approx((scores.mean() - half, scores.mean() + half))


def test_prompts_are_rows_of_a_file_cut_to_length(folder: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"said": f"row {i}" + " and on" * 9, "n": i}) + "\n" for i in range(3)))
    job = AlongJob(text=str(task), field="said", prompt_tokens=20, new_tokens=6, limit=None)
    (row,) = measure_along(folder, job, [Constant(bits=2)], threads=1)
    assert row.answers == 3
    whole = tmp_path / "whole.txt"
    whole.write_text("row 0" + " and on" * 9)
    (row,) = measure_along(folder, AlongJob(text=str(whole), prompt_tokens=20, new_tokens=6), [Constant(bits=2)])
    assert row.answers == 4  # one document of 68 bytes, 19 of them beside the BOS of each piece
    with pytest.raises(InputMissing, match=r"nowhere\.jsonl"):
        measure_along(folder, AlongJob(text=str(tmp_path / "nowhere.jsonl")), [Constant(bits=2)])


def test_the_prompts_shipped_are_texts_of_several_kinds() -> None:
    prompts = shipped_prompts()
    assert len(prompts) == len(set(prompts)) == 8
    assert all(20 < len(prompt) < 200 and prompt == prompt.strip() for prompt in prompts)


def test_an_original_of_another_vocabulary_is_refused_in_one_line(folder: Path) -> None:
    pytest.importorskip("torch")
    job = AlongJob(against=str(TALES), new_tokens=4)
    with pytest.raises(
        ConfigError, match=r"tales7m: has 4096 tokens, the artifact 261\. Give the model that the artifact"
    ):
        measure_along(folder, job, [Constant(bits=2)])


def test_on_a_trained_model_wide_beginnings_and_wide_prompts_help(tmp_path: Path) -> None:
    """Method card, section 8, item 8, on the model in assets against its float self, averaged over prompts.

    A prompt of 96 tokens and an answer of 48: what the prompt's width does is seen before the answer outgrows it.
    """
    pytest.importorskip("torch")
    from lilliput.measure.reference import open_writer
    from lilliput.pipeline import compress

    wide = {"bits": [2, 4, 8], "group_size": 64, "ragged": True, "end_bits": [8], "sym": False}
    compress(str(TALES), tmp_path / "tales", recipe=[{"rtn": wide}])
    engine = load(tmp_path / "tales", threads=1)
    text = (TALES / "valid.txt").read_text("utf-8")
    prompts = [engine.tokenizer.encode(text[at : at + 700])[:96] for at in range(0, 16_000, 2_000)]
    author = open_writer(TALES, engine)
    cases = write_answers(prompts, author, 48, Notebook(None, {}))
    assert len(cases) == 8
    low, fall, read = Constant(bits=2), Static(at=((0, 4), (24, 2))), parse("8@prompt,2@0")
    late = Static(at=((0, 4), (40, 2)))
    kl = np.array([[one.kl.mean() for one in along(engine, author, case, [low, fall, late, read])] for case in cases])
    of_low, of_fall, of_late, of_read = kl.mean(0)
    assert of_late < of_fall < of_low
    assert of_read < of_low
    assert (kl[:, 1] < kl[:, 0]).all()  # on every prompt, not only in the mean


def test_a_case_needs_no_particular_length(small: Engine) -> None:
    (one,) = along(small, Widest(small), Case((257, 4), (7, 9)), [parse("4@0,2@1")])
    assert (one.widths, one.kl.shape) == ((4,), (2,))
