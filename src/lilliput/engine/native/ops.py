"""The float and int8 ops one by one."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.engine.native.arrays import F32, as_bytes, as_f32, as_floats, kernels, nested
from lilliput.engine.sampling import Sampling

KV = Literal["float", "int8", "int4"]
SHARE: Final = 16
"""Rows that one call of the attention kernel takes at most."""


def variants(op: str) -> list[str]:
    """Names of the variants of `op` that this CPU can run, best last. Raises ValueError for an unknown op."""
    return list(kernels().variants(op))


def compiler() -> str:
    """What built the kernels, such as "gcc 12.2.0"."""
    return str(getattr(kernels(), "compiler", "unknown"))


def matmul_nested(linear: StoredLinear, bits: int, x: F32, *, variant: str = "") -> F32:
    """x: (tokens, columns); returns (tokens, out), x times the transposed matrix at `bits`, inputs added in order."""
    return as_f32(kernels().matmul_nested(*nested(linear, bits), as_floats(x), variant))


def quantize_i8(
    x: F32, group_size: int, *, variant: str = ""
) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]]:
    """Round x (tokens, columns) to int8, one scale a token and group of inputs; -1 is one group.

    Returns codes (tokens, columns), scales (tokens, groups) and the sum of the codes of each group.
    """
    group = x.shape[1] if group_size == -1 else group_size
    codes, scale, total = kernels().quantize_i8(as_floats(x), group, variant)
    return np.asarray(codes).astype(np.int8), as_f32(scale), np.asarray(total).astype(np.int32)


def matmul_nested_i8(linear: StoredLinear, bits: int, x: F32, *, variant: str = "") -> F32:
    """Like `matmul_nested`, with x rounded to int8 by `quantize_i8` for the matrix's groups: (tokens, out)."""
    return as_f32(kernels().matmul_nested_i8(*nested(linear, bits), as_floats(x), variant))


def nested_rows(linear: StoredLinear, bits: int) -> F32:
    """Return the matrix at `bits`, (out, columns), weight by weight as embedding lookups compute it."""
    return as_f32(kernels().nested_rows(*nested(linear, bits)))


def matmul_float(weight: StoredTensor, x: F32, *, variant: str = "") -> F32:
    """weight: (out, columns) F32, F16 or BF16; x: (tokens, columns). Returns (tokens, out)."""
    return as_f32(kernels().matmul_float(as_bytes(weight.data), weight.dtype, weight.shape[0], as_floats(x), variant))


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
    arrays = as_floats(q), as_floats(keys), as_floats(values)
    return as_f32(kernels().attention(*arrays, position, window, scale, softcap, kv, share, variant))


def norm(
    x: F32, weight: F32, bias: F32 | None = None, *, eps: float, offset: float = 0.0, layer: bool, variant: str = ""
) -> F32:
    """Layer or RMS norm of one vector (n,), as `core.spec.Norm` defines it."""
    return as_f32(
        kernels().norm(
            as_floats(x), as_floats(weight), None if bias is None else as_floats(bias), eps, offset, layer, variant
        )
    )


def rotary(x: F32, inv_freq: F32, *, position: int, scale: float = 1.0, variant: str = "") -> F32:
    """Rotate the first 2 * len(inv_freq) channels of one head, as `core.spec.Rotary` defines it."""
    return as_f32(kernels().rotary(as_floats(x), as_floats(inv_freq), position, scale, variant))


def activation(kind: str, x: F32, up: F32 | None = None, *, variant: str = "") -> F32:
    """Apply an `Activation` of core.spec to (n,), times `up` where given."""
    return as_f32(kernels().activation(kind, as_floats(x), None if up is None else as_floats(up), variant))


def softcap(x: F32, cap: float) -> F32:
    """cap * tanh(x / cap) of (n,)."""
    return as_f32(kernels().softcap(as_floats(x), cap))


def exponential(x: F32) -> F32:
    """exp of (n,) as softmax and SiLU use it: 0 below -87, exp(88) above 88."""
    return as_f32(kernels().exponential(as_floats(x)))


def sample(logits: F32, sampling: Sampling, *, seen: Sequence[int] = (), draws: int = 1) -> list[int]:
    """Draw `draws` tokens in a row from the same logits (vocab,); seen: tokens that the penalty applies to."""
    return list(kernels().sample(as_floats(logits), asdict(sampling), list(seen), draws))


def read_bandwidth(size_bytes: int, threads: int, *, rounds: int = 5) -> float:
    """GB/s (10**9 bytes) at which `threads` threads read a buffer of that size, the best of `rounds` passes.

    Raises ValueError where a thread would have less than a page to read, MemoryError where the buffer does not fit.
    """
    return float(kernels().read_bandwidth(size_bytes, threads, rounds)) / 1e9
