"""An artifact that answers: logits for measuring, text for people, at any width it stores.

The width is an argument of every call. What a call returns depends on the artifact, its arguments and nothing else:
not on the number of threads, the instruction set, or the other prompts of a batch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.core.spec import ModelSpec
from lilliput.data.tokenizer import Tokenizer
from lilliput.engine.machine import available_bytes, usable_cores
from lilliput.engine.native import F32, KV, Activations, Course, Drafting, Glimpse, IntegerModel, Made, Model
from lilliput.engine.sampling import Sampling
from lilliput.engine.schedules.base import Follower, Schedule, Signals, average_bits
from lilliput.engine.schedules.fixed import Constant
from lilliput.engine.schedules.stored import stored_schedule
from lilliput.engine.streaming import TextStream, stop_strings

GREEDY: Final = Sampling()
Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
OnToken = Callable[[str], bool | None]
OnBatchToken = Callable[[int, str], bool | None]
OnPrefill = Callable[[int, int], bool | None]
OnBits = Callable[[int], None]
OnBatchBits = Callable[[int, int], None]
Schedules = Schedule | Sequence[Schedule] | None
DRAFT_TOKENS: Final = 8
_ROW_COST, _FIXED_COST = 0.2, 0.2
"""One more token in a pass that verifies, and what of a forward does not shrink with its weights, as shares of a forward:
from the speeds of the 1.1B shape in docs/log.md. Constants, since a clock would make a seed's draws differ."""


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    prompt_tokens: a count, BOS included. tokens: the new ids, without the end-of-sequence id; those of a stop string
    are among them, while `text` ends before it. finish_reason: "stop" for an end-of-sequence token or a stop string,
    "length" for max_new_tokens or the end of the context, "cancelled" when on_token or on_prefill returned False.
    prefill_s counts to the end of this prompt; in a batch the prompts are worked off together. decode_s counts from
    the end of the prefill, in a batch of all of them, to the last token. prefill_bits: width that read the prompt.
    widths: of each decode forward, in order; token n + 1 came of forward n, except with draft_bits, where `drafted`
    forwards made drafts, of which `accepted` were kept, and the others read them.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    prefill_s: float
    decode_s: float
    prefill_bits: int
    widths: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0

    @property
    def average_bits(self) -> float | None:
        """Bits of the decode forwards over their number; None where the prompt alone chose the answer."""
        return average_bits(self.widths)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were kept; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


class Engine:
    """A loaded artifact. Weights stay in the page cache; calls from several threads take turns, layer loop by loop.

    spec: what the model is. tokenizer: its own. bits: widths that can be asked for, ascending; empty when nothing is
    quantized. context: tokens of prompt and answer together. threads: that share the work of a call. kv: how keys and
    values are kept while an answer is made. activations: what enters a quantized matrix, "int8" or "float", or
    "integer" where the artifact's integer graph runs; then keys and values are kept as the codes they are, whatever kv.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    bits: tuple[int, ...]
    context: int
    threads: int
    kv: KV
    activations: Activations

    def __init__(
        self,
        artifact: str | Path | Artifact,
        *,
        threads: int | None = None,
        context: int | None = None,
        kv: KV = "float",
        activations: Activations = "int8",
    ) -> None:
        """artifact: a folder, or one that is open already. threads: by default as many cores as we may use.

        context: cuts the model's own; a longer one changes nothing. kv: "float" is exact; "int8" rounds keys and values
        to one byte each, with a scale for each head and token, and needs about a quarter of the memory; "int4" rounds
        groups of 32 tokens, all but the first and the newest, to half a byte each, about a sixth in long contexts.
        activations: "int8" rounds what enters a quantized matrix to eight bits, several times faster; "float" computes
        what the artifact's formula says; "integer" runs the artifact's integer graph (docs/integer.md), which has one
        width and keeps keys and values as codes. It is never chosen by itself, since its logits are other ones.
        Raises what `Artifact.open` and `Tokenizer.open` raise, InputCorrupt when tensors do not fit the spec,
        ConfigError for options that make no sense, Unsupported when the compiled kernels do not load.
        """
        if not isinstance(artifact, Artifact):
            artifact = Artifact.open(artifact)
        spec = artifact.manifest.spec
        if not isinstance(spec, ModelSpec):
            what = f"holds a {spec.family} encoder, which writes no text"
            raise Unsupported(what, where=str(artifact.path), fix="Use lilliput.embedding.Embedder for its vectors")
        self.artifact, self.spec, self.bits = artifact, spec, artifact.bits
        self.context = _context(self.spec, context)
        if threads is not None and threads < 1:
            raise ConfigError(f"{threads} threads cannot work", where="threads", fix="Give 1 or more")
        if kv not in get_args(KV):
            what = f"{kv!r} is no way to keep keys and values"
            raise ConfigError(what, where="kv", fix='Give "float", "int8" or "int4"')
        if activations not in get_args(Activations):
            what = f"activations cannot be {activations!r}"
            raise ConfigError(what, where="activations", fix=f"Give {' or '.join(get_args(Activations))}")
        if activations == "integer" and kv != "float":
            what = f"an integer graph keeps keys and values as codes, not as {kv!r}"
            raise ConfigError(what, where="kv", fix="Leave it out")
        self.kv, self.activations, self._read_ahead_for = kv, activations, set[int]()
        self.tokenizer = Tokenizer.open(artifact.path)
        self._floats = {name: artifact.tensor(name) for name in artifact.manifest.floats}
        self._linears = {name: artifact.linear(name) for name in artifact.quantized}
        cores = threads or usable_cores()
        self._model: Model | IntegerModel
        if activations == "integer":
            integer = artifact.integer()
            if integer is None:
                what, fix = "it has no integer graph", 'Leave activations out, or compress with "mobilequant"'
                raise ConfigError(what, where=str(artifact.path), fix=fix)
            self.context = min(self.context, integer.graph.positions)
            self._model = IntegerModel(integer, threads=cores)
        else:
            self._model = Model(self.spec, self._floats, self._linears, threads=cores, kv=kv, activations=activations)
        self.threads = self._model.threads

    def logits(self, tokens: Tokens, *, bits: int | None = None) -> F32:
        """Return the logits after every token of one fresh sequence, (length, vocab) float32.

        tokens: (length,) ids; BOS is the caller's affair. bits: one of `bits`, None for the widest.
        Raises ConfigError for a width or ids that are not there, OutOfResource beyond the context or the memory.
        """
        width, ids = self._width(bits), self._ids(tokens, "tokens")
        if len(ids) > self.context:
            fix = f"Cut them, or open the artifact with a context up to {self.spec.context}"
            raise OutOfResource(f"{len(ids)} tokens exceed the context of {self.context}", where="tokens", fix=fix)
        self._check_memory([len(ids)], rows=len(ids))
        try:
            return self._model.logits(ids, width)
        except MemoryError as error:
            raise OutOfResource("the memory gave out", where="logits", fix=self._smaller) from error

    @cached_property
    def schedule(self) -> Schedule | None:
        """The schedule the artifact keeps, which answers follow where neither a width nor a schedule is given.

        Raises ConfigError for one that was made for another model or horizon, or by a newer lilliput.
        """
        return stored_schedule(self.artifact)

    def generate(
        self,
        prompt: str | Tokens,
        *,
        max_new_tokens: int = 128,
        bits: int | None = None,
        schedule: Schedule | None = None,
        draft_bits: int | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | str = (),
        on_token: OnToken | None = None,
        on_prefill: OnPrefill | None = None,
        on_bits: OnBits | None = None,
    ) -> Generation:
        """Continue one prompt: text, which gets its BOS here, or ids, which are taken as they are.

        The answer ends at the end of the context if max_new_tokens would go beyond it. stop: texts to end before.
        bits: one width for all of it. schedule: a width for each step. Without either the artifact's own schedule is
        followed, and without that the widest width.
        draft_bits: a narrower width drafts up to draft_tokens tokens, which the width of the answer then reads in one
        pass. With temperature 0 not a token changes; else tokens are distributed as without, though the draws differ.
        on_token: called for every token with the text it completes, often "", and once more at the end if text is
        left; what it is given, joined, is the result's text. It returns False to end the answer.
        on_bits: called before each on_token of a token with the width that chose it; draft_bits where that width
        drafted it and the verifying one agreed.
        on_prefill: called as the prompt is read, a few hundred tokens at a time, with how many tokens are done and how
        many there are; it returns False to give up, which leaves an empty answer.
        Raises ConfigError for a width, a schedule, ids or options that make no sense; OutOfResource when the prompt does
        not fit the context or the memory does not do; whatever on_token raises; KeyboardInterrupt.
        """
        tell: OnBatchToken | None = None if on_token is None else (lambda _, piece: on_token(piece))
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            bits=bits,
            schedule=schedule,
            draft_bits=draft_bits,
            draft_tokens=draft_tokens,
            sampling=sampling,
            stop=stop,
            on_token=tell,
            on_prefill=on_prefill,
            on_bits=None if on_bits is None else (lambda _, width: on_bits(width)),
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Tokens],
        *,
        max_new_tokens: int = 128,
        bits: int | None = None,
        schedule: Schedules = None,
        draft_bits: int | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | str = (),
        on_token: OnBatchToken | None = None,
        on_prefill: OnPrefill | None = None,
        on_bits: OnBatchBits | None = None,
    ) -> list[Generation]:
        """Continue several prompts together; each result equals that of the prompt alone, timings aside.

        schedule: one for all, each sequence following it by itself, or one a prompt. on_token, on_bits: called with the
        prompt's index and its piece of text or width. on_prefill: called for all prompts together; False gives all of
        them up. The rest is as in `generate`.
        """
        stops = stop_strings(stop)
        if max_new_tokens < 1:
            raise ConfigError(f"{max_new_tokens} is no answer", where="max_new_tokens", fix="Give 1 or more")
        if schedule is not None or draft_bits is not None or on_bits is not None:
            self._of_widths()
        followed = self._schedules(bits, schedule, draft_bits, len(prompts))
        asked = [self._prompt(prompt) for prompt in prompts]
        drafting = self._drafting(draft_bits, draft_tokens, followed)
        rows = len(asked) * (1 if drafting is None else 2 + 2 * drafting.most)  # of drafts, of a pass, probabilities
        self._check_memory([min(self.context, len(ids) + max_new_tokens) for ids in asked], rows=rows)
        streams = [
            TextStream(self.tokenizer, ids, stops, None if on_token is None else _bound(on_token, index))
            for index, ids in enumerate(asked)
        ]
        most = min(max_new_tokens, self.context)
        runs = _Runs(followed, [len(ids) for ids in asked], most)
        plain: dict[str, Any] = {
            "max_new_tokens": most,
            "context": self.context,
            "eos": self.tokenizer.eos_ids,
            "sampling": sampling,
            "on_token": lambda index, token: streams[index].put(token),
            "on_prefill": runs.prefilled(on_prefill),
        }
        try:
            if isinstance(self._model, IntegerModel):
                made = self._model.generate(asked, bits=self._width(bits), **plain)
            else:
                made = self._model.generate(
                    asked,
                    courses=runs.courses,
                    drafting=drafting,
                    on_bits=on_bits,
                    next_bits=runs.next_bits if runs.asking else None,
                    **plain,
                )
        except MemoryError as error:
            raise OutOfResource("the memory gave out", where="generate", fix=self._smaller) from error
        return [
            _generation(ids, stream, course[0], result)
            for ids, stream, course, result in zip(asked, streams, runs.courses, made, strict=True)
        ]

    def follow(self, tokens: Tokens, prompt_tokens: int, schedule: Schedule) -> tuple[F32, tuple[int, ...]]:
        """Return the logits along a given text as `schedule` would have computed them, and the width of each forward.

        tokens: (length,) ids, of which the first `prompt_tokens` are read as the prompt and each other one as if it had
        been chosen. Logits: (length - prompt_tokens + 1, vocab), the first row after the prompt; widths: one for every
        row but the first, those `generate` would note in `Generation.widths`.
        Raises as `logits` and `generate` do.
        """
        ids = self._ids(tokens, "tokens")
        if not 1 <= prompt_tokens <= len(ids):
            what = f"a prompt of {prompt_tokens} tokens is no beginning of {len(ids)}"
            raise ConfigError(what, where="prompt_tokens", fix="Give 1 or more, at most all")
        if len(ids) > self.context:
            fix = f"Cut them, or open the artifact with a context up to {self.spec.context}"
            raise OutOfResource(f"{len(ids)} tokens exceed the context of {self.context}", where="tokens", fix=fix)
        self._check_memory([len(ids)], rows=len(ids))
        model = self._of_widths()
        runs = _Runs(self._schedules(None, schedule, None, 1), [prompt_tokens], len(ids) - prompt_tokens + 1)
        runs.start = time.perf_counter()
        try:
            rows, widths = model.follow(ids, prompt_tokens, runs.courses[0], runs.next_bits if runs.asking else None)
        except MemoryError as error:
            raise OutOfResource("the memory gave out", where="follow", fix=self._smaller) from error
        return rows, tuple(widths)

    def weight_bytes(self, bits: int | None = None) -> int:
        """Bytes of weights read for one decoded token at `bits`: fields, scales, zeros, ratios and levels of that width,
        outliers as they are in memory, and every float tensor. Tables of which a token reads one row do not count, the embedding only where it is no head.
        """
        width = self._width(bits)
        skipped = {"embed_positions"} | (set() if self.spec.tied_head else {"embed_tokens"})
        total = sum(t.data.nbytes for name, t in self._floats.items() if name.rsplit(".", 1)[0] not in skipped)
        for name, linear in self._linears.items():
            if name in skipped:
                continue
            own, have = linear.width_at(width), 0
            for plane, field in zip(linear.planes, linear.fields, strict=True):
                if have < own:
                    total, have = total + plane.nbytes, have + field
            total += sum(grid.nbytes for grid in linear.grids(own))
            if linear.outliers is not None:  # a byte for the row, two for the column, a float32; where a tile begins
                total += 7 * len(linear.outliers.values) + 4 * -(-linear.out // 16)
        return total

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of one sequence of `tokens` tokens, as `kv` keeps them, in whole pages of 64 tokens.

        An int4 cache has a page of float32 for the first 32 tokens and the newest, and pages for the groups between.
        """
        return self._model.cache_bytes(tokens)

    def _schedules(self, bits: int | None, schedule: Schedules, draft_bits: int | None, count: int) -> list[Schedule]:
        """One schedule a prompt, fitted to the artifact. The widths of all of them are read ahead."""
        if bits is not None and schedule is not None:
            raise ConfigError("a width and a schedule were given", where="bits", fix="Give one of them")
        if schedule is None and bits is None and draft_bits is None:
            schedule = self.schedule
        if schedule is None:
            width = self._width(bits)
            return [Constant(bits=width)] * count
        asked = [schedule] * count if isinstance(schedule, Schedule) else list(schedule)
        if len(asked) != count:
            what = f"{len(asked)} schedules for {count} prompts"
            raise ConfigError(what, where="schedule", fix="Give one for all, or one a prompt")
        fitted: dict[int, Schedule] = {}
        for one in asked:
            if id(one) not in fitted:
                fitted[id(one)] = one.fitted(self.bits)
                for width in fitted[id(one)].widths:
                    self._width(width)
        return [fitted[id(one)] for one in asked]

    def _drafting(self, draft_bits: int | None, draft_tokens: int, schedules: Sequence[Schedule]) -> Drafting | None:
        if draft_bits is None:
            return None
        if draft_tokens < 1 or draft_tokens > 64:
            what = f"{draft_tokens} tokens cannot be drafted at a time"
            raise ConfigError(what, where="draft_tokens", fix="Give 1 to 64")
        width = self._width(draft_bits)
        for schedule in schedules:
            if len(schedule.steps() or ()) != 1:
                what = f"the schedule {schedule} changes the width, and drafts are read at one"
                raise ConfigError(what, where="draft_bits", fix="Give a width with bits, or leave one of the two out")
            if width >= schedule.ladder[0]:
                what = f"drafts at {width} bits are no cheaper than the answer at {schedule.ladder[0]}"
                raise ConfigError(what, where="draft_bits", fix="Give a narrower width than the answer's")
        wide = max((schedule.ladder[0] for schedule in schedules), default=width)
        read = self.weight_bytes(width) / self.weight_bytes(wide)
        return Drafting(width, draft_tokens, _FIXED_COST + (1 - _FIXED_COST) * read, _ROW_COST)

    def _of_widths(self) -> Model:
        if isinstance(self._model, IntegerModel):
            fix = 'Leave schedules, drafts and on_bits out, or open the artifact with activations="int8"'
            raise ConfigError("an integer graph has one width", where="activations", fix=fix)
        return self._model

    def _width(self, bits: int | None) -> int:
        if bits is None:
            bits = self.bits[-1] if self.bits else 0
        if bits in self.bits or not (bits or self.bits):
            if bits not in self._read_ahead_for:  # once: what is read often stays in the page cache by itself
                self._read_ahead_for.add(bits)
                self.artifact.read_ahead(bits or None)
            return bits
        have = f"{', '.join(map(str, self.bits))}" if self.bits else "no quantized weights"
        what = f"{bits} bits are not in this artifact, which has {have}"
        fix = f"Ask for {' or '.join(map(str, self.bits))}" if self.bits else "Leave the width out"
        raise ConfigError(what, where="bits", fix=fix)

    def _ids(self, tokens: Tokens, where: str) -> list[int]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            what = f"{ids.shape} of {ids.dtype} is not a list of one or more token ids"
            raise ConfigError(what, where=where, fix="Give whole numbers, or text to generate from")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            what = f"token {low if low < 0 else high} is outside the vocabulary of {self.spec.vocab_size}"
            raise ConfigError(what, where=where, fix="Encode the text with this model's own tokenizer")
        return cast(list[int], ids.tolist())

    def _prompt(self, prompt: str | Tokens) -> list[int]:
        ids = self._ids(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, "prompt")
        if len(ids) >= self.context:
            longest = "Shorten it" if self.context == self.spec.context else "Shorten it or open with a longer context"
            what = f"{len(ids)} tokens do not fit the context of {self.context} with room for an answer"
            raise OutOfResource(what, where="prompt", fix=longest)
        return ids

    def _check_memory(self, lengths: Sequence[int], rows: int) -> None:
        """Refuse before the work begins what the memory cannot hold: caches of `lengths`, `rows` of logits."""
        need = sum(map(self.kv_bytes, lengths)) + 4 * rows * self.spec.vocab_size
        free = available_bytes()
        if free is not None and need > free:
            what = f"{need / 1e9:.2f} GB of keys, values and logits are needed and {free / 1e9:.2f} GB are free"
            raise OutOfResource(what, where=f"{max(lengths)} tokens of context", fix=self._smaller)

    @property
    def _smaller(self) -> str:
        smaller = {"float": ' with kv="int8" or "int4"', "int8": ' with kv="int4"'}.get(self.kv)
        less = f", open the artifact{smaller}" if smaller else ""
        return f"Ask for fewer tokens or prompts at a time{less}, or free some memory"


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv: KV = "float",
    activations: Activations = "int8",
) -> Engine:
    """Open the artifact at `path` for running; see `Engine`."""
    return Engine(path, threads=threads, context=context, kv=kv, activations=activations)


def _context(spec: ModelSpec, context: int | None) -> int:
    if context is None:
        return spec.context
    if context < 1:
        raise ConfigError(f"{context} tokens hold nothing", where="context", fix="Give 2 or more")
    return min(spec.context, context)


def _bound(on_token: OnBatchToken, index: int) -> OnToken:
    return lambda piece: on_token(index, piece)


class _Runs:
    """The courses of a batch, and whoever is asked for the widths that are not known beforehand."""

    def __init__(self, schedules: Sequence[Schedule], prompts: Sequence[int], max_new_tokens: int) -> None:
        self.courses: list[Course] = []
        self.asking: dict[int, Follower] = {}
        self.start = 0.0
        for index, schedule in enumerate(schedules):
            steps = schedule.steps()
            self.courses.append((schedule.prefill_bits, list(steps or ())))
            if steps is None:
                self.asking[index] = Follower(schedule, prompts[index], max_new_tokens)

    def prefilled(self, on_prefill: OnPrefill | None) -> OnPrefill | None:
        """A listener that starts the clock of the decode."""
        if not self.asking:
            return on_prefill

        def told(done: int, total: int) -> bool | None:
            self.start = time.perf_counter()
            return None if on_prefill is None else on_prefill(done, total)

        return told

    def next_bits(self, index: int, step: int, glimpse: Glimpse) -> int:
        """Width of one decode forward of one sequence."""
        signals = Signals(glimpse.logits, lambda: glimpse.keys_values(-1), lambda: time.perf_counter() - self.start)
        return self.asking[index].next_bits(step, signals)


def _generation(ids: list[int], stream: TextStream, prefill_bits: int, made: Made) -> Generation:
    stream.finish()
    reason = "stop" if stream.stopped else "cancelled" if stream.cancelled else made.finish
    return Generation(
        prompt_tokens=len(ids),
        tokens=tuple(made.tokens),
        text=stream.text,
        finish_reason=cast(Literal["stop", "length", "cancelled"], reason),
        prefill_s=made.prefill_s,
        decode_s=made.decode_s,
        prefill_bits=prefill_bits,
        widths=tuple(made.widths),
        drafted=made.drafted,
        accepted=made.accepted,
    )
