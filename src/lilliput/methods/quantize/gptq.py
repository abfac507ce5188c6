"""GPTQ: weights rounded one input at a time, the inputs still to come making up for the error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
algorithm 1, with the order by activation and the groups fixed beforehand of the authors' later work.
Deviation: all widths of a ladder are swept together, each with its own compensated weights (see numerics/columns.py); the
ends of a group's range are searched for, and grids are refitted to the codes under the Gram matrix and swept again. One
width with `clip: false` and `rounds: 0` is the method of the paper.
"""

from dataclasses import dataclass

from torch import Tensor

from lilliput.methods.swept import Swept
from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized


@dataclass(frozen=True, kw_only=True)
class GPTQ(Swept):
    """Round column by column with feedback at all of `bits` together. clip: search for the range of each group."""

    clip: bool = True

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Sweep one matrix; see `LayerMethod.solve`. Without a statistic it rounds to nearest.

        Raises ConfigError for a step beyond float16.
        """
        if stat is None:
            return nearest(weight, self.bits, self.group_size, self.sym, self.shared)
        start = self.even(weight, stat.diagonal(), search=self.clip, square=False)
        return self.swept(weight, stat, [(self.factor(stat), [start])])
