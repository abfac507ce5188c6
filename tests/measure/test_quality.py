import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.core.errors import ConfigError, QualityFailed
from lilliput.data.documents import read_documents
from lilliput.data.streams import windows
from lilliput.data.tokenizer import Tokenizer
from lilliput.measure import quality
from lilliput.measure.quality import evaluate
from lilliput.numerics.divergence import log_softmax

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
VOCAB = 7


class Table:
    """A runner whose logits depend on the token alone; `noise` in its widths, 8 / bits of it."""

    def __init__(self, seed: int = 0, scale: float = 3.0) -> None:
        generator = np.random.default_rng(seed)
        self.table = (scale * generator.standard_normal((VOCAB, VOCAB))).astype(np.float32)
        self.noise = generator.standard_normal((VOCAB, VOCAB)).astype(np.float32)
        self.calls: list[int | None] = []

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        self.calls.append(bits)
        return (self.table + (0 if bits is None else 1 / bits) * self.noise)[tokens]


WINDOWS = [np.array(w, dtype=np.int32) for w in ([0, 1, 2, 3], [0, 6], [0, 5, 4, 4, 1])]


def by_hand(runner: Table, original: Table, bits: int | None) -> tuple[float, float, float]:
    """(nll, kl, agreement) by the definitions, one position at a time."""
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for window in WINDOWS:
        q_logits, p_logits = runner.logits(window, bits=bits), original.logits(window)
        for i in range(len(window) - 1):
            q = [math.exp(float(v)) for v in q_logits[i]]
            p = [math.exp(float(v)) for v in p_logits[i]]
            q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
            nll -= math.log(q[window[i + 1]])
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            agree += max(range(VOCAB), key=p.__getitem__) == max(range(VOCAB), key=q.__getitem__)
            count += 1
    return nll / count, kl / count, agree / count


@pytest.mark.parametrize("cells", [quality._CELLS, 14])  # all rows at once, and two at a time
def test_figures_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(quality, "_CELLS", cells)
    runner, original = Table(), Table()
    rows = evaluate(runner, WINDOWS, bits=[2, 4, None], against=original)
    assert [row.bits for row in rows] == [2, 4, None]
    for row in rows:
        nll, kl, agreement = by_hand(runner, original, row.bits)
        assert row.tokens == 8
        assert row.windows == 3
        assert row.nll == pytest.approx(nll, rel=1e-12)
        assert row.perplexity == pytest.approx(math.exp(nll), rel=1e-12)
        assert row.kl == pytest.approx(kl, rel=1e-9, abs=1e-15)
        assert row.top1_agreement == agreement
        assert row.nll_increase == pytest.approx(nll - by_hand(original, original, None)[0], abs=1e-12)


def test_a_model_does_not_diverge_from_itself() -> None:
    row, again = evaluate(Table(), WINDOWS, bits=[None, None], against=Table())
    assert (row.kl, row.top1_agreement, row.nll_increase) == (0.0, 1.0, 0.0)
    assert row.kl_ci95 == row.nll_increase_ci95 == (0.0, 0.0)
    assert row == again


def test_the_original_runs_once_a_window_whatever_the_widths() -> None:
    runner, original = Table(), Table()
    evaluate(runner, WINDOWS, bits=[None, 2, 3], against=original)
    assert original.calls == [None] * 3
    assert runner.calls == [2, 3] * 3


def test_without_an_original_nothing_is_compared() -> None:
    (row,) = evaluate(Table(), WINDOWS, bits=[None])
    assert row.kl is row.kl_ci95 is row.top1_agreement is row.nll_increase is None
    assert row.nll == pytest.approx(by_hand(Table(), Table(), None)[0], rel=1e-12)


def test_the_interval_is_that_of_a_mean_where_windows_are_equal() -> None:
    sums = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = quality._interval(sums, np.full(4, 2.0)) or (0, 0)
    half = 1.96 * np.std(sums / 2, ddof=1) / 2
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert quality._interval(sums[:1], np.array([2.0])) is None


@given(st.floats(-1e4, 1e4, width=32), st.integers(0, 2**32 - 1))
def test_a_constant_on_all_logits_changes_nothing(shift: float, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(-8, 8, (3, VOCAB)).astype(np.float32)
    shifted = log_softmax((logits + np.float32(round(shift))).astype(np.float32))
    np.testing.assert_allclose(shifted, log_softmax(logits), atol=1e-12)
    np.testing.assert_allclose(np.exp(shifted).sum(axis=1), 1, rtol=1e-12)


def test_extreme_logits_do_not_overflow() -> None:
    runner = Table()
    runner.table[:] = np.float32(-3e38)
    runner.table[:, 6] = np.float32(3e38)
    (row,) = evaluate(runner, WINDOWS[:1], bits=[None])
    assert row.perplexity == math.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_name_width_and_window(value: float) -> None:
    runner = Table()
    runner.table[4, 2] = value
    with pytest.raises(QualityFailed, match=r"^3 bits: logits are not finite in window 2 at position 2\."):
        evaluate(runner, WINDOWS, bits=[3], against=Table())
    with pytest.raises(QualityFailed, match=r"^the original: logits are not finite in window 2"):
        evaluate(Table(), WINDOWS, bits=[3], against=runner)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate: nothing to measure"):
        evaluate(Table(), [], bits=[None])
    with pytest.raises(ConfigError, match="window 1 predicts nothing"):
        evaluate(Table(), [WINDOWS[0], np.array([1], dtype=np.int32)], bits=[None])
    small = Table()
    small.table, small.noise = small.table[:, :5], small.noise[:, :5]
    with pytest.raises(ConfigError, match="5 logits a token, the original has 7"):
        evaluate(small, [np.array([0, 1], dtype=np.int32)], bits=[2], against=Table())


def test_progress_counts_predicted_tokens() -> None:
    heard: list[tuple[str, int] | int] = []

    class Listener:
        def begin(self, label: str, total: int, done: int = 0) -> None:
            heard.append((label, total))

        def advance(self, units: int) -> None:
            heard.append(units)

        def say(self, text: str) -> None: ...

    evaluate(Table(), WINDOWS, bits=[2, 3], progress=Listener())
    assert heard == [("measuring", 16), 3, 3, 1, 1, 4, 4]


@pytest.mark.skipif(not (SHARED / "tales7m").is_dir(), reason=f"the reference data is not at {SHARED}")
def test_stories260k_scores_its_own_kind_of_text_as_published() -> None:
    pytest.importorskip("torch", reason="the original runs in torch")
    from lilliput.measure.reference import open_original

    folder = SHARED / "stories260K/hf"
    tokenizer = Tokenizer.open(folder)
    stories = [s for s in read_documents(SHARED / "tinystories/stories_a.jsonl") if len(tokenizer.encode(s)) <= 512]
    found = windows(stories, tokenizer, length=512, limit=4)
    runner = open_original(folder)
    (row,) = evaluate(runner, found, bits=[None])
    # This subset's figure, taken when all 490 gave the published 4.510: benchmarks/reference_perplexity.py
    assert row.perplexity == pytest.approx(4.31257, rel=1e-4)
    streamed = open_original(folder, windows=found[:1])
    for window in found[:1]:
        np.testing.assert_allclose(streamed.logits(window), runner.logits(window), atol=1e-4)
    with pytest.raises(ConfigError, match="original: not one of the windows it was run on"):
        streamed.logits(found[2])
    with pytest.raises(ConfigError, match="original: 4 bits asked of the original"):
        runner.logits(found[0], bits=4)
