"""A quantized matrix that serves several widths from one set of codes (needs torch).

Source: Park et al., "Any-Precision LLM", ICML 2024, section 3 (nested codes, one table of centroids per row and width);
the affine form with a scale and a zero refitted for every width, the grid that all widths share, and centroids rounded to
7 bits, are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.numerics.outliers import Outliers
from lilliput.numerics.packing import LEVEL_MIDDLE, RATIO_ONE, serving_width

_CHUNK = 1 << 22  # codes looked up at once: their int64 indices take 32 MiB


@dataclass(frozen=True)
class Quantized:
    """One matrix as codes, and for each width b a scale and perhaps a zero per group.

    codes: (out, in) uint8 of max(bits) bits. scale[b]: (out, groups) float16. zero[b]: the same, counted from the
    middle of the code range, or missing when the grid is symmetric. group_size: inputs a group, -1 for whole rows;
    the last group may be shorter. table[b]: (out, 2**b) uint8 of 0..127, non-decreasing along a row, for the widths of
    up to 4 bits whose levels are not evenly spaced; see `numerics/codebooks.py`.

    ratio[b]: (out,) uint8 for every width, or for none. With ratios there are a scale and a zero only of the narrowest
    width a. At width b a row's scales are those times f = (128 + ratio) / 256 * 2**(a - b), its zeros those over f, so
    that the middle of a group stays where it is. Such a matrix has no tables.

    outliers: a few numbers in half precision that every width adds to what its codes mean, or None.
    """

    codes: Tensor
    bits: tuple[int, ...]
    group_size: int
    scale: Mapping[int, Tensor]
    zero: Mapping[int, Tensor] = field(default_factory=dict)
    table: Mapping[int, Tensor] = field(default_factory=dict)
    ratio: Mapping[int, Tensor] = field(default_factory=dict)
    outliers: Outliers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.codes.shape
        return out, columns

    def serving(self, bits: int) -> int:
        """The width this matrix serves when asked for `bits`: its smallest of at least that, else its widest."""
        return serving_width(self.bits, bits)

    def grid(self, bits: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of one width as its levels use them: (out, groups) float32 each; zero None when symmetric."""
        own = self.bits[0] if self.ratio else bits
        scale = self.scale[own].to(torch.float32)
        zero = self.zero[own].to(torch.float32) if own in self.zero else None
        if not self.ratio:
            return scale, zero
        factor = self.factor(bits)
        return scale * factor, None if zero is None else zero * (1 / factor)

    def factor(self, bits: int) -> Tensor:
        """What the scales of a shared grid are multiplied by at one width: (out, 1) float32."""
        return (self.ratio[bits].to(torch.float32)[:, None] + RATIO_ONE) * 2.0 ** (self.bits[0] - bits - 8)

    def rows(self, index: Tensor | slice) -> "Quantized":
        """The same grid for some of the rows."""
        scale = {b: s[index] for b, s in self.scale.items()}
        zero = {b: z[index] for b, z in self.zero.items()}
        table = {b: t[index] for b, t in self.table.items()}
        ratio = {b: r[index] for b, r in self.ratio.items()}
        outliers = None if self.outliers is None else self.outliers.rows(index)
        return Quantized(self.codes[index], self.bits, self.group_size, scale, zero, table, ratio, outliers)

    @staticmethod
    def stack(parts: Sequence["Quantized"]) -> "Quantized":
        """Slices of rows put back together; all of one ladder and group size."""
        first = parts[0]
        scale = {b: torch.cat([p.scale[b] for p in parts]) for b in first.scale}
        zero = {b: torch.cat([p.zero[b] for p in parts]) for b in first.zero}
        table = {b: torch.cat([p.table[b] for p in parts]) for b in first.table}
        ratio = {b: torch.cat([p.ratio[b] for p in parts]) for b in first.ratio}
        kept = [p.outliers for p in parts if p.outliers is not None]
        assert len(kept) in (0, len(parts)), "all parts of a matrix have outliers, or none"
        outliers = Outliers.stack(kept) if kept else None
        codes = torch.cat([p.codes for p in parts])
        return Quantized(codes, first.bits, first.group_size, scale, zero, table, ratio, outliers)

    def marks(self, bits: int, codes: Tensor | None = None) -> Tensor:
        """Where codes stand at one width, in steps from the middle: (out, in) float32, fresh memory.

        codes: (out, in) uint8 of the widest width in place of its own.
        """
        code = (self.codes if codes is None else codes) >> (self.bits[-1] - bits)
        if bits in self.table:
            return look_up(self.table[bits], code).to(torch.float32).sub_(LEVEL_MIDDLE)
        return code.to(torch.float32).sub_((2**bits - 1) / 2)

    def dequantize(self, bits: int) -> Tensor:
        """Return the (out, in) float32 matrix at one width: scale * (c_b - (2**b - 1) / 2 - zero).

        Where the width has a table: scale * (table[c_b] - 63.5 - zero). Outliers are added to that.
        """
        mark = self.marks(bits)
        out, columns = mark.shape
        scale, zero = self.grid(bits)
        groups = scale.shape[1]
        size = columns if self.group_size == -1 else self.group_size
        whole = pad(mark, (0, groups * size - columns)).view(out, groups, size)
        if zero is not None:
            whole = whole.sub_(zero[..., None])
        whole = whole.mul_(scale[..., None])
        dense = whole.view(out, groups * size)[:, :columns].contiguous()
        return dense if self.outliers is None else self.outliers.added(dense)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return table[n, codes[n, k]]: (out, in), in the dtype of `table`, which is (out, levels). codes: (out, in) uint8."""
    found = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    rows = max(1, _CHUNK // codes.shape[1])
    for at in range(0, len(codes), rows):
        part = slice(at, at + rows)
        torch.gather(table[part], 1, codes[part].to(torch.int64), out=found[part])
    return found
