"""The decoder over an artifact's matrices, and what its callers say and get."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.core.errors import InputCorrupt
from lilliput.core.spec import ModelSpec
from lilliput.engine.native.arrays import F32, as_bytes, as_f32, as_floats, group_of, kernels, stored
from lilliput.engine.native.ops import KV
from lilliput.engine.sampling import Sampling

PAGE: Final = 64
"""Positions in a page of the cache; a sequence takes whole pages."""
GROUP: Final = 32
"""Positions, and channels of values, that an int4 cache rounds together."""
Activations = Literal["int8", "float", "integer"]
Course = tuple[int, Sequence[tuple[int, int]]]
"""Width of the prompt, and (from decode forward, width) ascending from 0; no steps where `next_bits` is asked."""


class Glimpse(Protocol):
    """What a schedule may look at while `next_bits` runs; copies. Raises ValueError afterwards."""

    def logits(self) -> F32: ...
    def keys_values(self, layer: int) -> tuple[F32, F32]: ...


NextBits = Callable[[int, int, Glimpse], int]


@dataclass(frozen=True)
class Drafting:
    """Self-speculation: up to `most` tokens are drafted at `bits` and read in one pass of the answer's width.

    cost: of a forward at `bits`; row_cost: of one more row of a pass; as shares of a forward of the answer's width.
    """

    bits: int
    most: int
    cost: float
    row_cost: float


class Made(NamedTuple):
    """One continued prompt.

    tokens: without the end-of-sequence token. finish: "stop" | "length" | "cancelled". decode_s: from the end of all
    prefills to the last token. widths: of every decode forward, those that draft and verify included.
    """

    tokens: list[int]
    finish: str
    prefill_s: float
    decode_s: float
    widths: list[int]
    drafted: int
    accepted: int


class Model:
    """A decoder in C++ over arrays that stay where they are: matrices are read in place, for as long as this lives."""

    def __init__(
        self,
        spec: ModelSpec,
        floats: Mapping[str, StoredTensor],
        linears: Mapping[str, StoredLinear],
        *,
        threads: int,
        kv: KV = "float",
        variant: str = "",
        activations: Activations = "float",
    ) -> None:
        """floats: tensors by full name; linears: quantized matrices by module name, all by `core.spec`'s names.

        kv: how keys and values are kept: "float" is float32, "int8" has one float32 scale for each head and token, "int4"
        rounds groups of GROUP positions, all but the first and the newest, as ops/attention/attention.hpp says.

        variant: runs every op that has it in that variant; for tests. activations: what the inputs of quantized
        matrices are rounded to; "int8" where groups are whole tiles of 32 inputs or whole rows, elsewhere not at all.
        Raises InputCorrupt when a tensor is missing or does not fit the spec.
        """
        self._core = kernels().Model(spec.model_dump(), threads, variant, activations == "int8")
        self._kv = kv
        matrices = {name.removesuffix(".weight") for name, t in floats.items() if _is_matrix(name, t)}
        try:
            for name in sorted(matrices | linears.keys()):
                bias = None if f"{name}.bias" not in floats else _vector(floats[f"{name}.bias"])
                if name in linears:
                    self._add_nested(name, linears[name], bias)
                else:
                    weight = floats[f"{name}.weight"]
                    self._core.add_float(name, as_bytes(weight.data), weight.dtype, *weight.shape, bias)
            for name, tensor in floats.items():
                if not _is_matrix(name, tensor):
                    self._core.add_vector(name, _vector(tensor))
            self._core.finish()
        except ValueError as error:
            fix = "Make the artifact again, or check it with `lilliput verify`"
            raise InputCorrupt(str(error), where=f"weights of a {spec.family} model", fix=fix) from error

    def _add_nested(self, name: str, m: StoredLinear, bias: F32 | None) -> None:
        self._core.add_nested(name, *stored(m), m.out, m.columns, group_of(m), bias)
        if m.outliers is not None:
            m.check_outliers()
            first, columns = m.outliers.first().astype(np.uint32), np.ascontiguousarray(m.outliers.columns)
            self._core.add_outliers(name, first, columns, as_floats(m.outliers.values))

    @property
    def threads(self) -> int:
        """Threads that share the work."""
        return int(self._core.threads)

    def cache_bytes(self, positions: int) -> int:
        """Bytes of keys and values of one sequence, page by page as the arena gives them."""
        return int(self._core.cache_bytes(positions, self._kv))

    def logits(self, tokens: Sequence[int], bits: int) -> F32:
        """Return (tokens, vocab) for a fresh sequence. bits: 0 where nothing is quantized."""
        return as_f32(self._core.logits(list(tokens), bits, self._kv))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        bits: int | None = None,
        courses: Sequence[Course] | None = None,
        max_new_tokens: int,
        context: int,
        eos: Sequence[int],
        sampling: Sampling,
        drafting: Drafting | None = None,
        on_token: Callable[[int, int], bool] | None = None,
        on_prefill: Callable[[int, int], bool | None] | None = None,
        on_bits: Callable[[int, int], None] | None = None,
        next_bits: NextBits | None = None,
    ) -> list[Made]:
        """Continue every prompt; on_token(sequence, token) returns False to end that sequence.

        bits: of all of it; or courses, one a prompt. next_bits(sequence, decode forward, glimpse) is asked for the
        width of every decode forward of a course without steps. drafting: courses must then have one step.
        on_prefill(tokens of prompts done, tokens of all) is called after every chunk; False cancels all sequences.
        on_bits(sequence, bits) is called before on_token with the width whose forward chose the token, or drafted it
        where the verifying one agreed.

        Raises InputCorrupt when the model computes NaN; whatever on_token raises; KeyboardInterrupt.
        """
        if courses is None:
            courses = [(bits or 0, [(0, bits or 0)])] * len(prompts)
        drafts = None if drafting is None else (drafting.bits, drafting.most, drafting.cost, drafting.row_cost)
        listeners = (on_token, on_prefill, on_bits, next_bits)
        options = (max_new_tokens, context, list(eos), asdict(sampling), self._kv, drafts, *listeners)
        with numbers("the model computes NaN for this prompt"):
            made = self._core.generate([list(p) for p in prompts], list(courses), *options)
        return [Made(*result) for result in made]

    def follow(
        self, tokens: Sequence[int], prompt: int, course: Course, next_bits: NextBits | None = None
    ) -> tuple[F32, list[int]]:
        """Return the logits after the first `prompt` tokens and after each other one, and the width of each of those.

        Logits: (tokens - prompt + 1, vocab). The widths are those of the course, as if `generate` had chosen the tokens.
        """
        rows, widths = self._core.follow(list(tokens), prompt, course, self._kv, next_bits)
        return as_f32(rows), list(widths)


@contextmanager
def numbers(what: str) -> Iterator[None]:
    """Raise InputCorrupt where the kernels meet what is no number."""
    try:
        yield
    except kernels().NotANumber as error:
        fix = "Check the artifact with `lilliput verify`, then the source model"
        raise InputCorrupt(what, where="logits", fix=fix) from error


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    # the head norms of StableLM 2 are (heads, head_dim) but no matrices
    return name.endswith(".weight") and len(tensor.shape) == 2 and not name.endswith("_norm.weight")


def _vector(tensor: StoredTensor) -> F32:
    return as_floats(tensor.to_float32().reshape(-1))
