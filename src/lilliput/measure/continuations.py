"""Prompts, what a reference model wrote after them, and how well a schedule of widths keeps to that.

Along a given answer a schedule costs about one pass over the text: the prompt at its width, then every stretch of
answer at the width it would have been written at, over one cache. Schedules that come to the same widths along an answer
cost one pass together. Everything found goes into a notebook on disk as it is found, so a killed run goes on.
"""

import fcntl
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lilliput.core.errors import ConfigError
from lilliput.core.progress import Progress, Silent
from lilliput.data.streams import Encoder, windows
from lilliput.engine.engine import Engine
from lilliput.engine.schedules.base import Follower, Schedule, Signals, Steps
from lilliput.engine.schedules.callback import Callback
from lilliput.engine.schedules.fixed import Constant, Static
from lilliput.measure.metrics import F32, F64, Forced, Metric, Original, Written

_BATCH: Final = 8
_KEPT_BYTES: Final = 1 << 30
"""Distributions of the reference model kept in memory; beyond that they are computed again for every schedule."""


@dataclass(frozen=True)
class Case:
    """One prompt with its reference answer: token ids, the answer without an end-of-sequence id."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def forwards(self) -> int:
        """Decode forwards that writing the answer takes; the first token comes of the prompt."""
        return len(self.answer) - 1

    @property
    def key(self) -> str:
        """A name that tells it from other cases."""
        return f"{_digest(self.prompt)}{_digest(self.answer)}"


class Author(Protocol):
    """A model that writes references and says how sure it was: the original, or the widest width."""

    def logits(self, tokens: npt.NDArray[np.int32]) -> F32:
        """(length,) ids to (length, vocab)."""
        ...

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Continue prompts greedily; ids without the end-of-sequence id."""
        ...


class Widest:
    """The artifact itself at its widest width."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def logits(self, tokens: npt.NDArray[np.int32]) -> F32:
        """(length,) ids to (length, vocab)."""
        return self._engine.logits(tokens)

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Continue prompts greedily."""
        bits = self._engine.bits[-1]
        return [made.tokens for made in self._engine.generate_batch(prompts, bits=bits, max_new_tokens=max_new_tokens)]


class Notebook:
    """Facts by key, one JSON line each, on disk as they are noted. A torn last line, of a killed run, is left out."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        """about: what the facts hold for; a file about something else is begun anew. None keeps nothing on disk."""
        self._facts: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError("another run works here", str(path), "Wait for it, or name another file") from None
        self._file.seek(0)
        head, *lines = self._file.read().splitlines(keepends=True) or [b""]
        good = len(head)
        if head != _line({"about": about}):
            good, lines = 0, []
        for line in lines:
            fact = _fact(line)
            if fact is None:
                break
            self._facts[fact["key"]] = fact["value"]
            good += len(line)
        self._file.truncate(good)
        if not good:
            self._file.write(_line({"about": about}))
            self._file.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._facts

    def __getitem__(self, key: str) -> Any:
        return self._facts[key]

    def note(self, key: str, value: Any) -> None:
        """Keep one fact, a JSON value."""
        self._facts[key] = value
        if self._file is not None:
            self._file.write(_line({"key": key, "value": value}))
            self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _fact(line: bytes) -> Any:
    """What one line says, None where it is torn."""
    try:
        fact = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return fact if isinstance(fact, dict) and fact.keys() == {"key", "value"} else None


def cut_prompts(
    documents: Sequence[str], tokenizer: Encoder, *, tokens: int | None = None, limit: int | None = None
) -> list[list[int]]:
    """Return the ids of one prompt a document, its first `tokens`; a single document is cut into as many as it has.

    tokens: None for the whole document. limit: prompts at most, the first ones.
    """
    if len(documents) > 1 or tokens is None:
        return [tokenizer.encode(text)[:tokens] for text in documents[:limit]]
    return [ids.tolist() for ids in windows(documents, tokenizer, length=max(2, tokens), limit=limit)]


def write_answers(
    prompts: Sequence[Sequence[int]],
    author: Author,
    max_new_tokens: int,
    notebook: Notebook,
    progress: Progress | None = None,
) -> list[Case]:
    """Return every prompt with the author's greedy continuation; answers of one token, which no schedule meets, are
    left out. Raises ConfigError where none is left."""
    progress = progress or Silent()
    keys = [f"answer {_digest(prompt)}" for prompt in prompts]
    absent = [i for i, key in enumerate(keys) if key not in notebook]
    progress.begin("writing the reference answers", len(prompts), len(prompts) - len(absent))
    for start in range(0, len(absent), _BATCH):
        batch = absent[start : start + _BATCH]
        for i, made in zip(batch, author.write([prompts[i] for i in batch], max_new_tokens), strict=True):
            notebook.note(keys[i], list(made))
        progress.advance(len(batch))
    cases = [Case(tuple(p), tuple(notebook[key])) for p, key in zip(prompts, keys, strict=True)]
    return usable(cases)


def usable(cases: Sequence[Case]) -> list[Case]:
    """Return the cases with a decode forward. Raises ConfigError where there is none."""
    left = [case for case in cases if case.forwards > 0]
    if not left:
        what = f"none of {len(cases)} answers has two tokens"
        raise ConfigError(what, where="task", fix="Give prompts that the model continues, or longer references")
    return left


def settled(engine: Engine, case: Case, schedule: Schedule) -> Schedule:
    """Return the steps that a schedule comes to along the answer of one case, without those the answer never meets.

    One that decides once is asked along as much of the answer as it looks at. One that may look at every forward comes
    back as it is. Raises what `Engine.follow` raises.
    """
    steps = schedule.steps()
    if steps is None:
        if schedule.looks is None:
            return schedule
        steps = _decided(engine, case, schedule, schedule.looks)
    met = tuple(step for step in steps if step[0] == 0 or step[0] < case.forwards)
    made = Constant(bits=met[0][1]) if len(met) == 1 else Static(at=met, allow_raise=schedule.allow_raise)
    prefill = None if schedule.prefill_bits == made.ladder[0] else schedule.prefill_bits
    return replace(made, prefill=prefill)


def _decided(engine: Engine, case: Case, schedule: Schedule, looks: int) -> Steps:
    follower = Follower(schedule, len(case.prompt), case.forwards + 1)

    def ask(step: int, cur_bits: int, signals: Signals) -> int:
        return follower.next_bits(step, signals)

    def unasked() -> Any:
        raise AssertionError(f"{schedule} looks again after {looks} forwards")

    asking = Callback(function=ask, ladder=schedule.ladder, prefill=schedule.prefill, allow_raise=schedule.allow_raise)
    text = case.prompt + case.answer[: min(looks, case.forwards)]
    widths = list(engine.follow(text, len(case.prompt), asking)[1])
    blind = Signals(unasked, unasked, unasked)
    widths += [follower.next_bits(step, blind) for step in range(len(widths), case.forwards)]
    steps, start = list[tuple[int, int]](), 0
    for bits, run in groupby(widths):
        steps.append((start, bits))
        start += len(list(run))
    return tuple(steps)


@dataclass(frozen=True)
class Scored:
    """A schedule on all cases. scores: (cases,). bits, forwards: (cases,) sums over the decode forwards."""

    schedule: Schedule
    scores: F64
    bits: F64
    forwards: F64

    @property
    def score(self) -> float:
        """The mean over cases."""
        return float(self.scores.mean())

    @property
    def average_bits(self) -> float:
        """Bits of all decode forwards over their number."""
        return float(self.bits.sum() / self.forwards.sum())


class Judge:
    """Scores schedules by one metric on fixed cases, and remembers those whose text says all of them.

    For a metric along given answers, what counts are the steps that an answer meets: schedules which come to the same
    there are scored once.
    """

    def __init__(
        self,
        engine: Engine,
        cases: Sequence[Case],
        metric: Metric,
        author: Author,
        max_new_tokens: int,
        notebook: Notebook | None = None,
        progress: Progress | None = None,
    ) -> None:
        """max_new_tokens: the most that answers may have, for metrics of what a schedule writes."""
        self.engine, self.cases, self.metric = engine, tuple(cases), metric
        self._max_new_tokens = max_new_tokens
        self._author, self._notebook = author, notebook or Notebook(None, {})
        self._progress = progress or Silent()
        self._originals: dict[int, Original] = {}
        rows = sum(len(case.answer) for case in cases)
        self._keeps = 4 * rows * engine.spec.vocab_size <= _KEPT_BYTES

    def score(self, schedule: Schedule) -> Scored:
        """Score one schedule on every case."""
        schedule = schedule.fitted(self.engine.bits)
        forced = isinstance(self.metric, Forced)
        found: dict[int, tuple[float, int, int]] = {}
        absent: list[tuple[int, Schedule, str | None]] = []
        for i, case in enumerate(self.cases):
            one = settled(self.engine, case, schedule) if forced else schedule
            key = None if one.steps() is None else f"{case.key} {one}"
            if key is not None and key in self._notebook:
                found[i] = tuple(self._notebook[key])
            else:
                absent.append((i, one, key))
        if absent:
            self._progress.begin(f"scoring {schedule}", len(self.cases), len(found))
        step = 1 if forced else _BATCH
        for start in range(0, len(absent), step):
            batch = absent[start : start + step]
            values = self._scores(batch[0][1], [i for i, _, _ in batch])
            for (i, _, key), value in zip(batch, values, strict=True):
                found[i] = value
                if key is not None:
                    self._notebook.note(key, list(value))
            self._progress.advance(len(batch))
        told_of = np.array([found[i] for i in range(len(self.cases))], dtype=np.float64)
        return Scored(schedule, told_of[:, 0], told_of[:, 1], told_of[:, 2])

    def original(self, index: int) -> Original:
        """The reference model along the answer of one case."""
        if index not in self._originals:
            case = self.cases[index]
            ids = np.array(case.prompt + case.answer[:-1], dtype=np.int32)
            made = Original.of(self._author.logits(ids)[len(case.prompt) - 1 :])
            if not self._keeps:
                return made
            self._originals[index] = made
        return self._originals[index]

    def _scores(self, schedule: Schedule, batch: Sequence[int]) -> list[tuple[float, int, int]]:
        """Score, sum of bits and number of forwards of each case."""
        cases = [self.cases[i] for i in batch]
        if isinstance(self.metric, Forced):
            told = []
            for i, case in zip(batch, cases, strict=True):
                rows, widths = self.engine.follow(case.prompt + case.answer[:-1], len(case.prompt), schedule)
                value = self.metric.score(rows, self.original(i), case.answer)
                told.append((value, sum(widths), len(widths)))
            return told
        assert isinstance(self.metric, Written)
        prompts = [case.prompt for case in cases]
        made = self.engine.generate_batch(prompts, schedule=schedule, max_new_tokens=self._max_new_tokens)
        return [  # whole answers: one that runs on where the reference ended is as different as it looks
            (self.metric.score(done.tokens, case.answer), sum(done.widths), len(done.widths))
            for done, case in zip(made, cases, strict=True)
        ]


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()[:16]
