"""An artifact that answers: logits for measuring, text for people, at any width it stores.

The width is an argument of every call. What a call returns depends on the artifact, its arguments and nothing else:
not on the number of threads, the instruction set, or the other prompts of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.core.spec import ModelSpec
from lilliput.data.tokenizer import Tokenizer
from lilliput.engine.machine import available_bytes, usable_cores
from lilliput.engine.native import F32, KV, Activations, IntegerModel, Model
from lilliput.engine.sampling import Sampling
from lilliput.engine.streaming import TextStream, stop_strings

GREEDY: Final = Sampling()
Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
OnToken = Callable[[str], bool | None]
OnBatchToken = Callable[[int, str], bool | None]
OnPrefill = Callable[[int, int], bool | None]


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    prompt_tokens: a count, BOS included. tokens: the new ids, without the end-of-sequence id; those of a stop string
    are among them, while `text` ends before it. finish_reason: "stop" for an end-of-sequence token or a stop string,
    "length" for max_new_tokens or the end of the context, "cancelled" when on_token or on_prefill returned False.
    prefill_s counts to the end of this prompt; in a batch the prompts are worked off together. decode_s counts from
    the end of the prefill, in a batch of all of them, to the last token.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    prefill_s: float
    decode_s: float


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

    def last_logits(self, tokens: Tokens, *, bits: int | None = None) -> F32:
        """Return `logits(tokens)[-1]`, (vocab,)."""
        last: F32 = self.logits(tokens, bits=bits)[-1]
        return last

    def generate(
        self,
        prompt: str | Tokens,
        *,
        max_new_tokens: int = 128,
        bits: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | str = (),
        on_token: OnToken | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generation:
        """Continue one prompt: text, which gets its BOS here, or ids, which are taken as they are.

        The answer ends at the end of the context if max_new_tokens would go beyond it. stop: texts to end before.
        on_token: called for every token with the text it completes, often "", and once more at the end if text is
        left; what it is given, joined, is the result's text. It returns False to end the answer.
        on_prefill: called as the prompt is read, a few hundred tokens at a time, with how many tokens are done and how
        many there are; it returns False to give up, which leaves an empty answer.
        Raises ConfigError for a width, ids or options that make no sense; OutOfResource when the prompt does not fit
        the context or the memory does not do; whatever on_token raises; KeyboardInterrupt.
        """
        tell: OnBatchToken | None = None if on_token is None else (lambda _, piece: on_token(piece))
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            bits=bits,
            sampling=sampling,
            stop=stop,
            on_token=tell,
            on_prefill=on_prefill,
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Tokens],
        *,
        max_new_tokens: int = 128,
        bits: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | str = (),
        on_token: OnBatchToken | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> list[Generation]:
        """Continue several prompts together; each result equals that of the prompt alone, timings aside.

        on_token: called with the prompt's index and its piece of text. on_prefill: called for all prompts together;
        False gives all of them up. The rest is as in `generate`.
        """
        width, stops = self._width(bits), stop_strings(stop)
        if max_new_tokens < 1:
            raise ConfigError(f"{max_new_tokens} is no answer", where="max_new_tokens", fix="Give 1 or more")
        asked = [self._prompt(prompt) for prompt in prompts]
        self._check_memory([min(self.context, len(ids) + max_new_tokens) for ids in asked], rows=len(asked))
        streams = [
            TextStream(self.tokenizer, ids, stops, None if on_token is None else _bound(on_token, index))
            for index, ids in enumerate(asked)
        ]
        try:
            made = self._model.generate(
                asked,
                bits=width,
                max_new_tokens=min(max_new_tokens, self.context),
                context=self.context,
                eos=self.tokenizer.eos_ids,
                sampling=sampling,
                on_token=lambda index, token: streams[index].put(token),
                on_prefill=on_prefill,
            )
        except MemoryError as error:
            raise OutOfResource("the memory gave out", where="generate", fix=self._smaller) from error
        return [_generation(ids, stream, *result) for ids, stream, result in zip(asked, streams, made, strict=True)]

    def weight_bytes(self, bits: int | None = None) -> int:
        """Bytes of weights read for one decoded token at `bits`: fields, scales, zeros and levels of that width, and
        every float tensor. Tables of which a token reads one row do not count, the embedding only where it is no head.
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
            total += sum(grid[own].nbytes for grid in (linear.scale, linear.zero, linear.table) if own in grid)
        return total

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of one sequence of `tokens` tokens, as `kv` keeps them, in whole pages of 64 tokens.

        An int4 cache has a page of float32 for the first 32 tokens and the newest, and pages for the groups between.
        """
        return self._model.cache_bytes(tokens)

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


def _generation(
    ids: list[int], stream: TextStream, tokens: list[int], finish: str, prefill_s: float, decode_s: float
) -> Generation:
    stream.finish()
    reason = "stop" if stream.stopped else "cancelled" if stream.cancelled else finish
    return Generation(
        prompt_tokens=len(ids),
        tokens=tuple(tokens),
        text=stream.text,
        finish_reason=cast(Literal["stop", "length", "cancelled"], reason),
        prefill_s=prefill_s,
        decode_s=decode_s,
    )
