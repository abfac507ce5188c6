"""The ops of integer graphs one by one, as `numerics.fixed` defines them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import StoredLinear
from lilliput.core.graph import Attend, Grid, Rotate
from lilliput.engine.native.arrays import Codes, as_codes, as_shorts, bits_zero, kernels, nested
from lilliput.engine.native.ops import SHARE


def matmul_integer(
    linear: StoredLinear,
    x: Codes,
    own: Grid,
    bias: npt.NDArray[np.int64],
    multiplier: npt.NDArray[np.int32],
    shift: npt.NDArray[np.int8],
    to: Grid,
    *,
    zeros: Codes | None = None,
    variant: str = "",
) -> Codes:
    """`numerics.fixed.linear` of a stored matrix at its widest. x: (tokens, columns) codes of the bits of `own`.

    zeros: (out,), the code that means 0 in each row; by default the middle one, 2**(bits - 1).
    """
    if zeros is None:
        zeros = np.full(linear.out, 1 << (linear.bits[-1] - 1), np.int16)
    rows = bias, multiplier, shift, as_shorts(zeros)
    factors = tuple(np.ascontiguousarray(one) for one in rows)
    return as_codes(
        kernels().matmul_integer(
            *nested(linear, linear.bits[-1]), as_shorts(x), own.bits, *factors, bits_zero(to), variant
        )
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
    of_q, of_k, of_v, to = map(bits_zero, grids)
    hi, lo, cap = constants
    ratios = (node.multiplier, node.shift), (node.out_multiplier, node.out_shift)
    arrays = as_shorts(q), as_shorts(keys), as_shorts(values), position, node.window
    tables = None if cap is None else as_shorts(cap), hi, lo, node.probability
    edges = (of_q, of_k, of_v, bits_zero(node.scores), to)
    return as_codes(kernels().attention_integer(*arrays, edges, *ratios, *tables, share, variant))


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
    return as_codes(
        kernels().norm_integer(as_shorts(x), bits_zero(own), gain, offset, layer, eps, shift, bits_zero(to), variant)
    )


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
    return as_codes(kernels().rotary_integer(as_shorts(x), bits_zero(own), cos, sin, *ratios, bits_zero(to), variant))


def multiply_integer(
    a: Codes, of_a: Grid, b: Codes, of_b: Grid, multiplier: int, shift: int, to: Grid, *, variant: str = ""
) -> Codes:
    """`numerics.fixed.multiply` of (n,)."""
    pairs = as_shorts(a), bits_zero(of_a), as_shorts(b), bits_zero(of_b), (multiplier, shift), bits_zero(to)
    return as_codes(kernels().multiply_integer(*pairs, variant))


def sum_integer(
    parts: Sequence[tuple[Codes, Grid]], multipliers: Sequence[int], shift: int, to: Grid, *, variant: str = ""
) -> Codes:
    """`numerics.fixed.add` of edges (n,)."""
    codes, grids = [as_shorts(x) for x, _ in parts], [bits_zero(grid) for _, grid in parts]
    return as_codes(kernels().sum_integer(codes, grids, list(multipliers), shift, bits_zero(to), variant))


def table_integer(x: Codes, bits: int, table: npt.NDArray[np.int16], to: Grid, *, variant: str = "") -> Codes:
    """`numerics.fixed.look_up` of (n,), with codes of `to`'s bits in the table."""
    return as_codes(kernels().table_integer(as_shorts(x), bits, table, to.bits, variant))
