"""The only door to C++: typed wrappers of the kernels, one by one, and of the model they add up to.

Every op takes `variant`, one of `variants(op)`; the empty name takes the best this CPU can run. All variants of an op
give the same bits. Arrays are float32 and contiguous unless said otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lilliput.artifact.integer import IntegerModel as StoredInteger
from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.core.errors import InputCorrupt, Unsupported
from lilliput.core.graph import Attend, Embed, Graph, Grid, Linear, Rotate
from lilliput.core.spec import ModelSpec
from lilliput.engine.sampling import Sampling

F32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]
KV = Literal["float", "int8", "int4"]
PAGE: Final = 64
"""Positions in a page of the cache; a sequence takes whole pages."""
GROUP: Final = 32
"""Positions, and channels of values, that an int4 cache rounds together."""
SHARE: Final = 16
"""Rows that one call of the attention kernel takes at most."""
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


@cache
def _native() -> Any:
    try:
        return import_module("lilliput.engine._native")
    except ImportError as error:
        what = f"the compiled kernels do not load ({error})"
        fix = "Install a wheel for this machine, or build them: `pip install .` needs a C++20 compiler"
        raise Unsupported(what, where="lilliput.engine", fix=fix) from error


def variants(op: str) -> list[str]:
    """Names of the variants of `op` that this CPU can run, best last. Raises ValueError for an unknown op."""
    return list(_native().variants(op))


def compiler() -> str:
    """What built the kernels, such as "gcc 12.2.0"."""
    return str(getattr(_native(), "compiler", "unknown"))


def matmul_nested(linear: StoredLinear, bits: int, x: F32, *, variant: str = "") -> F32:
    """x: (tokens, columns); returns (tokens, out), x times the transposed matrix at `bits`, inputs added in order."""
    return _f32(_native().matmul_nested(*_nested(linear, bits), _floats(x), variant))


def quantize_i8(
    x: F32, group_size: int, *, variant: str = ""
) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]]:
    """Round x (tokens, columns) to int8, one scale a token and group of inputs; -1 is one group.

    Returns codes (tokens, columns), scales (tokens, groups) and the sum of the codes of each group.
    """
    group = x.shape[1] if group_size == -1 else group_size
    codes, scale, total = _native().quantize_i8(_floats(x), group, variant)
    return np.asarray(codes).astype(np.int8), _f32(scale), np.asarray(total).astype(np.int32)


def matmul_nested_i8(linear: StoredLinear, bits: int, x: F32, *, variant: str = "") -> F32:
    """Like `matmul_nested`, with x rounded to int8 by `quantize_i8` for the matrix's groups: (tokens, out)."""
    return _f32(_native().matmul_nested_i8(*_nested(linear, bits), _floats(x), variant))


def matmul_integer(
    linear: StoredLinear,
    x: Codes,
    own: Grid,
    bias: npt.NDArray[np.int64],
    multiplier: npt.NDArray[np.int32],
    shift: npt.NDArray[np.int8],
    to: Grid,
    *,
    variant: str = "",
) -> Codes:
    """`numerics.fixed.linear` of a stored matrix at its widest. x: (tokens, columns) codes of the bits of `own`."""
    factors = (np.ascontiguousarray(bias), np.ascontiguousarray(multiplier), np.ascontiguousarray(shift))
    return _codes(
        _native().matmul_integer(*_nested(linear, linear.bits[-1]), _shorts(x), own.bits, *factors, _pair(to), variant)
    )


def attention_integer(
    q: Codes,
    keys: Codes,
    values: Codes,
    grids: tuple[Grid, Grid, Grid, Grid],
    node: Attend,
    constants: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int16] | None],
    *,
    position: int,
    share: int = SHARE,
    variant: str = "",
) -> Codes:
    """`numerics.fixed.attend` of one key-value head: q (queries, heads, head_dim), keys and values (positions, head_dim).

    grids: of q, keys, values and the result. constants: hi, lo, cap. The rest as in `attention`.
    """
    of_q, of_k, of_v, to = map(_pair, grids)
    hi, lo, cap = constants
    ratios = (node.multiplier, node.shift), (node.out_multiplier, node.out_shift)
    arrays = _shorts(q), _shorts(keys), _shorts(values), position, node.window
    tables = None if cap is None else _shorts(cap), hi, lo, node.probability
    edges = (of_q, of_k, of_v, _pair(node.scores), to)
    return _codes(_native().attention_integer(*arrays, edges, *ratios, *tables, share, variant))


def norm_integer(
    x: Codes,
    own: Grid,
    gain: npt.NDArray[np.int32],
    offset: npt.NDArray[np.int64] | None,
    to: Grid,
    *,
    layer: bool,
    eps: int,
    shift: int,
    variant: str = "",
) -> Codes:
    """`numerics.fixed.norm` of one run of channels, (n,)."""
    return _codes(_native().norm_integer(_shorts(x), _pair(own), gain, offset, layer, eps, shift, _pair(to), variant))


def rotary_integer(
    x: Codes,
    own: Grid,
    cos: npt.NDArray[np.int16],
    sin: npt.NDArray[np.int16],
    node: Rotate,
    to: Grid,
    *,
    variant: str = "",
) -> Codes:
    """`numerics.fixed.rotate` of one position: x (heads, head_dim), cos and sin (dim / 2,)."""
    ratios = (node.multiplier, node.shift), (node.plain_multiplier, node.plain_shift)
    return _codes(_native().rotary_integer(_shorts(x), _pair(own), cos, sin, *ratios, _pair(to), variant))


def multiply_integer(
    a: Codes, of_a: Grid, b: Codes, of_b: Grid, multiplier: int, shift: int, to: Grid, *, variant: str = ""
) -> Codes:
    """`numerics.fixed.multiply` of (n,)."""
    pairs = _shorts(a), _pair(of_a), _shorts(b), _pair(of_b), (multiplier, shift), _pair(to)
    return _codes(_native().multiply_integer(*pairs, variant))


def sum_integer(
    parts: Sequence[tuple[Codes, Grid]], multipliers: Sequence[int], shift: int, to: Grid, *, variant: str = ""
) -> Codes:
    """`numerics.fixed.add` of edges (n,)."""
    codes, grids = [_shorts(x) for x, _ in parts], [_pair(grid) for _, grid in parts]
    return _codes(_native().sum_integer(codes, grids, list(multipliers), shift, _pair(to), variant))


def table_integer(x: Codes, bits: int, table: npt.NDArray[np.int16], to: Grid, *, variant: str = "") -> Codes:
    """`numerics.fixed.look_up` of (n,), with codes of `to`'s bits in the table."""
    return _codes(_native().table_integer(_shorts(x), bits, table, to.bits, variant))


def nested_rows(linear: StoredLinear, bits: int) -> F32:
    """Return the matrix at `bits`, (out, columns), weight by weight as embedding lookups compute it."""
    return _f32(_native().nested_rows(*_nested(linear, bits)))


def matmul_float(weight: StoredTensor, x: F32, *, variant: str = "") -> F32:
    """weight: (out, columns) F32, F16 or BF16; x: (tokens, columns). Returns (tokens, out)."""
    return _f32(_native().matmul_float(_bytes(weight.data), weight.dtype, weight.shape[0], _floats(x), variant))


def attention(
    q: F32,
    keys: F32,
    values: F32,
    *,
    position: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    kv: KV = "float",
    share: int = SHARE,
    variant: str = "",
) -> F32:
    """q: (queries, heads, head_dim), the heads that share one key-value head, at `position` and what follows it.

    keys, values: (positions, head_dim), cached as `kv` says; each query sees its own position and those before it, the
    last `window` of them where that is not 0. softcap 0 is none. share: rows given to the kernel at a time.
    """
    arrays = _floats(q), _floats(keys), _floats(values)
    return _f32(_native().attention(*arrays, position, window, scale, softcap, kv, share, variant))


def norm(
    x: F32, weight: F32, bias: F32 | None = None, *, eps: float, offset: float = 0.0, layer: bool, variant: str = ""
) -> F32:
    """Layer or RMS norm of one vector (n,), as `core.spec.Norm` defines it."""
    return _f32(
        _native().norm(
            _floats(x), _floats(weight), None if bias is None else _floats(bias), eps, offset, layer, variant
        )
    )


def rotary(x: F32, inv_freq: F32, *, position: int, scale: float = 1.0, variant: str = "") -> F32:
    """Rotate the first 2 * len(inv_freq) channels of one head, as `core.spec.Rotary` defines it."""
    return _f32(_native().rotary(_floats(x), _floats(inv_freq), position, scale, variant))


def activation(kind: str, x: F32, up: F32 | None = None, *, variant: str = "") -> F32:
    """Apply an `Activation` of core.spec to (n,), times `up` where given."""
    return _f32(_native().activation(kind, _floats(x), None if up is None else _floats(up), variant))


def softcap(x: F32, cap: float) -> F32:
    """cap * tanh(x / cap) of (n,)."""
    return _f32(_native().softcap(_floats(x), cap))


def exponential(x: F32) -> F32:
    """exp of (n,) as softmax and SiLU use it: 0 below -87, exp(88) above 88."""
    return _f32(_native().exponential(_floats(x)))


def sample(logits: F32, sampling: Sampling, *, seen: Sequence[int] = (), draws: int = 1) -> list[int]:
    """Draw `draws` tokens in a row from the same logits (vocab,); seen: tokens that the penalty applies to."""
    return list(_native().sample(_floats(logits), asdict(sampling), list(seen), draws))


def read_bandwidth(size_bytes: int, threads: int, *, rounds: int = 5) -> float:
    """GB/s (10**9 bytes) at which `threads` threads read a buffer of that size, the best of `rounds` passes.

    Raises ValueError where a thread would have less than a page to read, MemoryError where the buffer does not fit.
    """
    return float(_native().read_bandwidth(size_bytes, threads, rounds)) / 1e9


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
        self._core = _native().Model(spec.model_dump(), threads, variant, activations == "int8")
        self._kv = kv
        matrices = {name.removesuffix(".weight") for name, t in floats.items() if _is_matrix(name, t)}
        try:
            for name in sorted(matrices | linears.keys()):
                bias = None if f"{name}.bias" not in floats else _vector(floats[f"{name}.bias"])
                if name in linears:
                    self._add_nested(name, linears[name], bias)
                else:
                    weight = floats[f"{name}.weight"]
                    self._core.add_float(name, _bytes(weight.data), weight.dtype, *weight.shape, bias)
            for name, tensor in floats.items():
                if not _is_matrix(name, tensor):
                    self._core.add_vector(name, _vector(tensor))
            self._core.finish()
        except ValueError as error:
            fix = "Make the artifact again, or check it with `lilliput verify`"
            raise InputCorrupt(str(error), where=f"weights of a {spec.family} model", fix=fix) from error

    def _add_nested(self, name: str, m: StoredLinear, bias: F32 | None) -> None:
        self._core.add_nested(name, *_stored(m), m.out, m.columns, _group(m), bias)

    @property
    def threads(self) -> int:
        """Threads that share the work."""
        return int(self._core.threads)

    def cache_bytes(self, positions: int) -> int:
        """Bytes of keys and values of one sequence, page by page as the arena gives them."""
        return int(self._core.cache_bytes(positions, self._kv))

    def logits(self, tokens: Sequence[int], bits: int) -> F32:
        """Return (tokens, vocab) for a fresh sequence. bits: 0 where nothing is quantized."""
        return _f32(self._core.logits(list(tokens), bits, self._kv))

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
        with _numbers("the model computes NaN for this prompt"):
            made = self._core.generate([list(p) for p in prompts], list(courses), *options)
        return [Made(*result) for result in made]

    def follow(
        self, tokens: Sequence[int], prompt: int, course: Course, next_bits: NextBits | None = None
    ) -> tuple[F32, list[int]]:
        """Return the logits after the first `prompt` tokens and after each other one, and the width of each of those.

        Logits: (tokens - prompt + 1, vocab). The widths are those of the course, as if `generate` had chosen the tokens.
        """
        rows, widths = self._core.follow(list(tokens), prompt, course, self._kv, next_bits)
        return _f32(rows), list(widths)


class IntegerModel:
    """An integer graph in C++ over arrays that stay where they are; `docs/integer.md` has the arithmetic.

    Its codes are those of `engine.oracle`, whatever the variant, the threads and the company in a batch. `bits` of its
    methods changes nothing: matrices of a graph have one width each.
    """

    def __init__(self, model: StoredInteger, *, threads: int, variant: str = "") -> None:
        """variant: runs every op that has it in that variant; for tests.

        Raises InputCorrupt for a graph the kernels do not run, such as one whose layers have heads of different widths.
        """
        self._model = model  # whose arrays are read in place
        self._core = _native().IntegerModel(model.spec.model_dump(), model.graph.model_dump(), threads, variant)
        try:
            for name, values in model.constants.items():
                self._core.add_constant(name, _bytes(values))
            for name in _matrices(model.graph):
                if name in model.linears:
                    m = model.linears[name]
                    self._core.add_nested(name, *_stored(m), m.out, m.columns, _group(m))
                else:
                    weight = model.floats[f"{name}.weight"]
                    self._core.add_float(name, _bytes(weight.data), weight.dtype, *weight.shape)
            self._core.finish()
        except ValueError as error:
            fix = "Run it with other activations, or make the artifact again"
            raise InputCorrupt(str(error), where="integer graph", fix=fix) from error

    @property
    def threads(self) -> int:
        """Threads that share the work."""
        return int(self._core.threads)

    def cache_bytes(self, positions: int) -> int:
        """Bytes of the codes of keys and values of one sequence, in whole pages."""
        return int(self._core.cache_bytes(positions))

    def logits(self, tokens: Sequence[int], bits: int = 0) -> F32:
        """Return (tokens, vocab) for a fresh sequence: scale * (code - zero), through the soft-cap if there is one."""
        with _numbers(_EMBEDDING):
            return _f32(self._core.logits(list(tokens)))

    def sites(self, tokens: Sequence[int], *, chunk: int = 256) -> dict[str, Codes]:
        """Return the codes of every edge for one fresh sequence run `chunk` tokens at a time, (tokens, width) each."""
        with _numbers(_EMBEDDING):
            found = self._core.sites(list(tokens), chunk)
        return {name: _codes(codes) for name, codes in found.items()}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        bits: int = 0,
        max_new_tokens: int,
        context: int,
        eos: Sequence[int],
        sampling: Sampling,
        on_token: Callable[[int, int], bool] | None = None,
        on_prefill: Callable[[int, int], bool | None] | None = None,
    ) -> list[Made]:
        """Continue every prompt, as `Model.generate` does. bits: what its one width is called in the results."""
        options = (bits, max_new_tokens, context, list(eos), asdict(sampling), on_token, on_prefill)
        with _numbers(_EMBEDDING):
            made = self._core.generate([list(p) for p in prompts], *options)
        return [Made(*result) for result in made]


_EMBEDDING = "an embedding is not finite"


@contextmanager
def _numbers(what: str) -> Iterator[None]:
    """Raise InputCorrupt where the kernels meet what is no number."""
    try:
        yield
    except _native().NotANumber as error:
        fix = "Check the artifact with `lilliput verify`, then the source model"
        raise InputCorrupt(what, where="logits", fix=fix) from error


def _matrices(graph: Graph) -> list[str]:
    """Names of the matrices a graph reads."""
    found = {node.matrix for node in graph.nodes if isinstance(node, Embed | Linear)}
    found |= {node.positions for node in graph.nodes if isinstance(node, Embed) and node.positions is not None}
    return sorted(found)


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    # the head norms of StableLM 2 are (heads, head_dim) but no matrices
    return name.endswith(".weight") and len(tensor.shape) == 2 and not name.endswith("_norm.weight")


def _group(m: StoredLinear) -> int:
    return m.columns if m.group_size == -1 else m.group_size


def _stored(m: StoredLinear) -> tuple[Any, ...]:
    """Planes, their widths, and the grids of every width."""
    grids = ([(bits, _bytes(values)) for bits, values in grid.items()] for grid in (m.scale, m.zero, m.table))
    return [_bytes(plane) for plane in m.planes], list(m.fields), *grids


def _nested(m: StoredLinear, bits: int) -> tuple[Any, ...]:
    """The arguments that stand for a matrix cut to the width it runs at when `bits` are asked for."""
    bits = m.width_at(bits)
    count = next(n for n in range(1, len(m.fields) + 1) if sum(m.fields[:n]) == bits)
    zero, table = (_bytes(grid[bits]) if bits in grid else None for grid in (m.zero, m.table))
    planes = [_bytes(plane) for plane in m.planes[:count]]
    return planes, list(m.fields[:count]), _bytes(m.scale[bits]), zero, table, m.out, m.columns, _group(m)


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # a view: stored arrays are contiguous


def _vector(tensor: StoredTensor) -> F32:
    return _floats(tensor.to_float32().reshape(-1))


def _floats(array: npt.NDArray[Any]) -> F32:
    return np.ascontiguousarray(array, dtype=np.float32)


def _f32(array: Any) -> F32:
    return np.asarray(array, dtype=np.float32)


def _shorts(codes: npt.NDArray[Any]) -> Codes:
    return np.ascontiguousarray(codes, dtype=np.int16)


def _pair(grid: Grid) -> tuple[int, int]:
    return grid.bits, grid.zero


def _codes(array: Any) -> Codes:
    return np.asarray(array).astype(np.int16)
