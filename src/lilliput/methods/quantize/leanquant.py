"""LeanQuant: grids learnt so that the weights whose rounding costs most stand near a level, then the sweep of GPTQ.

Source: Zhang and Shrivastava, "LeanQuant: Accurate and Scalable Large Language Model Quantization with Loss-error-aware
Grid", ICLR 2025: importance U_ii^-p of a column (section 3.1), weighted k-means a row (3.2), ranges drawn in (3.3).
Deviation: dampings, exponents and starts are tried, and every row keeps what serves its outputs best after the sweep; ranges are
searched coarse to fine and by group; uneven levels are those of numerics/codebooks.py, one table a row over grids a group
of its own; a ladder's narrower tables are the parents of its wider ones. The paper searches at one width a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods.base import ENDS
from lilliput.methods.swept import Swept
from lilliput.numerics import codebooks
from lilliput.numerics.clusters import Init, Runs, lloyd, sort, start
from lilliput.numerics.grids import grouped, minmax_grid
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import LEVEL_BITS, TABLE_BITS


@dataclass(frozen=True, kw_only=True)
class LeanQuant(Swept):
    """Learn grids by the cost of each column, then round column by column with feedback at all of `bits` together.

    nonuniform: levels from a table a row, not evenly spaced, for widths up to 4. exponents: p of the importance U_ii^-p;
    0 counts all columns alike, 2 by the loss of the sweep. starts: where the k-means of tables begins. A row keeps the
    damping, exponent and start that serve it best. damps: dampings to try beside `damp`. search: draw ranges in; without it, and with exponents [0], this is
    GPTQ without `clip`.
    """

    nonuniform: bool = False
    damps: tuple[float, ...] = (0.001,)
    exponents: tuple[float, ...] = (2.0, 3.0)
    starts: tuple[Init, ...] = ("quantile", "tree")
    search: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponents or not all(0 <= p <= 8 for p in self.exponents):
            what = f"exponents is {list(self.exponents)}, not numbers within 0..8"
            raise ConfigError(what, where=f"{self.name}.exponents", fix="Give some such as [2, 3]")
        if not all(damp >= 0 for damp in self.damps):
            what = f"damps is {list(self.damps)}"
            raise ConfigError(what, where=f"{self.name}.damps", fix="Give numbers of 0 or more, or [] for damp alone")
        if self.nonuniform and not self.starts:
            raise ConfigError("starts is empty", where=f"{self.name}.starts", fix="Give some of quantile, even, tree")
        if self.nonuniform and self.bits[-1] > TABLE_BITS:
            # Levels of 8 bits are even, so a ladder that goes there cannot have uneven cells: they would not be nested.
            what = f"nonuniform with bits {list(self.bits)}, but tables end at {TABLE_BITS} bits"
            raise ConfigError(
                what, where=f"{self.name}.bits", fix="Give widths such as [2, 3, 4], or nonuniform: false"
            )

    @property
    def tables(self) -> tuple[int, ...]:
        """All of `bits` when the levels are uneven."""
        return self.bits if self.nonuniform else ()

    def at(self, name: str) -> Self:
        """The configuration for the layer of that name; ends that go beyond 4 bits have even levels."""
        own = self.ladder(name)
        uneven = self.nonuniform and (name not in ENDS or own[-1] <= TABLE_BITS)
        return replace(self, bits=own, end_bits=(), layer_bits={}, nonuniform=uneven)

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Sweep one matrix; see `LayerMethod.solve`. Without a statistic grids are learnt with equal columns, not swept.

        Raises ConfigError for a step beyond float16.
        """
        if stat is None:
            return next(self._grids(weight, torch.ones(weight.shape[1])))
        factors = [self.factor(stat, damp) for damp in (self.damp, *self.damps)]
        tries = [(f, [grid for p in self.exponents for grid in self._grids(weight, f.importance(p))]) for f in factors]
        return self.swept(weight, stat, tries)

    def _grids(self, weight: Tensor, importance: Tensor) -> Iterator[Quantized]:
        """Grids to sweep on, with the codes of the nearest levels."""
        if self.nonuniform:
            for init in self.starts:
                yield _uneven(weight, self.bits, self.group_size, self.sym, importance, init)
            return
        yield self.even(weight, importance, search=self.search)


def _uneven(
    weight: Tensor, bits: tuple[int, ...], group_size: int, sym: bool, importance: Tensor, init: Init, rows: int = 256
) -> Quantized:
    """Tables from k-means at the narrowest width, each cluster cut in two for the widths above; codes of the nearest."""
    scale, zero = minmax_grid(weight, LEVEL_BITS, group_size, sym)
    tables: dict[int, list[Tensor]] = {b: [] for b in bits}
    for at in range(0, len(weight), rows):
        part = slice(at, at + rows)
        zero_part = None if zero is None else zero[part]
        places = codebooks.positions(weight[part], scale[part], zero_part, group_size)
        # A step of a group is worth its scale, so the square of it weighs the groups of a row against each other.
        step = torch.ones_like(weight[part])
        step = grouped(step, group_size)[0] * scale[part].to(torch.float32)[..., None]
        step = step.flatten(1)[:, : weight.shape[1]]
        step = step / step.amax(1, keepdim=True).clamp_min(1e-30)
        runs = Runs(*sort(places, importance * step.square()))
        borders = lloyd(runs, start(runs, 2 ** bits[0], init))
        width = bits[0]
        for b in bits:
            while width < b:
                borders, width = runs.split(borders), width + 1
            tables[b].append(codebooks.round_table(runs.means(borders)))
    table = {b: torch.cat(parts) for b, parts in tables.items()}
    codes = codebooks.encode(weight, table[bits[-1]], scale, zero, group_size)
    zeros = {} if zero is None else dict.fromkeys(bits, zero)
    return Quantized(codes, bits, group_size, dict.fromkeys(bits, scale), zeros, table)
