"""An integer model computed in float: every edge rounded to its grid, every matrix as its codes mean.

Differs from the integers by roundings of halves and of factors, at most a code at an edge; it has gradients, and it needs no
graph. What a model is worth is said by the oracle.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput.core.graph import Grid
from lilliput.models.sites import Site, run_block, run_end, run_start
from lilliput.numerics.nested import Quantized
from lilliput.numerics.straight import on_grid

if TYPE_CHECKING:
    from lilliput.models.decoder import Decoder
    from lilliput.models.encoder import Encoder


class Rounding:
    """A Site of fixed grids."""

    def __init__(self, grids: Mapping[str, Grid]) -> None:
        self._grids = {n: (torch.tensor(g.scale), torch.tensor(float(g.zero)), g.bits) for n, g in grids.items()}

    def __call__(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `models.sites.Site`."""
        grid = self._grids.get(name)
        return x if grid is None else on_grid(x, *grid)


class Simulation:
    """A runner of an integer model in float32: `logits` as `measure.quality.Runner` asks for, of an encoder `run`.

    model: the float tensors. codes: matrices by canonical name; those missing stay float. grids: by edge.
    """

    def __init__(self, model: "Decoder | Encoder", codes: Mapping[str, Quantized], grids: Mapping[str, Grid]) -> None:
        self.spec = model.spec
        self._site = Rounding(grids)
        self._tensors = {name: value.detach().float() for name, value in model.state_dict().items()}
        self._tensors |= {f"{name}.weight": q.dequantize(q.bits[-1]) for name, q in codes.items()}
        self._blocks = [
            {n.removeprefix(at): t for n, t in self._tensors.items() if n.startswith(at)}
            for at in (f"layers.{i}." for i in range(self.spec.num_layers))
        ]

    @torch.no_grad()
    def run(self, tokens: Tensor, site: Site | None = None) -> Tensor:
        """(batch, length) ids to (batch, length, vocab) logits, or with an encoder, which is given texts of one length
        without padding, to (batch, embedding_size) vectors. site: instead of the grids."""
        site = site or self._site
        return run_end(self.spec, self._tensors, self.states(tokens, site), site)

    @torch.no_grad()
    def states(self, tokens: Tensor, site: Site | None = None) -> Tensor:
        """(batch, length) ids to the states behind the last block, (batch, length, hidden)."""
        site = site or self._site
        hidden = run_start(self.spec, self._tensors, tokens, site)
        for layer, tensors in enumerate(self._blocks):
            hidden = run_block(self.spec, layer, tensors, hidden, site)
        return hidden

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """(length,) token ids to (length, vocab) float32; there is one width, whatever `bits` says."""
        found: npt.NDArray[np.float32] = self.run(torch.from_numpy(np.asarray(tokens, np.int64))[None])[0].numpy()
        return found
