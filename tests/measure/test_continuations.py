"""Metrics along an answer beside float64, the notebook of a killed run, and references of the original."""

from pathlib import Path

import numpy as np
import pytest

from lilliput.core.errors import ConfigError
from lilliput.engine import Engine, load
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.engine.schedules.sure import Entropy
from lilliput.engine.schedules.text import parse
from lilliput.measure.continuations import Case, Judge, Notebook, Widest, settled, write_answers
from lilliput.measure.metrics import KL, NLL, Agreement, Original, RougeL, divergences
from lilliput.numerics.divergence import divergence, log_softmax
from support.schedules import features, learned
from support.small_artifact import write_small_artifact

PROMPTS = [[257, 5, 6, 7], [257, 90, 12], [257, 258, 40, 41, 42]]  # the third has an end of sequence inside
TALES = Path(__file__).parents[2] / "assets" / "tales7m"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("continuations") / "small.lilliput"
    write_small_artifact(folder)
    return load(folder, threads=1)


@pytest.fixture(scope="module")
def cases(small: Engine) -> list[Case]:
    return write_answers(PROMPTS, Widest(small), 20, Notebook(None, {}))


def test_answers_are_the_widest_run_and_an_end_of_sequence_in_the_prompt_ends_nothing(
    small: Engine, cases: list[Case]
) -> None:
    assert [case.answer for case in cases] == [small.generate(p, bits=8, max_new_tokens=20).tokens for p in PROMPTS]
    assert len(cases[2].answer) > 1


def test_figures_are_those_of_whole_passes(small: Engine, cases: list[Case]) -> None:
    for metric in (KL(), NLL(), Agreement()):
        judge = Judge(small, cases, metric, Widest(small), 20)
        scored = judge.score(Constant(bits=3))
        for score, case in zip(scored.scores, cases, strict=True):
            ids, at = np.array(case.prompt + case.answer[:-1]), len(case.prompt) - 1
            wide, low = small.logits(ids)[at:], small.logits(ids, bits=3)[at:]
            kl, same = divergence(wide, low)
            nll = -log_softmax(low)[np.arange(len(low)), list(case.answer)].mean()
            assert score == pytest.approx(
                {"kl": kl.mean(), "agreement": same.mean(), "nll": nll}[metric.name], rel=1e-4
            )
        assert judge.score(Constant(bits=8)).average_bits == 8


def test_a_divergence_in_float32_keeps_what_a_small_one_needs() -> None:
    draw = np.random.default_rng(0)
    wide = draw.normal(0, 4, (20, 1000)).astype(np.float32)
    near = (wide + draw.normal(0, 0.02, wide.shape)).astype(np.float32)
    np.testing.assert_allclose(divergences(near, Original.of(wide)), divergence(wide, near)[0], atol=3e-6)


def test_the_same_text_scores_one_and_widths_are_those_used(small: Engine, cases: list[Case]) -> None:
    judge = Judge(small, cases, RougeL(), Widest(small), 20)
    assert (judge.score(Constant(bits=8)).scores == 1).all()
    scored = judge.score(Static(at=((0, 8), (4, 2))))
    assert scored.average_bits == pytest.approx(
        (scored.forwards.clip(max=4) * 6 + scored.forwards * 2).sum() / scored.forwards.sum()
    )


def test_what_is_written_is_not_cut_where_the_reference_ends(small: Engine, cases: list[Case]) -> None:
    """Card section 5, trap 5: every branch is as long as it makes itself."""
    early = [Case(case.prompt, case.answer[:4]) for case in cases]
    judge = Judge(small, early, RougeL(), Widest(small), 20)
    scored = judge.score(Constant(bits=8))
    assert scored.scores.tolist() == [2 * 4 / (len(case.answer) + 4) for case in cases]
    forwards = [len(small.generate(case.prompt, bits=8, max_new_tokens=20).widths) for case in cases]
    assert scored.forwards.tolist() == forwards


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("watch", [None, 0, 5, 60])
def test_steps_that_a_schedule_comes_to_are_those_it_would_follow(
    small: Engine, cases: list[Case], seed: int, watch: int | None
) -> None:
    """To the bit, though what looks at signals goes token by token and known steps go in stretches."""
    shape = small.spec.num_kv_heads, small.spec.head_dim
    schedule = (learned(*shape, seed=seed) if watch is None else features(watch, slope=0.05 * seed)).fitted(small.bits)
    for case in cases:
        known = settled(small, case, schedule)
        assert known.steps() is not None
        assert all(start < case.forwards for start, _ in known.steps() or ())
        text = case.prompt + case.answer[:-1]
        (rows, widths), (plain, used) = (small.follow(text, len(case.prompt), one) for one in (known, schedule))
        assert widths == used
        np.testing.assert_array_equal(rows, plain)


def test_what_no_forward_meets_is_left_out_and_what_looks_everywhere_stays() -> None:
    case, engine = Case((1, 2), tuple(range(11))), None  # an engine is not asked

    def known(schedule: Schedule) -> str:
        return str(settled(engine, case, schedule))  # type: ignore[arg-type]

    assert known(parse("4@0,3@9,2@10")) == "4@0,3@9"
    assert known(parse("4@0,3@10")) == known(Constant(bits=4)) == "4"
    assert known(parse("8@prompt,4@0,3@10")) == known(parse("8@prompt,4@0")) == "8@prompt,4@0"
    rising = settled(engine, case, Static(at=((0, 2), (3, 4), (12, 2)), allow_raise=True, prefill=4))  # type: ignore[arg-type]
    assert (rising.steps(), rising.prefill_bits) == (((0, 2), (3, 4)), 4)
    asking = Entropy(ladder=(4, 2))
    assert settled(engine, case, asking) is asking  # type: ignore[arg-type]


def test_schedules_that_come_to_the_same_are_scored_once(
    small: Engine, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = Engine.follow

    def counted(self, tokens, prompt_tokens, schedule):  # type: ignore[no-untyped-def]
        asked.append(str(schedule))
        return real(self, tokens, prompt_tokens, schedule)

    monkeypatch.setattr(Engine, "follow", counted)
    judge = Judge(small, [Case(case.prompt, case.answer[:8]) for case in cases], KL(), Widest(small), 20)
    first, second = judge.score(parse("8@0,4@4")), judge.score(parse("8@0,4@4,2@7"))  # of 8 tokens, 7 are forwarded
    assert (first.scores == second.scores).all()
    assert asked == ["8@0,4@4"] * 3


def test_tolerances() -> None:
    assert KL().allowance(0.3, 0.01) == pytest.approx(np.log(1.01))
    assert RougeL().allowance(0.8, 0.01) == pytest.approx(0.008)
    assert RougeL().loss(np.array(0.7), np.array(0.8)) > 0 > KL().loss(np.array(0.1), np.array(0.2))


def test_a_killed_run_goes_on_and_a_torn_line_is_left_out(small: Engine, cases: list[Case], tmp_path: Path) -> None:
    path, about = tmp_path / "notes.jsonl", {"model": "a"}
    first = Notebook(path, about)
    whole = Judge(small, cases, KL(), Widest(small), 20, first).score(Constant(bits=2))
    with pytest.raises(ConfigError, match="another run works here"):
        Notebook(path, about)
    first.close()
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the last of the three scores
    again = Notebook(path, about)
    asked: list[int] = []

    class Counting(KL):
        def score(self, logits, original, answer):  # type: ignore[no-untyped-def]
            asked.append(len(answer))
            return super().score(logits, original, answer)

    assert (
        Judge(small, cases, Counting(), Widest(small), 20, again).score(Constant(bits=2)).scores == whole.scores
    ).all()
    again.close()
    assert len(asked) == 1
    other = Notebook(path, {"model": "b"})
    assert len(path.read_text().splitlines()) == 1
    other.close()


def test_the_original_writes_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from lilliput.measure.reference import TorchRunner, WritingOriginal
    from lilliput.models import Checkpoint, load_decoder

    checkpoint = Checkpoint.open(TALES)
    original = WritingOriginal(checkpoint, (1,), threads=1)
    ids = np.array([0, 300, 400, 500], dtype=np.int32)
    np.testing.assert_allclose(original.logits(ids), TorchRunner(load_decoder(checkpoint)).logits(ids), atol=2e-3)
    (written,) = original.write([ids.tolist()], 3)
    assert written[0] == original.logits(ids)[-1].argmax()
