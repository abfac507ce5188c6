"""The simplest IntegerMethod: matrices rounded row by row, ranges as they were seen on the first calibration rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lilliput.core.graph import Grid
from lilliput.methods.base import IntegerMethod, Integers
from lilliput.models.sites import site_policy
from support.integers import observed, row_codes

ROWS = 4


@dataclass(frozen=True, kw_only=True)
class MinMax(IntegerMethod):
    """drop: a site to leave without a range. wide: bits of every activation are 16."""

    drop: str = ""
    wide: bool = False

    def make(self, model: Any, batches: Any, folder: Path, progress: Any) -> Integers:
        """See IntegerMethod."""
        state: dict[str, Tensor] = model.state_dict()
        codes = {name: row_codes(state[f"{name}.weight"], self.width(name)) for name in model.spec.matrices()}
        policy = site_policy(model.spec, {"*": 16} if self.wide else {})
        grids: dict[str, Grid] = {}
        for row in [row for batch in batches for row in batch][:ROWS]:
            for name, grid in observed(model, np.asarray(row, np.int64), policy).items():
                grids[name] = _union(grids.get(name, grid), grid)
        grids.pop(self.drop, None)
        return Integers(model, codes, grids, {"rows": ROWS})


def _union(a: Grid, b: Grid) -> Grid:
    from support.integers import span

    ends = [[g.scale * (end - g.zero) for end in (g.low, g.high)] for g in (a, b)]
    return span(min(e[0] for e in ends), max(e[1] for e in ends), a.bits)
