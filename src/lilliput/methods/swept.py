"""What methods share that round column by column with feedback; see numerics/columns.py."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods.base import Quantizer, Statistic
from lilliput.numerics.columns import Factor, learn
from lilliput.numerics.grids import encode, minmax_grid, nest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.ranges import best_range


@dataclass(frozen=True, kw_only=True)
class Swept(Quantizer, ABC):
    """A Quantizer that sweeps the columns at all of `bits` together.

    damp: what is added to the diagonal of the Gram matrix, in means of it. act_order: loudest inputs first. rounds:
    sweeps, each on grids refitted to the codes of the one before; 0 is one sweep without a refit. balance: how the widths
    share the codes, from 0, where the narrowest decides, to 1 and beyond, where each counts in parts of its own error.
    block: columns between two large products.
    """

    needs: ClassVar[Statistic] = Statistic.GRAM
    damp: float = 0.01
    act_order: bool = True
    rounds: int = 2
    balance: float = 0.6
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("damp", 0.0), ("rounds", 0), ("balance", 0.0), ("block", 1)):
            if not getattr(self, key) >= least:
                what = f"{key} is {getattr(self, key)}"
                raise ConfigError(what, where=f"{self.name}.{key}", fix=f"Give {least} or more")

    def factor(self, gram: Tensor, damp: float | None = None) -> Factor:
        """What a sweep needs of the Gram matrix, (in, in) float32. damp: in the place of the option's."""
        return Factor.of(gram, self.damp if damp is None else damp, self.act_order)

    def even(self, weight: Tensor, importance: Tensor, *, search: bool, square: bool = True) -> Quantized:
        """Evenly spaced levels and the codes nearest to the weights, to start a sweep from.

        importance: (in,) float32, of a column's error. search: draw the ends of ranges in; square: try ends apart from
        each other in that, see `best_range`. Raises ConfigError for a step beyond float16.
        """
        if search:
            scale, zero = best_range(weight, self.bits, self.group_size, self.sym, importance, self.balance, square)
        else:
            scale, zero = minmax_grid(weight, self.bits[-1], self.group_size, self.sym)
        codes = encode(weight, scale, zero, self.bits[-1], self.group_size)
        return nest(weight, codes, scale, zero, self.bits, self.group_size, importance, self.shared)

    def swept(self, weight: Tensor, gram: Tensor, tries: Sequence[tuple[Factor, Sequence[Quantized]]]) -> Quantized:
        """Codes and grids swept from each start with its factor, the best of every row."""
        return learn(weight, gram, tries, self.balance, self.rounds, self.block)
