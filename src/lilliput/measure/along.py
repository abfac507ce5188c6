"""Schedules along the same reference answers, token by token, each as it would have written them.

The reference model meets every answer once, whatever the number of schedules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from lilliput.core.progress import Progress, Silent
from lilliput.data.documents import read_documents
from lilliput.engine.engine import Engine
from lilliput.engine.schedules.base import Schedule
from lilliput.measure.continuations import Author, Case, Notebook, Widest, cut_prompts, settled, write_answers
from lilliput.measure.metrics import F64, Original, divergences, surprises
from lilliput.measure.reference import open_writer


@dataclass(frozen=True)
class Along:
    """One schedule along one answer of n tokens.

    kl: (n,) nats, KL(reference || schedule). surprise: (n,) nats, of the answer's own tokens. same: (n,) bool, whether
    both put the same token first. widths: of the n - 1 decode forwards.
    """

    kl: F64
    surprise: F64
    same: npt.NDArray[np.bool_]
    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AlongJob:
    """What schedules are followed along.

    text: file of prompts, one a document, None for those shipped here; a single document is cut into several. field: of
    its rows that holds the prompt. prompt_tokens: of a prompt at most, its first ones; limit: prompts at most.
    new_tokens: of an answer at most. against: the original, whose answers count, None for the artifact's widest width.
    """

    text: str | None = None
    field: str | None = None
    prompt_tokens: int = 128
    limit: int | None = 8
    new_tokens: int = 128
    against: str | None = None


class AlongRow(BaseModel):
    """One schedule along all answers.

    kl: nats a token, KL(reference || schedule), the mean over answers of each one's mean; kl_ci95: its 95 % interval,
    normal, answers taken as the independent draws, None below 2. top1_agreement: share of tokens where both put the
    same one first, a mean over answers too. average_bits: of all decode forwards. answers, tokens: how many there were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float
    kl_ci95: tuple[float, float] | None
    top1_agreement: float
    average_bits: float
    answers: int
    tokens: int


def along(engine: Engine, author: Author, case: Case, schedules: Sequence[Schedule]) -> list[Along]:
    """Follow every schedule along the answer of one case; those that come to the same widths there share a pass.

    Raises what `Engine.follow` raises.
    """
    ids, start = case.prompt + case.answer[:-1], len(case.prompt)
    original = Original.of(author.logits(np.array(ids, dtype=np.int32))[start - 1 :])
    found: dict[str | int, Along] = {}
    keys: list[str | int] = []
    for index, schedule in enumerate(schedules):
        one = settled(engine, case, schedule.fitted(engine.bits))
        keys.append(index if one.steps() is None else str(one))
        if keys[-1] not in found:
            rows, widths = engine.follow(ids, start, one)
            same = rows.argmax(-1) == original.top
            found[keys[-1]] = Along(divergences(rows, original), surprises(rows, case.answer), same, widths)
    return [found[key] for key in keys]


def measure_along(
    artifact: str | Path,
    job: AlongJob,
    schedules: Sequence[Schedule],
    *,
    threads: int | None = None,
    activations: Literal["int8", "float", "integer"] = "int8",
    kv: Literal["float", "int8", "int4"] = "float",
    progress: Progress | None = None,
) -> list[AlongRow]:
    """Write the reference answers and follow every schedule along them; one row a schedule, in their order.

    Raises ConfigError where no answer has two tokens or the original is another kind of model, what reading the text and
    opening the two models raises.
    """
    progress = progress or Silent()
    engine = Engine(artifact, threads=threads, activations=activations, kv=kv)
    documents = shipped_prompts() if job.text is None else read_documents(job.text, field=job.field)
    prompts = cut_prompts(documents, engine.tokenizer, tokens=job.prompt_tokens, limit=job.limit)
    author: Author = Widest(engine) if job.against is None else open_writer(job.against, engine)
    cases = write_answers(prompts, author, job.new_tokens, Notebook(None, {}), progress)
    progress.begin("measuring along the answers", len(cases))
    found: list[list[Along]] = [[] for _ in schedules]
    for case in cases:
        for kept, one in zip(found, along(engine, author, case, schedules), strict=True):
            kept.append(one)
        progress.advance(1)
    return [_row(told) for told in found]


def shipped_prompts() -> list[str]:
    """Beginnings of a few kinds of text, for whoever has no task of their own."""
    return files("lilliput.measure").joinpath("prompts.txt").read_text("utf-8").splitlines()


def _row(told: Sequence[Along]) -> AlongRow:
    kl = np.array([one.kl.mean() for one in told])
    half = 1.96 * float(kl.std(ddof=1)) / math.sqrt(len(kl)) if len(kl) > 1 else None
    mean = float(kl.mean())
    return AlongRow(
        kl=mean,
        kl_ci95=None if half is None else (mean - half, mean + half),
        top1_agreement=float(np.mean([one.same.mean() for one in told])),
        average_bits=sum(sum(one.widths) for one in told) / sum(len(one.widths) for one in told),
        answers=len(told),
        tokens=sum(len(one.kl) for one in told),
    )
