"""Matrices as an artifact hands them out, made in memory."""

from collections.abc import Sequence

import numpy as np

from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.numerics.packing import fields_of, pack_fields, tile_groups

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
) -> StoredLinear:
    """Random codes, and for every width scales that keep the weights within about `spread`."""
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = rng.integers(0, 1 << bits[-1], (out, columns), dtype=np.uint8)
    scale = {b: (rng.uniform(0.5, 1.5, (out, groups)) * spread / (1 << b)).astype(np.float16) for b in bits}
    zero = {} if sym else {b: rng.uniform(-1, 1, (out, groups)).astype(np.float16) for b in bits}
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
    )
