"""From an artifact and a task to the schedule it should follow, with what every candidate does."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from lilliput.artifact.entries import ScheduleEntry
from lilliput.artifact.schema import fingerprint
from lilliput.core.errors import ConfigError, Interrupted
from lilliput.core.progress import Progress, Silent
from lilliput.engine.engine import Engine
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.fixed import Constant
from lilliput.measure import METRICS
from lilliput.measure.continuations import Author, Case, Judge, Notebook, Scored, Widest, usable, write_answers
from lilliput.measure.metrics import Metric
from lilliput.scheduling.search import Choice, bits_of, choices_of, grid_of, smallest, static

Method = Literal["search", "learned", "features"]


@dataclass(frozen=True, kw_only=True)
class ScheduleJob:
    """What is looked for.

    method: "search" for steps that are the same for all prompts, "learned" and "features" for steps by prompt. ladder:
    widths to decode at, falling; empty for those of at most 4 bits, or for all where fewer than two are. prefill: width
    that reads the prompt, None for the ladder's first. tolerance: share by which the metric may be worse than at the
    ladder's first width throughout. max_new_tokens: of the answers, the horizon. grid: parts the horizon is cut into.
    exhaustive: score every candidate. watch: forwards that "features" sees before it decides. seed: of what is random.
    """

    method: Method = "search"
    metric: str = "kl"
    tolerance: float = 0.01
    max_new_tokens: int = 256
    ladder: tuple[int, ...] = ()
    prefill: int | None = None
    grid: int = 6
    exhaustive: bool = False
    watch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"{self.method!r} is no method", "method", f"Give {', '.join(get_args(Method))}")
        if not 0 <= self.tolerance < 1:
            what = f"a tolerance of {self.tolerance} is outside [0, 1)"
            raise ConfigError(what, where="tolerance", fix="Give a share such as 1% or 0.01")
        if self.max_new_tokens < 4 or not 1 <= self.grid <= 64:
            what = f"{self.max_new_tokens} tokens in {self.grid} parts leave no choice"
            raise ConfigError(what, where="max_new_tokens", fix="Give 4 tokens or more, and 1 to 64 parts")
        if self.method == "features" and not 0 <= self.watch < self.max_new_tokens - 1:
            what = f"{self.watch} forwards watched leave nothing of {self.max_new_tokens} tokens"
            raise ConfigError(what, where="watch", fix="Give fewer, such as a quarter of the answer")

    def rungs(self, bits: Sequence[int]) -> tuple[int, ...]:
        """Return the ladder for an artifact of widths `bits`. Raises ConfigError for one it cannot have."""
        low = tuple(sorted((b for b in bits if b <= 4), reverse=True))
        ladder = self.ladder or (low if len(low) > 1 else tuple(sorted(bits, reverse=True)))
        if len(ladder) < 2:
            what = f"a ladder of {'/'.join(map(str, ladder)) or 'no widths'} leaves nothing to choose"
            raise ConfigError(what, where="ladder", fix="Use an artifact of two widths or more, and name two, as 4/2")
        Constant(bits=ladder[0], prefill=self.prefill).fitted(bits)
        for width in ladder:
            Constant(bits=width).fitted(bits)
        if any(a <= b for a, b in pairwise(ladder)):
            what = f"the ladder {'/'.join(map(str, ladder))} does not fall"
            raise ConfigError(what, where="ladder", fix="Write the widest first, such as 4/3/2")
        return ladder


class Frontier(BaseModel):
    """One schedule that was scored: its mean over the task's answers, and whether it is within the tolerance.

    best: no other has both fewer bits and a better score. chosen: it is the result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedule: str
    average_bits: float
    score: float
    within: bool
    best: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Found:
    """schedule: fitted to the artifact. frontier: all that was scored, widest first. note: on what it was made."""

    schedule: Schedule
    frontier: tuple[Frontier, ...]
    note: str
    horizon: int

    def entry(self) -> ScheduleEntry:
        """What goes into the artifact's manifest; `schedule.tensors()` go beside it."""
        return self.schedule.entry().model_copy(update={"horizon": self.horizon, "note": self.note[:1000]})


def find_schedule(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    job: ScheduleJob,
    *,
    author: Author | None = None,
    author_name: str = "the widest width",
    references: Sequence[Sequence[int]] | None = None,
    notebook: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find the schedule of least bits that keeps within the tolerance on a task.

    prompts: token ids. author: writes the reference answers and is what KL compares with; None for the artifact's widest
    width. references: answers to use in place of those the author would write. notebook: a file of everything scored so
    far, for a killed run to go on.
    Raises ConfigError where the job does not fit the artifact or the task, what the engine raises; Interrupted for
    Ctrl-C, where there is a notebook to go on from.
    """
    progress = progress or Silent()
    ladder = job.rungs(engine.bits)
    prompts, references = _fitting(prompts, references, engine.context - job.max_new_tokens)
    _enough(len(prompts), job)
    about = {
        "model": fingerprint(engine.artifact.manifest),
        "metric": job.metric,
        "author": author_name,
        "max_new_tokens": job.max_new_tokens,
        "engine": [engine.kv, engine.activations],
        "references": references is not None,
    }
    metric: Metric = METRICS.load(job.metric)()
    notes = Notebook(notebook, about)
    try:
        author = author or Widest(engine)
        if references is None:
            cases = write_answers(prompts, author, job.max_new_tokens, notes, progress)
        else:
            pairs = zip(prompts, references, strict=True)
            cases = usable([Case(tuple(p), tuple(r[: job.max_new_tokens])) for p, r in pairs])
        judge = Judge(engine, cases, metric, author, job.max_new_tokens, notes, progress)
        found = _search(judge, job, ladder) if job.method == "search" else _learn(judge, job, ladder)
    except KeyboardInterrupt:
        if notebook is None:
            raise
        what = f"stopped; what was scored is kept in {notebook}"
        raise Interrupted(what, "schedule", "Repeat the same command to go on from there") from None
    finally:
        notes.close()
    note = f"{job.method}: {job.metric} within {job.tolerance:.3g} over {len(cases)} answers of {author_name}"
    return Found(found[0].fitted(engine.bits), found[1], note, job.max_new_tokens)


def _fitting(
    prompts: Sequence[Sequence[int]], references: Sequence[Sequence[int]] | None, room: int
) -> tuple[list[Sequence[int]], list[Sequence[int]] | None]:
    """Leave out prompts without room for an answer. Raises ConfigError where none is left."""
    kept = [i for i, prompt in enumerate(prompts) if 1 <= len(prompt) <= room]
    if not kept:
        what = f"none of {len(prompts)} prompts leaves room for the answer in the context"
        raise ConfigError(what, where="task", fix="Cut them with --prompt-tokens, or ask for fewer new tokens")
    return [prompts[i] for i in kept], None if references is None else [references[i] for i in kept]


def _enough(prompts: int, job: ScheduleJob) -> None:
    """Raise ConfigError where so few prompts teach nothing."""
    from lilliput.scheduling import learn

    if job.method != "search" and prompts < learn.LEAST:
        fix = f"Give {learn.LEAST} or more, or use --method search"
        raise ConfigError(f"{prompts} prompts teach no chooser", where="task", fix=fix)


def _search(judge: Judge, job: ScheduleJob, ladder: tuple[int, ...]) -> tuple[Schedule, tuple[Frontier, ...]]:
    """One choice of steps for all prompts."""
    grid, forwards = grid_of(job.max_new_tokens, job.grid), [case.forwards for case in judge.cases]
    scored: dict[Choice, Scored] = {}

    def score(choice: Choice) -> Scored:
        if choice not in scored:
            scored[choice] = judge.score(static(ladder, choice, job.max_new_tokens, job.prefill))
        return scored[choice]

    never = (job.max_new_tokens,) * (len(ladder) - 1)
    best = score(never).score
    allowed = judge.metric.allowance(best, job.tolerance)

    def holds(choice: Choice) -> bool:
        return float(judge.metric.loss(score(choice).scores, scored[never].scores).mean()) <= allowed

    choices = choices_of(grid, len(ladder) - 1)
    found = smallest(choices, lambda c: bits_of(ladder, c, forwards), holds, exhaustive=job.exhaustive)
    assert found is not None, "never lowering is always within"
    told = [(one, holds(choice), choice == found) for choice, one in scored.items()]
    return scored[found].schedule, _frontier(told, judge.metric)


def _frontier(told: Sequence[tuple[Scored, bool, bool]], metric: Metric) -> tuple[Frontier, ...]:
    """Order what was scored from many bits to few. A rung no answer reaches leaves the same schedule twice: one stays."""
    rows: dict[str, Frontier] = {}
    for one, within, chosen in told:
        text = str(one.schedule)
        chosen = chosen or (text in rows and rows[text].chosen)
        rows[text] = Frontier(
            schedule=text, average_bits=one.average_bits, score=one.score, within=within, chosen=chosen
        )
    sign = -1 if metric.rising else 1
    best = {
        text
        for text, row in rows.items()
        if not any(
            (o.average_bits, sign * o.score) != (row.average_bits, sign * row.score)
            and o.average_bits <= row.average_bits
            and sign * o.score <= sign * row.score
            for o in rows.values()
        )
    }
    ordered = sorted(rows.values(), key=lambda row: (-row.average_bits, sign * row.score))
    return tuple(row.model_copy(update={"best": row.schedule in best}) for row in ordered)


def _learn(judge: Judge, job: ScheduleJob, ladder: tuple[int, ...]) -> tuple[Schedule, tuple[Frontier, ...]]:
    """Steps by prompt: score every choice on every prompt, teach a chooser, and check it on prompts it did not see."""
    from lilliput.scheduling import learn

    _enough(len(judge.cases), job)
    order = list(range(len(judge.cases)))
    random.Random(job.seed).shuffle(order)
    parts = learn.PARTS if job.method == "learned" else job.grid
    grid = grid_of(job.max_new_tokens, parts)
    choices = choices_of(grid, len(ladder) - 1)
    scored = [judge.score(static(ladder, choice, job.max_new_tokens, job.prefill)) for choice in choices]
    table = learn.Table.of(judge, scored, choices, ladder, grid)
    made = learn.teach(judge, table, job, order)
    held = judge.score(made)
    allowed = judge.metric.allowance(float(table.best.mean()), job.tolerance)
    told = [(one, bool(judge.metric.loss(one.scores, table.best).mean() <= allowed), False) for one in scored]
    told.append((held, bool(judge.metric.loss(held.scores, table.best).mean() <= allowed), True))
    return made, _frontier(told, judge.metric)
