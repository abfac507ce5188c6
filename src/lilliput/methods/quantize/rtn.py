"""RTN: every weight takes the nearest level of a uniform grid; the baseline that needs no data.

Source: the common baseline, as in Frantar et al., "GPTQ", 2022, section 4 (per row) and its grouped form.
Deviation: with more than one width the codes of the widest are kept and every narrower width is their top bits with its
own refitted scale and zero, or with `shared` a ratio (see numerics/grids.py), so its levels stand at the middle of their
cells. A single width is plain RTN. Symmetric grids have 2**b levels placed evenly around zero (mid-rise), not 2**b - 1
with one at zero: at 2 bits that is a third more levels.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.methods.base import Quantizer, Statistic
from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized


@dataclass(frozen=True, kw_only=True)
class RTN(Quantizer):
    """Round to nearest at each of `bits`, nested; its options are those of every Quantizer."""

    needs: ClassVar[Statistic] = Statistic.NONE

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Round one matrix; see `LayerMethod.solve`. Raises ConfigError for a step beyond float16."""
        return nearest(weight, self.bits, self.group_size, self.sym, self.shared)
