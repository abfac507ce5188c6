"""Wanda: drop the weights whose magnitude times input norm is smallest.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, eq. 1.
Deviation: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods.base import LayerMethod, Statistic


@dataclass(frozen=True, kw_only=True)
class Wanda(LayerMethod):
    """Set the same share of every output row to zero: `sparsity`, in [0, 1)."""

    needs: ClassVar[Statistic] = Statistic.INPUT_NORM
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            what = f"sparsity is {self.sparsity}, outside [0, 1)"
            raise ConfigError(what, where="wanda.sparsity", fix="Give a share such as 0.5, not a percentage")
        if self.embeddings:
            what = "an embedding has no inputs to weigh its columns by"
            raise ConfigError(what, where="wanda.embeddings", fix="Leave it false")

    def solve(self, weight: Tensor, stat: Tensor | None) -> Tensor:
        """Return a pruned copy of one weight matrix.

        weight: (out, in), any float dtype, finite; left as it was.
        stat: (in,), L2 norm of each input feature over the calibration tokens, in the activations' unit.
        Returns (out, in) in weight's dtype, floor(sparsity * in) zeros per row, survivors bit for bit.
        Raises nothing: a bad sparsity fails when the config is built, and shapes are the sweep's promise.
        """
        assert stat is not None, "the sweep gathers what `needs` names"
        count = int(self.sparsity * weight.shape[1])
        score = weight.abs() * stat  # eq. 1: |W_ij| * ||X_j||
        drop = score.topk(count, dim=1, largest=False).indices
        return weight.scatter(1, drop, 0)
