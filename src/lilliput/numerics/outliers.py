"""A few weights of a matrix in half precision, beside its codes (needs torch).

Source: Kim et al., "SqueezeLLM", ICML 2024, section 4.2 (dense and sparse decomposition); Dettmers et al., "SpQR", 2023.
Deviation: what is kept is the part of a weight that its code does not reach, not the weight, so that a reader adds and
never replaces, and the same few numbers serve all widths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_COLUMNS = (1 << 16) - 1
"""Columns of a matrix that may have some: 16 bits number one, and count a row that is full."""


@dataclass(frozen=True)
class Outliers:
    """What is added to the matrix that codes mean, at every width.

    counts: (out,) int32, how many a row has, below 2**16. columns: (n,) int32, row after row, ascending within one.
    values: (n,) float16, finite.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def at(chosen: Tensor, values: Tensor) -> "Outliers":
        """Keep `values`, (out, in) of any float dtype, where `chosen`, (out, in) bool, is true, as float16."""
        return Outliers(
            chosen.sum(1, dtype=torch.int32), chosen.nonzero()[:, 1].to(torch.int32), values[chosen].to(torch.float16)
        )

    def places(self, width: int) -> Tensor:
        """Where they stand in a matrix of `width` columns laid out row after row: (n,) int64, ascending."""
        row = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts.to(torch.int64))
        return row * width + self.columns

    def added(self, matrix: Tensor) -> Tensor:
        """`matrix`, (out, in) float32 in memory of its own, with these added to it in place."""
        matrix.view(-1)[self.places(matrix.shape[1])] += self.values.to(matrix.dtype)
        return matrix

    def taken_from(self, matrix: Tensor) -> Tensor:
        """What is left of `matrix`, (out, in) float32, without these: a copy."""
        left = matrix.clone(memory_format=torch.contiguous_format)
        left.view(-1)[self.places(matrix.shape[1])] -= self.values.to(matrix.dtype)
        return left

    def rows(self, index: Tensor | slice) -> "Outliers":
        """Those of some rows."""
        counts = self.counts.to(torch.int64)
        ends = counts.cumsum(0)
        picked, end = counts[index], ends[index]
        within = torch.arange(int(picked.sum())) - torch.repeat_interleave(picked.cumsum(0) - picked, picked)
        place = torch.repeat_interleave(end - picked, picked) + within
        return Outliers(self.counts[index], self.columns[place], self.values[place])

    @staticmethod
    def stack(parts: "list[Outliers]") -> "Outliers":
        """Slices of rows put back together."""
        kinds = ([p.counts for p in parts], [p.columns for p in parts], [p.values for p in parts])
        return Outliers(*map(torch.cat, kinds))
