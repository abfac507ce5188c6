"""Non-uniform grids: a row uses some of the 128 levels of an affine grid of 7 bits, named by a table (needs torch).

At width b the levels of row n are scale[n, g] * (table[n, c] - 63.5 - zero[n, g]), c = 0 .. 2**b - 1, with one table of
2**b whole numbers in 0..127, non-decreasing, a row. So a kernel looks a code up in 16 bytes at most and multiplies
what it finds as an integer. Groups have scales of their own and share the row's table: on the grid of 7 bits that spans
each group (`minmax_grid(weight, LEVEL_BITS, ..)`) all of them are cut the same way. Because the grid is affine in its
entries, everything of numerics/grids.py holds for it with 7 bits and table entries in the place of codes.

Rounding a centroid to a 127th of the row's span moves it by at most a 254th of that; the levels of an even grid of 4 bits
stand a 15th apart. A refit of scale and zero afterwards takes up what the rounding did to all of them together.

Source: a table of centroids per row as in Kim et al., "SqueezeLLM", ICML 2024, section 4.1, and Park et al.,
"Any-Precision LLM", ICML 2024, section 3.2.
Deviation: there entries are float16; ours are 7 bits over an affine grid, which keeps inner sums in integers.
"""

import torch
from torch import Tensor

from lilliput.numerics.grids import Refit, grouped, minmax_grid
from lilliput.numerics.nested import Quantized, look_up
from lilliput.numerics.packing import LEVEL_BITS, LEVEL_MIDDLE, TABLE_BITS

_TOP = 2**LEVEL_BITS - 1
_CHUNK = 1 << 22  # weights encoded at once: their int64 codes take 32 MiB


def positions(weight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Where each weight stands among the 128 levels of its group: weight / scale + zero + 63.5, (out, in) float32.

    Whole numbers are levels; nothing is clamped. A scale of zero counts as one.
    """
    out, columns = weight.shape
    step = scale.to(torch.float32)
    full = grouped(weight, group_size)[0] / torch.where(step > 0, step, torch.ones_like(step))[..., None]
    shift = LEVEL_MIDDLE + (zero.to(torch.float32) if zero is not None else torch.zeros_like(step))
    return full.add_(shift[..., None]).view(out, -1)[:, :columns].contiguous()


def round_table(centres: Tensor) -> Tensor:
    """The nearest table: (out, levels) uint8. centres: (out, levels) as `positions` counts, non-decreasing along a row.

    Raises ValueError for centres that go down or are no number, and for more than 2**4 of them a row.
    """
    if centres.shape[1] > 2**TABLE_BITS or not bool((centres[:, 1:] >= centres[:, :-1]).all()) or _undefined(centres):
        raise ValueError(f"centres {tuple(centres.shape)} are not at most {2**TABLE_BITS} a row, finite and in order")
    return centres.round().clamp(0, _TOP).to(torch.uint8)


def encode(weight: Tensor, table: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Codes of the nearest levels: (out, in) uint8. Of two at the same distance the lower code.

    weight: (out, in) float32. table: (out, 2**b) uint8. scale, zero: (out, groups) float16.
    """
    out, columns = weight.shape
    level = table.to(torch.float32)
    between = ((level[:, 1:] + level[:, :-1]) / 2).contiguous()
    codes = torch.empty((out, columns), dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK // columns)
    for at in range(0, out, rows):
        part = slice(at, at + rows)
        own = positions(weight[part], scale[part], None if zero is None else zero[part], group_size)
        codes[part] = torch.searchsorted(between[part], own).to(torch.uint8)
    return codes


def refit(
    weight: Tensor, codes: Tensor, table: Tensor, group_size: int, sym: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Least-squares scale and zero for given codes and table: (out, groups) float16 each; zero is None when `sym`.

    weight, importance: as in `grids.Refit`. codes: (out, in) uint8, cut to the width of `table`.
    """
    return Refit(weight, group_size, importance).grid(look_up(table, codes), LEVEL_BITS, sym)


def even(weight: Tensor, bits: tuple[int, ...], group_size: int, sym: bool) -> Quantized:
    """Round to nearest on even levels, as tables: what `grids.nearest` makes, in the form of a matrix with tables.

    weight: (out, in) float32, finite. bits: ascending, up to 4. The levels of a narrower width stand in the middle of
    their cells, with a scale and a zero refitted.
    """
    scale, zero = minmax_grid(weight, LEVEL_BITS, group_size, sym)
    marks = torch.linspace(0, _TOP, 2 ** bits[-1])
    tables = {b: round_table(marks.view(2**b, -1).mean(1)[None]).expand(len(weight), -1).contiguous() for b in bits}
    codes = encode(weight, tables[bits[-1]], scale, zero, group_size)
    grids = {b: refit(weight, codes >> (bits[-1] - b), tables[b], group_size, sym) for b in bits[:-1]}
    grids[bits[-1]] = (scale, zero)
    zeros = {b: z for b, (_, z) in grids.items() if z is not None}
    return Quantized(codes, bits, group_size, {b: s for b, (s, _) in grids.items()}, zeros, tables)


def _undefined(values: Tensor) -> bool:
    return not bool(torch.isfinite(values).all())
