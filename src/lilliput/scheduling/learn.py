"""What a chooser is taught: every choice of steps scored on every prompt, and what the beginning of an answer shows.

Source: Chen et al., arXiv 2410.13461, labels of the learned scheduler: the smallest start step whose quality is still
that of the widest run.
Deviation: the losses themselves instead of labels; all rungs are decided together; an answer is as long as its own
branch makes it, so no branch is cut where another ended, and a step it never meets costs what staying does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lilliput.engine.engine import Engine
from lilliput.engine.schedules.base import Signals
from lilliput.engine.schedules.callback import Callback
from lilliput.engine.schedules.features import Features, features_of
from lilliput.engine.schedules.prompted import Prompted
from lilliput.measure.continuations import Case, Judge, Scored
from lilliput.scheduling.job import ScheduleJob
from lilliput.scheduling.search import Choice

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
LEAST = 16
"""Prompts below which nothing is learned."""
PARTS = 3
"""Parts of the horizon between which the classifier chooses."""


@dataclass(frozen=True)
class Table:
    """Every choice on every case. loss, bits: (cases, choices), the latter per decode forward. best: (cases,) scores of
    the widest run."""

    ladder: tuple[int, ...]
    grid: tuple[int, ...]
    choices: tuple[Choice, ...]
    loss: F64
    bits: F64
    best: F64

    @classmethod
    def of(
        cls, judge: Judge, scored: Sequence[Scored], choices: Sequence[Choice], ladder: tuple[int, ...], grid: Choice
    ) -> "Table":
        """scored: of each choice, in order; the last never leaves the first rung."""
        best = scored[-1].scores
        loss = np.stack([judge.metric.loss(one.scores, best) for one in scored], axis=1)
        bits = np.stack([one.bits / one.forwards for one in scored], axis=1)
        return cls(ladder, grid, tuple(choices), loss, bits, best)


@dataclass(frozen=True)
class Beginning:
    """What a schedule sees of one answer. seen: entropy and top-1 of each forward. keys, values: of the prompt."""

    prompt_len: int
    seen: tuple[tuple[float, float], ...]
    keys: F32
    values: F32


def look(engine: Engine, case: Case, job: ScheduleJob, first: int, watch: int) -> Beginning | None:
    """Return the beginning of one answer at width `first`, None where it ends before `watch` forwards are seen."""
    if case.forwards <= watch:
        return None
    seen: list[tuple[float, float]] = []
    caches: list[tuple[F32, F32]] = []

    def note(step: int, cur_bits: int, signals: Signals) -> int:
        if step == 0:
            caches.append((signals.keys(), signals.values()))
        seen.append((signals.entropy(), signals.top1()))
        return cur_bits

    prefill = None if job.prefill == first else job.prefill
    schedule = Callback(function=note, ladder=(first,), prefill=prefill)
    engine.follow(case.prompt + case.answer[: watch + 1], len(case.prompt), schedule)
    return Beginning(len(case.prompt), tuple(seen), *caches[0])


def teach(judge: Judge, table: Table, job: ScheduleJob, order: Sequence[int]) -> Prompted:
    """Return the chooser that `job` asks for. order: of the cases, shuffled."""
    watch = job.watch if job.method == "features" else 0
    looks = [(i, look(judge.engine, judge.cases[i], job, table.ladder[0], watch)) for i in order]
    told = [(i, found) for i, found in looks if found is not None]
    rows, beginnings = [i for i, _ in told], [found for _, found in told]
    allowed = judge.metric.allowance(float(table.best[rows].mean()), job.tolerance)
    if job.method == "features":
        return fit_features(table, rows, beginnings, job, allowed)
    from lilliput.scheduling.train import train

    rotary = judge.engine.spec.rotary
    inv_freq = np.array(() if rotary is None else rotary.inv_freq, dtype=np.float32)
    return train(table, rows, beginnings, inv_freq, job, allowed)


def fit_features(
    table: Table, rows: Sequence[int], beginnings: Sequence[Beginning], job: ScheduleJob, allowed: float
) -> Features:
    """Fit losses by ridge regression, its strength and the price of a bit chosen by leaving one prompt out at a time."""
    x = np.stack([features_of(one.prompt_len, one.seen) for one in beginnings])
    mean, spread = x.mean(0), x.std(0)
    spread[spread < 1e-6] = 1.0
    x, loss, bits = (x - mean) / spread, table.loss[rows], table.bits[rows]
    intercept = loss.mean(0)
    slopes, guesses = _ridge(x, loss)
    price = _price(guesses, loss, bits, allowed)
    weights = {"mean": mean, "spread": spread, "slope": slopes, "intercept": intercept, "bits": bits.mean(0)}
    return Features(
        ladder=table.ladder,
        prefill=None if job.prefill == table.ladder[0] else job.prefill,
        horizon=job.max_new_tokens,
        grid=table.grid,
        watch=job.watch,
        price=price,
        weights={name: array.astype(np.float32) for name, array in weights.items()},
    )


def _ridge(x: F64, y: F64) -> tuple[F64, F64]:
    """Return slopes (outputs, features), and predictions of each row by a fit without it, for the best strength.

    x: standardized (rows, features). The intercept, the mean of y, is not shrunk.
    """
    n = len(x)
    centred = y - y.mean(0)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    found: tuple[float, F64, F64] | None = None
    for strength in np.logspace(-3, 3, 25) * n:
        shrink = s / (s * s + strength)
        hat = np.einsum("ik,k,ik->i", u, shrink * s, u) + 1 / n
        fitted = u @ ((shrink * s)[:, None] * (u.T @ centred))
        left_out = y - (centred - fitted) / (1 - hat)[:, None]
        error = float(((y - left_out) ** 2).mean())
        if found is None or error < found[0]:
            found = error, ((vt.T * shrink) @ (u.T @ centred)).T, left_out
    assert found is not None
    return found[1], found[2]


def _price(guesses: F64, loss: F64, bits: F64, allowed: float) -> float:
    """Return the price at which choosing by the guesses takes the least bits with a mean true loss of at most allowed."""
    mean_bits, rows = bits.mean(0), np.arange(len(loss))
    best = (np.inf, 0.0)
    for price in [0.0, *(np.logspace(-5, 1, 241) * max(float(np.abs(loss).max()), 1e-9))]:
        chosen = (guesses + price * mean_bits).argmin(1)
        if loss[rows, chosen].mean() <= allowed:
            best = min(best, (float(bits[rows, chosen].mean()), float(price)))
    return best[1]
