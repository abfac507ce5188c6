"""A model rounded at every edge and in every matrix, and what may be trained of it.

Rounding passes gradients straight through. What is trained are logarithms and shares, so that a rate means the same in
every model: of the scales of pairs, of the reach of rows, of the steps of edges; zeros in halves of their range, and
offsets of roundings in steps of their row.

Source: Tan et al., "MobileQuant", EMNLP Findings 2024, section 3; Shao et al., "OmniQuant", ICLR 2024, eq. 2, for the
clipping of rows; Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2024, eq. 3, for the roundings.
Deviation: logarithms, and zeros relative to their range; edges that usually have 16 bits keep the range that was read
off, since no scale reaches them and their roundings cost nothing that could be measured.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lilliput.core.graph import Grid
from lilliput.methods.base import IntegerMethod, Integers
from lilliput.models.decoder import Block, Decoder
from lilliput.models.encoder import Encoder
from lilliput.models.pairs import Pair, pairs
from lilliput.models.sites import PROBABILITIES, Site, run_block, run_end, run_start, sites
from lilliput.numerics.straight import coded_rows, on_grid, on_rows

REACH = 0.5
"""Steps of its row that training may move a weight before it is rounded: up or down, no farther."""
KEPT = 1 << 28
"""Bytes that all blocks may keep for their gradients; where they would need more, each is run again for them."""


class Student:
    """The rounded model.

    values: every tensor that may be trained, by name; "let/I/K" logarithms of the scales of pair K of block I; "clip/NAME" logits of
    the share of each row's reach, (out, 1), or (out, 2) where rows have zeros; "nudge/NAME" offsets of roundings in steps, (out, in); "step/B" logarithms
    of steps and "zero/B" zeros in halves of the range, one number an edge of B bits.
    """

    def __init__(
        self,
        maker: IntegerMethod,
        model: Decoder | Encoder,
        shares: Mapping[str, Tensor],
        grids: Mapping[str, Grid],
        *,
        scales: bool,
        ranges: bool,
        roundings: bool,
        zeros: bool = False,
    ) -> None:
        """maker: knows the widths. model: float, not changed before `result`. shares: of the reach of rows, as
        `row_grids` takes them, by linear layer; those missing keep all. grids: where edges start. scales, ranges,
        roundings: what there is to train. zeros: the blocks' rows have a zero each; else they are symmetric.
        """
        self.maker, self.spec, self.zeros = maker, model.spec, zeros
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self.base = [_within(state, i) for i in range(model.spec.num_layers)]
        self.ends = {name: value for name, value in state.items() if not name.startswith("layers.")}
        self._float_ends = {name: state[f"{name}.weight"] for name in self.spec.matrices() if "layers." not in name}
        for name, weight in self._float_ends.items():
            self.ends[f"{name}.weight"] = on_rows(weight, 1.0, maker.width(name))
        self.values: dict[str, Tensor] = {}
        self.pairs: list[list[Pair]] = []
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            self.pairs.append(pairs(block) if scales else [])
            for number, pair in enumerate(self.pairs[-1]):
                self.values[f"let/{index}/{number}"] = torch.zeros(pair.width)
        for name, share in shares.items():
            # A share of 1 has no logit, and one near it no gradient.
            self.values[f"clip/{name}"] = torch.logit(share.clamp_max(0.98))
        if roundings:
            for index, tensors in enumerate(self.base):
                for name in self.spec.linears(index):
                    self.values[f"nudge/{name}"] = torch.zeros_like(tensors[local(name)])
        self._place: dict[str, tuple[int, int]] = {}
        for bits in (8, 16):
            own = {name: grid for name, grid in grids.items() if grid.bits == bits}
            self._place |= {name: (bits, i) for i, name in enumerate(own)}
            self.values[f"step/{bits}"] = torch.tensor([g.scale for g in own.values()]).log()
            self.values[f"zero/{bits}"] = torch.tensor([g.zero / 2.0 ** (bits - 1) for g in own.values()])
        usual = sites(self.spec)
        still = {n for n, g in grids.items() if n.endswith(PROBABILITIES) or g.bits == usual[n] == 16}
        self._fixed = {n: g for n, g in grids.items() if not ranges or n in still}

    def tame(self, names: Iterable[str]) -> None:
        """Bring back those of the values named that a step of training has moved out of bounds."""
        for name in names:
            reach = {"zero": 1.0, "nudge": REACH}.get(name.split("/")[0])
            if reach is not None:
                self.values[name].data.clamp_(-reach, reach)

    def floats(self, layer: int) -> dict[str, Tensor]:
        """A block's tensors with the scales of pairs in them, before rounding; by name in the block."""
        now = dict(self.base[layer])
        for number, pair in enumerate(self.pairs[layer]):
            now |= pair.scaled(now, self.values[f"let/{layer}/{number}"].exp())
        return now

    def rounded(self, layer: int) -> dict[str, Tensor]:
        """A block's tensors, the matrices rounded."""
        now = self.floats(layer)
        for name in self.spec.linears(layer):
            key, nudge = local(name), self.values.get(f"nudge/{name}")
            now[key] = on_rows(now[key], self.share(name), self.maker.bits, nudge)
        return now

    def share(self, name: str) -> Tensor | float:
        """Of the reach of a linear layer's rows, what their grids have, as `row_grids` takes it."""
        logit = self.values.get(f"clip/{name}")
        if logit is not None:
            return torch.sigmoid(logit)
        return torch.ones(self.spec.matrices()[name][0], 2) if self.zeros else 1.0

    def site(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `models.sites.Site`."""
        bits, at = self._place[name]
        if bits == 16 and name in self._fixed and torch.is_grad_enabled():
            return x  # nothing to learn, and nothing to learn from
        step, zero = self.values[f"step/{bits}"][at].exp(), self.values[f"zero/{bits}"][at] * 2 ** (bits - 1)
        if name in self._fixed:
            step, zero = step.detach(), zero.detach()
        return on_grid(x, step, zero, bits)

    def block(self, layer: int, x: Tensor, site: Site | None = None) -> Tensor:
        """What a block puts out; see `run_block`. With gradients it is run again for them, but see `KEPT`."""
        use = site or self.site

        def run(x: Tensor) -> Tensor:
            return run_block(self.spec, layer, self.rounded(layer), x, use)

        if not torch.is_grad_enabled() or self._keeps(*x.shape[:2]) <= KEPT:
            return run(x)
        out: Tensor = checkpoint(run, x, use_reentrant=False)
        return out

    def _keeps(self, batch: int, length: int) -> int:
        """About how many bytes all blocks keep for their gradients."""
        spec = self.spec
        weights = sum(out * columns for out, columns in spec.linears(0).values())
        token = 20 * spec.hidden_size + 16 * spec.intermediate_size + 6 * spec.num_heads * length
        return 4 * spec.num_layers * (batch * length * token + 6 * weights)

    def hidden(self, tokens: Tensor, site: Site | None = None) -> Tensor:
        """States behind the last block."""
        hidden = run_start(self.spec, self.ends, tokens, site or self.site)
        for layer in range(self.spec.num_layers):
            hidden = self.block(layer, hidden, site)
        return hidden

    def logits(self, hidden: Tensor, site: Site | None = None) -> Tensor:
        """Logits of states behind the last block, or vectors."""
        return run_end(self.spec, self.ends, hidden, site or self.site)

    @torch.no_grad()
    def result(self, model: Decoder | Encoder, record: Mapping[str, Any]) -> Integers:
        """What training came to, its float tensors put into `model`."""
        codes = {n: coded_rows(w, 1.0, self.maker.width(n)) for n, w in self._float_ends.items()}
        for layer in range(self.spec.num_layers):
            now = self.floats(layer)
            for name in self.spec.linears(layer):
                nudge = self.values.get(f"nudge/{name}")
                codes[name] = coded_rows(now[local(name)], self.share(name), self.maker.bits, nudge)
            for name, value in now.items():
                model.get_parameter(f"layers.{layer}.{name}").data.copy_(value)
        order = {name: codes[name] for name in self.spec.matrices()}
        return Integers(model, order, self.grids(), record)

    def grids(self) -> dict[str, Grid]:
        """The grid of every edge."""
        found = {}
        for name, (bits, at) in self._place.items():
            top = 2 ** (bits - 1)
            zero = round(float(self.values[f"zero/{bits}"][at]) * top)
            scale = float(self.values[f"step/{bits}"][at].exp())
            found[name] = self._fixed.get(name) or Grid(
                bits=8 if bits == 8 else 16, scale=scale, zero=max(-top, min(top - 1, zero))
            )
        return found


def local(name: str) -> str:
    """A linear layer's weight by its name in the block."""
    return f"{name.split('.', 2)[2]}.weight"


def _within(state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    at = f"layers.{layer}."
    return {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}
