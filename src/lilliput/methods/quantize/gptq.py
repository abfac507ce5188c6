"""GPTQ: weights rounded one input at a time, the inputs still to come making up for the error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
algorithm 1, with the order by activation and the groups fixed beforehand of the authors' later work.
Deviation: all widths of a ladder are swept together, each with its own compensated weights (see numerics/columns.py); the
ends of a group's range are searched for, and grids are refitted to the codes under the Gram matrix and swept again. One
width with `clip: false` and `rounds: 0` is the method of the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods.base import Quantizer, Statistic
from lilliput.numerics.columns import Factor, learn
from lilliput.numerics.grids import encode, minmax_grid, nearest, nest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.ranges import best_range


@dataclass(frozen=True, kw_only=True)
class GPTQ(Quantizer):
    """Round column by column with feedback at all of `bits` together.

    damp: what is added to the diagonal of the Gram matrix, in means of it. act_order: loudest inputs first. clip: search
    for the range of each group. rounds: sweeps, each on grids refitted to the codes of the one before; 0 is one sweep
    without a refit. balance: how the widths share the codes, from 0, where the narrowest decides, to 1 and beyond, where
    each counts in parts of its own error. block: columns between two large products.
    """

    needs: ClassVar[Statistic] = Statistic.GRAM
    damp: float = 0.01
    act_order: bool = True
    clip: bool = True
    rounds: int = 2
    balance: float = 0.6
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("damp", 0.0), ("rounds", 0), ("balance", 0.0), ("block", 1)):
            if not getattr(self, key) >= least:
                what = f"{key} is {getattr(self, key)}"
                raise ConfigError(what, where=f"{self.name}.{key}", fix=f"Give {least} or more")

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Sweep one matrix; see `LayerMethod.solve`. Without a statistic it rounds to nearest.

        Raises ConfigError for a step beyond float16.
        """
        if stat is None:
            return nearest(weight, self.bits, self.group_size, self.sym)
        factor = Factor.of(stat, self.damp, self.act_order)
        loud = stat.diagonal()
        if self.clip:
            scale, zero = best_range(weight, self.bits, self.group_size, self.sym, loud, self.balance, square=False)
        else:
            scale, zero = minmax_grid(weight, self.bits[-1], self.group_size, self.sym)
        codes = encode(weight, scale, zero, self.bits[-1], self.group_size)
        start = nest(weight, codes, scale, zero, self.bits, self.group_size, loud)
        return learn(weight, stat, factor, [start], self.balance, self.rounds, self.block)
