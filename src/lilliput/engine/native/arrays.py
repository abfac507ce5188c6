"""The compiled module, and arrays as it takes and gives them."""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import StoredLinear
from lilliput.core.errors import Unsupported
from lilliput.core.graph import Grid

F32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]


@cache
def kernels() -> Any:
    """The compiled module. Raises Unsupported where it does not load."""
    try:
        return import_module("lilliput.engine._native")
    except ImportError as error:
        what = f"the compiled kernels do not load ({error})"
        fix = "Install a wheel for this machine, or build them: `pip install .` needs a C++20 compiler"
        raise Unsupported(what, where="lilliput.engine", fix=fix) from error


def group_of(m: StoredLinear) -> int:
    return m.columns if m.group_size == -1 else m.group_size


def stored(m: StoredLinear) -> tuple[Any, ...]:
    """Planes, their widths, bytes of a scale and of a zero, and the grids of every width."""
    planes = [as_bytes(plane) for plane in m.planes]
    scale, zero = ([(b, as_bytes(grid[m.grid_at(b)])) for b in m.bits if grid] for grid in (m.scale, m.zero))
    table = [(bits, as_bytes(values)) for bits, values in m.table.items()]
    factors = [(bits, as_bytes(values)) for bits in m.bits if (values := m.factors(bits)) is not None]
    return planes, list(m.fields), 1 if m.unit else 2, scale, zero, table, factors


def nested(m: StoredLinear, bits: int) -> tuple[Any, ...]:
    """The arguments that stand for a matrix cut to the width it runs at when `bits` are asked for.

    Raises ValueError for one with outliers, which only a model adds.
    """
    if m.outliers is not None:
        raise ValueError(f"{m.name} has outliers, which a product by itself does not add")
    bits = m.width_at(bits)
    count = next(n for n in range(1, len(m.fields) + 1) if sum(m.fields[:n]) == bits)
    own = m.grid_at(bits)
    zero, table = as_bytes(m.zero[own]) if m.zero else None, as_bytes(m.table[bits]) if bits in m.table else None
    factors = m.factors(bits)
    grids = as_bytes(m.scale[own]), zero, table, None if factors is None else as_bytes(factors)
    planes = [as_bytes(plane) for plane in m.planes[:count]]
    return planes, list(m.fields[:count]), 1 if m.unit else 2, *grids, m.out, m.columns, group_of(m)


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # a view: stored arrays are contiguous


def as_floats(array: npt.NDArray[Any]) -> F32:
    return np.ascontiguousarray(array, dtype=np.float32)


def as_f32(array: Any) -> F32:
    return np.asarray(array, dtype=np.float32)


def as_shorts(codes: npt.NDArray[Any]) -> Codes:
    return np.ascontiguousarray(codes, dtype=np.int16)


def bits_zero(grid: Grid) -> tuple[int, int]:
    """Bits and zero."""
    return grid.bits, grid.zero


def as_codes(array: Any) -> Codes:
    return np.asarray(array).astype(np.int16)
