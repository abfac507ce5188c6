"""Matrices as an artifact hands them out, made in memory."""

from collections.abc import Sequence

import numpy as np

from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.numerics.packing import (
    UNIT_LEAST,
    fields_of,
    pack_fields,
    scale_numbers,
    tile_groups,
    tile_rows,
    tile_table,
    zero_step,
)

UNIT = 2.0**-24


def gamma(n: int) -> float:
    """Relative error bound of a float32 sum of n products in any order (Higham 2002, 3.1)."""
    return n * UNIT / (1 - n * UNIT)


def stored(values: np.ndarray, dtype: str = "F32") -> StoredTensor:
    """Round `values` to a stored dtype."""
    if dtype == "BF16":
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = values.astype({"F32": np.float32, "F16": np.float16}[dtype])
    return StoredTensor(dtype, values.shape, data)


def random_linear(
    rng: np.random.Generator,
    out: int,
    columns: int,
    bits: Sequence[int],
    group_size: int = 32,
    *,
    sym: bool = False,
    spread: float = 1.0,
    tables: Sequence[int] = (),
    shared: bool = False,
    in_bytes: bool = False,
) -> StoredLinear:
    """Random codes, and for every width scales that keep the weights within about `spread`.

    tables: widths, of those in `bits`, that have random levels instead of even ones. shared: the narrowest width
    has the only scales and zeros, and all have ratios, all over their range. in_bytes: scales and zeros are bytes, zeros
    in the same range as else.
    """
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = rng.integers(0, 1 << bits[-1], (out, columns), dtype=np.uint8)
    table = {b: np.sort(rng.integers(0, 128, (out, 1 << b), dtype=np.uint8), axis=1) for b in bits if b in tables}
    levels = {b: 128 if b in table else 1 << b for b in bits}
    own = bits[:1] if shared else bits
    scale = {b: (rng.uniform(0.5, 1.5, (out, groups)) * spread / levels[b]).astype(np.float16) for b in own}
    zero = {} if sym else {b: rng.uniform(-1, 1, (out, groups)).astype(np.float16) for b in own}
    unit: dict[int, np.ndarray] = {}
    if in_bytes:
        for b in own:
            top = np.log2(spread / levels[b] / scale_numbers()[-1]) - UNIT_LEAST
            unit[b] = rng.integers(int(top) - 1, int(top) + 2, out).astype(np.uint8)
            scale[b] = rng.integers(0, 256, (out, groups), dtype=np.uint8)
        steps = {b: 1 / zero_step(7 if b in table else b) for b in zero}
        zero = {b: np.clip(np.round(z * steps[b]), -128, 127).astype(np.int8) for b, z in zero.items()}
    ratio = {b: rng.integers(0, 256, out, dtype=np.uint8) for b in bits if shared}
    return StoredLinear(
        name="matrix",
        out=out,
        columns=columns,
        group_size=group_size,
        groups=groups,
        bits=tuple(bits),
        fields=fields_of(bits),
        planes=tuple(pack_fields(codes, fields_of(bits))),
        scale={b: tile_groups(v) for b, v in scale.items()},
        zero={b: tile_groups(v) for b, v in zero.items()},
        bias=None,
        table={b: tile_table(v) for b, v in table.items()},
        ratio={b: tile_rows(v) for b, v in ratio.items()},
        unit={b: tile_rows(v) for b, v in unit.items()},
    )
