"""Whole-number arithmetic with scales fixed in advance, as docs/integer.md defines it (NumPy, no torch).

The first half runs: pure functions of int64 arrays to int64 arrays, exact, the same on every machine. The second half
makes, once and in float64, the constants the first half is given; halves round to even there.

No operation is on floats, with one exception in name: a matrix product may have its whole numbers carried by float64,
for which NumPy has a fast product. As long as every sum stays below 2**53 each of them is exact in any order, so the
result is the whole number it would be in int64. `matmul` uses it only then, and not at all if told so.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lilliput.core.graph import Attend, Grid, Rotate

I64 = npt.NDArray[np.int64]
Whole = npt.NDArray[Any]
"""An array of whole numbers of any size."""

MULTIPLIER_BITS: Final = 23
LARGEST_SHIFT: Final = 62
LARGEST: Final = 1 << 39
"""Magnitude up to which a number may be rescaled: times a multiplier, and half a unit more, it is below 2**63."""
ONE: Final = 1 << 16
"""What 1 is among the exponentials of a softmax."""
TURN_BITS: Final = 14
"""Bits behind the point of cosines and sines."""
_EXACT = 1 << 53
_EPS_LIMIT = 1 << 61
_CELLS: Final = 1 << 22
"""Attention scores held at a time."""


def wide(x: Whole) -> I64:
    """The same numbers in 64 bits."""
    return x.astype(np.int64, copy=False)


def clamp(value: Whole, to: Grid) -> I64:
    """Shift by the zero of `to` and keep to its codes."""
    return wide(np.clip(value + to.zero, to.low, to.high))


def reach(grid: Grid) -> int:
    """The largest |code - zero|."""
    return max(grid.zero - grid.low, grid.high - grid.zero)


def requantize(a: Whole, multiplier: Whole | int, shift: Whole | int) -> I64:
    """a * multiplier / 2**shift, rounded to nearest, halves up. Raises ValueError where |a| exceeds LARGEST."""
    if a.size and (int(a.max()) > LARGEST or int(a.min()) < -LARGEST):
        raise ValueError(f"a sum beyond {LARGEST} cannot be rescaled in 64 bits")
    m, s = np.asanyarray(multiplier, np.int64), np.asanyarray(shift, np.int64)
    return wide((wide(a) * m + (np.int64(1) << (s - 1))) >> s)


def matmul(a: Whole, b: Whole, most: int, *, blas: bool) -> I64:
    """a @ b.T, exactly. a: (.., rows, n) whole numbers, b: (.., out, n), of which float64 may carry b.

    most: what no |a * b| exceeds. blas: let float64 carry the numbers where all sums stay below 2**53; see above.
    """
    if blas and most * a.shape[-1] < _EXACT:
        product = a.astype(np.float64) @ b.astype(np.float64, copy=False).swapaxes(-1, -2)
        return product.astype(np.int64)
    return wide(wide(a) @ wide(b).swapaxes(-1, -2))


def bit_length(x: Whole) -> I64:
    """Bits of each number >= 0, as int.bit_length says."""
    rest, bits = wide(x).copy(), np.zeros_like(x, dtype=np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        more = (rest >> step) > 0
        bits += step * more
        rest >>= step * more
    return wide(bits + rest)


def isqrt(x: Whole) -> I64:
    """The whole part of the square root of each number, 0 <= x < 2**62."""
    root = np.int64(1) << ((bit_length(x) + 1) >> 1)  # not below it, so that the steps of Newton's method go down
    while True:
        better = (root + wide(x) // np.maximum(root, 1)) >> 1
        if not (better < root).any():
            return wide(root)
        root = np.minimum(root, better)


def linear(
    x: Whole, weight: Whole, bias: Whole, multiplier: Whole, shift: Whole, to: Grid, *, blas: bool = True
) -> I64:
    """A linear layer. x: (positions, in) codes. weight: (out, in) of -255..255. The rest (out,); `models.lowering` makes them."""
    total = matmul(x, weight, 1 << 23, blas=blas) + wide(bias)
    return clamp(requantize(total, multiplier, shift), to)


def norm(
    x: Whole,
    own: Grid,
    gain: Whole,
    offset: Whole | None,
    to: Grid,
    *,
    kind: str,
    heads: int,
    eps: int,
    shift: int,
) -> I64:
    """A normalisation of each of `heads` runs of channels. x: (positions, width) codes. gain, offset: (width,)."""
    rows = (wide(x) - own.zero).reshape(len(x), heads, -1)
    count = rows.shape[-1]
    if kind == "layer":
        centre = (64 * rows.sum(-1, keepdims=True) + count // 2) // count
        rows = 64 * rows - centre
    square = np.maximum((rows * rows).sum(-1, keepdims=True) + eps, 1)
    even = (62 - bit_length(square)) & ~1
    inverse = (np.int64(1) << 61) // isqrt(square << even)
    back = 31 - (even >> 1)
    unit = (rows * inverse + (np.int64(1) << (back - 1))) >> back
    unit = unit.reshape(x.shape)
    product = unit * wide(gain) + (1 << (shift - 1))
    if offset is not None:
        product = product + wide(offset)
    return clamp(product >> shift, to)


def rotate(x: Whole, own: Grid, cos: Whole, sin: Whole, node: Rotate, to: Grid) -> I64:
    """Turn heads by their positions. x: (positions, heads * head_dim) codes. cos, sin: (positions, dim / 2)."""
    heads = (wide(x) - own.zero).reshape(len(x), -1, node.head_dim)
    half = node.dim // 2
    a, b, rest = heads[..., :half], heads[..., half : node.dim], heads[..., node.dim :]
    c, s = wide(cos)[:, None], wide(sin)[:, None]
    turned = [requantize(part, node.multiplier, node.shift) for part in (a * c - b * s, b * c + a * s)]
    turned.append(requantize(rest << TURN_BITS, node.plain_multiplier, node.plain_shift))
    return clamp(np.concatenate(turned, axis=-1).reshape(x.shape), to)


def attend(
    q: Whole,
    k: Whole,
    v: Whole,
    grids: tuple[Grid, Grid, Grid, Grid],
    node: Attend,
    constants: tuple[Whole, Whole, Whole | None],
    *,
    start: int,
    blas: bool = True,
    scores: list[I64] | None = None,
    given: Sequence[Whole] = (),
) -> I64:
    """Attention of queries at positions start, start + 1, .. over all keys from position 0.

    q: (queries, heads * head_dim) codes. k, v: (keys, kv_heads * head_dim). grids: of q, k, v and the result.
    constants: hi, lo and, with a soft-cap, cap. scores: is given the codes of scores, and of capped ones where there are
    any, (heads, queries, keys) each; what is not seen has the lowest code. given: codes of scores, and of capped ones, that
    what comes after them reads instead, in the same shape.
    """
    of_q, of_k, of_v, to = grids
    queries, keys, dim = len(q), len(k), node.head_dim
    groups = node.heads // node.kv_heads
    split_q = (wide(q) - of_q.zero).reshape(queries, node.kv_heads, groups, dim)
    split_k = (wide(k) - of_k.zero).reshape(keys, node.kv_heads, dim)
    split_v = (wide(v) - of_v.zero).reshape(keys, node.kv_heads, dim)
    step = max(1, _CELLS // (groups * keys))
    told: list[list[list[Whole]]] = []
    rows = []
    for first in range(0, queries, step):
        place = np.arange(start + first, start + min(first + step, queries))
        seen = _seen(place, keys, node)
        heads = []
        for head in range(node.kv_heads):
            part = split_q[first : first + step, head].swapaxes(0, 1)  # (groups, queries, head_dim)
            dots = matmul(part, split_k[:, head], reach(of_q) * reach(of_k), blas=blas)
            instead = [of[head * groups : (head + 1) * groups, first : first + step] for of in given]
            found = _scores(dots, instead, node, constants[2])
            share = _shares((instead or found)[-1], seen, node.probability, constants[0], constants[1])
            mixed = matmul(share, split_v[:, head].T, (node.probability + 1) * reach(of_v), blas=blas)
            heads.append(requantize(mixed, node.out_multiplier, node.out_shift))
            if scores is not None:
                told.append([found, [seen]])
        rows.append(np.concatenate(heads, axis=0).swapaxes(0, 1))  # (queries, heads, head_dim)
    if scores is not None:
        scores += _gathered(told, node.kv_heads)
    return clamp(np.concatenate(rows).reshape(queries, -1), to)


def _seen(place: Whole, keys: int, node: Attend) -> Whole:
    age = place[:, None] - np.arange(keys)
    seen = (age >= 0) | (not node.causal)
    return seen & (age < node.window) if node.window else seen


def _scores(dots: I64, given: Sequence[Whole], node: Attend, cap: Whole | None) -> list[Whole]:
    found: list[Whole] = [clamp(requantize(dots, node.multiplier, node.shift), node.scores)]
    if cap is not None:
        found.append(wide(cap)[wide((*given, *found)[0]) + (1 << 15)])
    return found


def _shares(scores: Whole, seen: Whole, one: int, hi: Whole, lo: Whole) -> I64:
    """Softmax of (.., queries, keys) codes over what is seen, in units of 1 / one."""
    low = -(1 << 15)
    scores = wide(scores)  # a difference of two may need 17 bits
    top = np.where(seen, scores, low).max(-1, keepdims=True)
    delta = np.where(seen, top - scores, 0)
    power = (wide(hi)[delta >> 8] * wide(lo)[delta & 255] + (1 << 15)) >> 16
    power = np.where(seen, power, 0)
    total = power.sum(-1, keepdims=True)
    return wide((power * ((one << 31) // total) + (1 << 30)) >> 31)


def _gathered(told: list[list[list[Whole]]], kv_heads: int) -> list[I64]:
    """Join the scores of chunks of queries and kv heads."""
    kinds = len(told[0][0])
    chunks = [told[at : at + kv_heads] for at in range(0, len(told), kv_heads)]
    joined = []
    for kind in range(kinds):
        rows = [
            np.concatenate([np.where(seen, found[kind], -(1 << 15)) for found, (seen,) in chunk]) for chunk in chunks
        ]
        joined.append(wide(np.concatenate(rows, axis=1)))
    return joined


def look_up(x: Whole, table: Whole, bits: int) -> I64:
    """table[x + 2**(bits - 1)]. x: codes of `bits` bits."""
    return wide(table)[wide(x) + (1 << (bits - 1))]


def multiply(a: Whole, of_a: Grid, b: Whole, of_b: Grid, multiplier: int, shift: int, to: Grid) -> I64:
    """The product of two edges, channel by channel."""
    return clamp(requantize((wide(a) - of_a.zero) * (wide(b) - of_b.zero), multiplier, shift), to)


def add(parts: Sequence[tuple[Whole, Grid]], multipliers: Sequence[int], shift: int, to: Grid) -> I64:
    """The sum of edges, rounded once."""
    total: Whole = np.zeros_like(parts[0][0], dtype=np.int64)
    for (x, grid), m in zip(parts, multipliers, strict=True):
        total = total + (wide(x) - grid.zero) * m
    return clamp((total + (1 << (shift - 1))) >> shift, to)


# ---- constants


def multiplier(factor: float) -> tuple[int, int]:
    """(m, s) with m / 2**s nearest to `factor`: 2**22 <= m < 2**23 and s >= 1; s = 62 and m smaller below 2**-40.

    Raises ValueError for a factor that is negative, not finite, or 2**22 and more.
    """
    m, s = multipliers(np.array([factor]))
    return int(m[0]), int(s[0])


def multipliers(factors: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """`multiplier` of each factor."""
    if not (np.isfinite(factors) & (factors >= 0)).all():
        raise ValueError("a factor is negative or not finite")
    part, power = np.frexp(factors)
    m = np.rint(np.ldexp(part, MULTIPLIER_BITS)).astype(np.int64)
    s = MULTIPLIER_BITS - power.astype(np.int64)
    over = m == 1 << MULTIPLIER_BITS
    m, s = np.where(over, m >> 1, m), s - over
    if (s < 1).any():
        raise ValueError(f"a factor is {factors.max():.3g}, beyond 2**22")
    small = s > LARGEST_SHIFT
    m = np.where(small, np.rint(np.ldexp(np.minimum(factors, 1.0), LARGEST_SHIFT)).astype(np.int64), m)
    return m.astype(np.int32), np.where(small, LARGEST_SHIFT, s).astype(np.int8)


def norm_constants(
    kind: str,
    weight: npt.NDArray[np.float64],
    bias: npt.NDArray[np.float64] | None,
    count: int,
    eps: float,
    own: Grid,
    to: Grid,
) -> tuple[npt.NDArray[np.int32], I64 | None, int, int]:
    """(gain, offset, eps, shift) of `norm`. weight: with its offset added. count: channels of a run.

    Raises ValueError when no shift holds them.
    """
    slopes = math.sqrt(count) * weight / to.scale
    moved = None if bias is None else bias / to.scale
    eps_whole = min(round(count * eps / own.scale**2 * (4096 if kind == "layer" else 1)), _EPS_LIMIT)
    for shift in range(60, 0, -1):
        gain = np.rint(np.ldexp(slopes, shift - 30))
        offset = None if moved is None else np.rint(np.ldexp(moved, shift))
        if (np.abs(gain) < 2.0**31).all() and (offset is None or (np.abs(offset) < 2.0**60).all()):
            return gain.astype(np.int32), None if offset is None else offset.astype(np.int64), eps_whole, shift
    raise ValueError("its weights are too large beside the scale of its output")


def sum_constants(scales: Sequence[float], to: Grid) -> tuple[tuple[int, ...], int]:
    """(multipliers, shift) of `add` for parts of these scales. Raises ValueError when no shift holds them."""
    for shift in range(60, 0, -1):
        found = [round(math.ldexp(scale / to.scale, shift)) for scale in scales]
        if max(found) < 1 << 30:
            return tuple(found), shift
    raise ValueError("its inputs are too large beside the scale of its output")


def exponentials(scale: float) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(hi, lo), (256,) each: exp(-256 * n * scale) and exp(-n * scale) in units of 2**-16."""
    n = np.arange(256, dtype=np.float64)
    hi, lo = (np.rint(ONE * np.exp(-step * n * scale)).astype(np.int32) for step in (256, 1))
    return hi, lo


def turns(freqs: Sequence[float], positions: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """(cos, sin) of position times frequency, (positions, len(freqs)) each, in units of 2**-14."""
    angle = np.arange(positions, dtype=np.float64)[:, None] * np.array(freqs, dtype=np.float64)
    cos, sin = (np.rint(np.ldexp(part, TURN_BITS)).astype(np.int16) for part in (np.cos(angle), np.sin(angle)))
    return cos, sin


def values(codes: Whole, grid: Grid) -> npt.NDArray[np.float64]:
    """What codes stand for."""
    return grid.scale * (codes.astype(np.float64) - grid.zero)


def codes(real: npt.NDArray[Any], grid: Grid) -> npt.NDArray[np.int16]:
    """The nearest codes, halves to even. real: finite."""
    rounded = np.rint(real / grid.scale)
    held = np.clip(rounded, grid.low - grid.zero, grid.high - grid.zero).astype(np.int64)
    return (held + grid.zero).astype(np.int16)
