"""Tensors as an artifact hands them out: read-only views of its files, and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.core.errors import InputCorrupt
from lilliput.numerics.packing import (
    LEVEL_MIDDLE,
    RATIO_ONE,
    UNIT_LEAST,
    counted_bits,
    serving_width,
    unpack_fields,
    unpack_scales,
    unpack_zeros,
    untile_groups,
    untile_table,
    zero_step,
)

_ROWS = 1 << 12
"""Rows whose outliers are looked at together."""
_HALF_UNIT = -20
"""A scale's byte times 16 is a float16 of its number times 2 to this; see `scale_numbers`."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as stored: `data` is a read-only view of the file, BF16 as the uint16 of its bits."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32, own memory."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.data.astype(np.float32)


@dataclass(frozen=True)
class StoredOutliers:
    """Numbers that every width of a matrix adds to what its codes mean. All arrays are read-only views.

    counts: (out,) uint16, how many a row has. columns: (n,) uint16, row after row, ascending within one. values: (n,)
    float16.
    """

    counts: npt.NDArray[np.uint16]
    columns: npt.NDArray[np.uint16]
    values: npt.NDArray[np.float16]

    def first(self) -> npt.NDArray[np.int64]:
        """Number of the first outlier of every row among all, and how many there are: (out + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def check(self, width: int) -> None:
        """Raise ValueError where they do not stand in a matrix of `width` columns, or one is not finite.

        Looks at some rows at a time, so that it takes little memory.
        """
        first = self.first()
        if first[-1] != len(self.columns):
            raise ValueError(f"the rows have {first[-1]} outliers together, and {len(self.columns)} are there")
        if int(self.columns.max(initial=0)) >= width:
            raise ValueError(f"an outlier stands in column {int(self.columns.max())} of {width}")
        for row in range(0, len(self.counts), _ROWS):
            some = self.counts[row : row + _ROWS]
            columns = self.columns[first[row] : first[row + len(some)]].astype(np.int64)
            if (np.diff(np.repeat(np.arange(len(some)) * width, some) + columns) <= 0).any():
                raise ValueError("the outliers of a row do not ascend")
            if not np.isfinite(self.values[first[row] : first[row + len(some)]]).all():
                raise ValueError("an outlier is not finite")

    def places(self, width: int) -> npt.NDArray[np.int64]:
        """Where they stand in a matrix of `width` columns laid out row after row: (n,), ascending, once checked."""
        found: npt.NDArray[np.int64] = np.repeat(np.arange(len(self.counts)) * width, self.counts) + self.columns
        return found


@dataclass(frozen=True)
class StoredLinear:
    """One quantized matrix as stored, as far as its widest width in `bits` needs it. All arrays are read-only views.

    bits: widths of the matrix itself, ascending. fields: width of each plane, most significant first; planes[f]:
    uint8 (row tiles, input tiles, 64 * fields[f]). scale[b], zero[b]: (row tiles, groups, 16), zero empty when
    symmetric; float16, or where there are units uint8 and int8, as numerics/packing.py has them. unit[b]: uint8 (row
    tiles, 16) beside each scale, or none. group_size: -1 is one group a row. bias: (out,) or None. table[b]: uint8 (row tiles, 16, 2**b) for
    the widths that have one. ratio[b]: uint8 (row tiles, 16) for all widths, where the scale and zero of the narrowest
    serve all; else empty. outliers: or None.
    """

    name: str
    out: int
    columns: int
    group_size: int
    groups: int
    bits: tuple[int, ...]
    fields: tuple[int, ...]
    planes: tuple[npt.NDArray[np.uint8], ...]
    scale: Mapping[int, npt.NDArray[Any]]
    zero: Mapping[int, npt.NDArray[Any]]
    bias: StoredTensor | None
    table: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    ratio: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    unit: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    outliers: StoredOutliers | None = None

    def grids(self, width: int) -> list[npt.NDArray[Any]]:
        """What is read at one width of the ladder besides fields and outliers: scales, zeros, units, tables and ratios."""
        own = self.grid_at(width)
        found = [grid[own] for grid in (self.scale, self.zero, self.unit) if own in grid]
        return found + [grid[width] for grid in (self.table, self.ratio) if width in grid]

    def grid_at(self, width: int) -> int:
        """The width whose scale and zero serve `width`: the narrowest, where the grid is shared."""
        return self.bits[0] if self.ratio else width

    def scales(self, own: int) -> npt.NDArray[np.float32]:
        """Scales stored for one width of the ladder: (out, groups) float32."""
        scale = untile_groups(self.scale[own], self.out)
        if own in self.unit:
            scale = unpack_scales(scale, self.unit[own].reshape(-1)[: self.out])
        return scale.astype(np.float32)

    def zeros(self, own: int) -> npt.NDArray[np.float32] | None:
        """Zeros stored for one width of the ladder, from the middle of its codes: (out, groups) float32."""
        if own not in self.zero:
            return None
        zero = untile_groups(self.zero[own], self.out)
        return (unpack_zeros(zero, counted_bits(own, self.table)) if own in self.unit else zero).astype(np.float32)

    def factors(self, width: int) -> npt.NDArray[np.float32] | None:
        """What a row's scales are multiplied by at one width, and its zeros: (2, row tiles, 16) float32; None for nothing.

        Scales as the engine reads them: of bytes times 16 as the bits of float16.
        """
        own, ratios = self.grid_at(width), self._ratios(width)
        if own not in self.unit:
            return ratios
        power = np.exp2(self.unit[own].astype(np.float32) + np.float32(UNIT_LEAST - _HALF_UNIT))
        found = np.stack([power, np.full_like(power, zero_step(counted_bits(own, self.table)))])
        return found if ratios is None else found * ratios

    def _ratios(self, width: int) -> npt.NDArray[np.float32] | None:
        if width not in self.ratio:
            return None
        factor = (self.ratio[width].astype(np.float32) + RATIO_ONE) * np.float32(2.0 ** (self.bits[0] - width - 8))
        return np.stack([factor, np.float32(1) / factor])

    def width_at(self, bits: int) -> int:
        """Width this matrix runs at when the artifact is asked for `bits`: the narrowest of at least that, or the widest."""
        return serving_width(self.bits, bits)

    def dequantize(self, bits: int) -> npt.NDArray[np.float32]:
        """Return the (out, columns) float32 matrix at the artifact's width `bits`: scale * (c - (2**w - 1) / 2 - zero).

        Where the width w has a table: scale * (table[c] - 63.5 - zero). Where it has a ratio: with it applied. Outliers
        are added to that. Raises InputCorrupt where these are none.
        """
        width, count, total = self.width_at(bits), 0, 0
        while total < width:
            total, count = total + self.fields[count], count + 1
        codes = unpack_fields(self.planes[:count], self.fields[:count], self.out, self.columns)
        if width in self.table:
            levels = untile_table(self.table[width], self.out).astype(np.float32) - np.float32(LEVEL_MIDDLE)
            values = np.take_along_axis(levels, codes, axis=1)
        else:
            values = codes.astype(np.float32) - np.float32((2**width - 1) / 2)
        own, ratios = self.grid_at(width), self._ratios(width)
        zero = self.zeros(own)
        if zero is not None:
            values -= self._spread(zero, None if ratios is None else ratios[1])
        values *= self._spread(self.scales(own), None if ratios is None else ratios[0])
        if self.outliers is not None:
            self.check_outliers()
            values.reshape(-1)[self.outliers.places(self.columns)] += self.outliers.values.astype(np.float32)
        return values

    def check_outliers(self) -> None:
        """Raise InputCorrupt where the outliers, if there are some, do not stand in the matrix."""
        try:
            if self.outliers is not None:
                self.outliers.check(self.columns)
        except ValueError as error:
            fix = "Copy the artifact again from its source, or make it again"
            raise InputCorrupt(str(error), self.name, fix) from None

    def _spread(self, rows: npt.NDArray[np.float32], factor: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        size = self.columns if self.group_size == -1 else self.group_size
        if factor is not None:
            rows *= factor.reshape(-1)[: self.out, None]
        if self.groups == 1:
            return rows
        return np.repeat(rows, size, axis=1)[:, : self.columns]
