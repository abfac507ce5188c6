"""AWQ: scale up the weights that read loud inputs, so that rounding hurts them less, and cut ranges where that helps.

For every pair of the block a grid of exponents r is tried, with s_j = (mean |x_j|)^r: the columns of the reading layers are
multiplied by s, rounded, and divided by s again, and what the whole attention or MLP then puts out is compared with
what it put out before. The best s is folded. r = 0, no scaling, is one of the candidates.

The clip search comes after: for every group of a layer, except in q and k, the largest size its weights may have is shrunk
while the group's share of the output errs less for it. The weights are clamped in place, so here the float output does
change: what is clamped is meant to be rounded at once.

Source: Lin et al., "AWQ", MLSys 2024, section 3.2, eqs. 4 and 5; the clip search is in the authors' code.
Deviation: o_proj is scaled in grouped attention too; for a ladder of widths the score is the mean logarithm of their
errors; a layer's clipping is kept only where the output of the whole layer gains by it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.func import functional_call

from lilliput.core.errors import ConfigError
from lilliput.methods.base import BlockData, BlockMethod, Quantizer
from lilliput.methods.calibration import evenly, inputs_of, linear, sample
from lilliput.methods.safety import mean_log, output_errors
from lilliput.models.decoder import Block
from lilliput.models.pairs import Pair, pairs
from lilliput.numerics.grids import grouped, nearest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import serving_width

_SHRINKS = 10
_CLIP_TOKENS = 512
_QUIET = 1e-3
"""Inputs quieter than this share of the average count as that loud, so that a dead one does not stretch the scales."""


@dataclass(frozen=True, kw_only=True)
class AWQ(BlockMethod):
    """Scale and clip weights by how loud their inputs are.

    ratios: exponents to try, evenly from 0 to below 1. clip: search ranges as well. at_bits: the width to do best at;
    0 for all that the following quantizer serves. samples, length: rows of the calibration text, and tokens of each, to judge by.
    """

    ratios: int = 20
    clip: bool = True
    at_bits: int = 0
    samples: int = 8
    length: int = 128

    def __post_init__(self) -> None:
        for key, least in (("ratios", 1), ("at_bits", 0), ("samples", 1), ("length", 1)):
            if (value := getattr(self, key)) < least:
                raise ConfigError(f"{key} is {value}", where=f"awq.{key}", fix=f"Give at least {least}")

    @torch.no_grad()
    def apply(self, block: Block, data: BlockData, after: Mapping[str, Quantizer]) -> str:
        """Fold the best scales, then clip; see `BlockMethod.apply`."""
        prefix = f"layers.{block.layer}."
        grids = {name.removeprefix(prefix): grid for name, grid in after.items() if self._treats(name)}
        if not grids:
            return ""
        names = [name.removeprefix(prefix) for name in block.linears()]
        inputs = inputs_of(block, names, sample(data, self.samples, self.length))
        told = []
        for pair in self._todo(block, grids):
            x = inputs[pair.multiplied[0]]
            ratio, scale = self._best(block, pair, x, grids)
            if ratio:
                pair.fold(block, scale)
                inputs |= dict.fromkeys(pair.multiplied, x / scale[pair.columns])
            told.append(f"{pair.divided} {ratio:.3g}")
        clipped = 0
        for name, grid in grids.items() if self.clip else ():
            # What clipping would draw in, outliers keep as it is.
            if not name.endswith(("q_proj", "k_proj")) and not grid.outliers:
                clipped += self._clip(linear(block, name), inputs[name].flatten(0, -2), grid)
        ends = [f"ratio: {', '.join(told)}"] if told else []
        return "; ".join(ends + ([f"{clipped} layers clipped"] if clipped else []))

    def _treats(self, name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _todo(self, block: Block, grids: Mapping[str, Quantizer]) -> Iterator[Pair]:
        for pair in pairs(block):
            changed = (pair.divided, *pair.multiplied)
            free = all(self._treats(f"layers.{block.layer}.{name}") for name in changed)
            if pair.kind != "query_key" and free and any(name in grids for name in pair.multiplied):
                yield pair

    def _widths(self, bits: set[int]) -> list[int]:
        return [self.at_bits] if self.at_bits else sorted(bits)

    def _best(self, block: Block, pair: Pair, x: Tensor, grids: Mapping[str, Quantizer]) -> tuple[float, Tensor]:
        """The exponent with the least error, and its scales (width,). x: (samples, length, in), what the pair's readers see."""
        loud = pair.mean(x.abs().mean((0, 1)))
        loud = loud.clamp_min(_QUIET * float(loud.mean())).clamp_min(1e-30)
        weights = {name: linear(block, name).weight.detach() for name in pair.multiplied}
        exact = _output(block, pair, weights, x)
        energy = max(float(exact.square().mean()), 1e-30)
        widths = self._widths({b for n in weights if n in grids for b in grids[n].bits})
        best, least, chosen = 0.0, float("inf"), torch.ones(pair.width)
        for step in range(self.ratios):
            scale = loud ** (step / self.ratios)
            scale = scale / (scale.max() * scale.min()).sqrt()
            columns = scale[pair.columns]
            made = {n: _round(w * columns, grids[n]) for n, w in weights.items() if n in grids}
            errors = {}
            for width in widths:
                now = {
                    n: made[n].dequantize(made[n].serving(width)) / columns if n in made else w
                    for n, w in weights.items()
                }
                errors[width] = float((_output(block, pair, now, x) - exact).square().mean()) / energy
            if (score := mean_log(errors)) < least:
                best, least, chosen = step / self.ratios, score, scale
        return best, chosen

    def _clip(self, layer: torch.nn.Linear, x: Tensor, grid: Quantizer) -> bool:
        """Clamp the weights of a layer where its output errs less for it; say whether any were. x: (tokens, in)."""
        weight = layer.weight.detach()
        x = x[evenly(len(x), _CLIP_TOKENS)]
        widths = {serving_width(grid.bits, b) for b in self._widths(set(grid.bits))}
        inputs, mask = grouped(x, grid.group_size)
        grams = torch.einsum("tgs,tgr->gsr", inputs, inputs)
        full = grouped(weight, grid.group_size)[0]
        peak = full.abs().amax(-1, keepdim=True)
        best = torch.ones_like(peak)
        least = torch.full(peak.shape[:2], torch.inf)
        for step in range(_SHRINKS):
            share = 1 - step / (2 * _SHRINKS)
            now = _flat(torch.clamp(full, -share * peak, share * peak), weight)
            made, score = _round(now, grid), torch.zeros(peak.shape[:2])
            for width in widths:
                off = grouped(made.dequantize(width) - weight, grid.group_size)[0] * mask
                error = (torch.einsum("ogs,gsr->ogr", off, grams) * off).sum(-1)
                score += torch.log(error.clamp_min(1e-30))
            better = score < least
            least = torch.where(better, score, least)
            best = torch.where(better[..., None], torch.full_like(best, share), best)
        clipped = _flat(torch.clamp(full, -best * peak, best * peak), weight)
        gram = x.T @ x
        found, plain = (output_errors(weight, _round(w, grid), gram) for w in (clipped, weight))
        if mean_log({b: found[b] for b in widths}) >= mean_log({b: plain[b] for b in widths}):
            return False
        layer.weight.data.copy_(clipped)
        return True


def _round(weight: Tensor, grid: Quantizer) -> Quantized:
    return nearest(weight, grid.bits, grid.group_size, grid.sym, grid.shared)


def _flat(full: Tensor, like: Tensor) -> Tensor:
    """(out, groups, size) back to the (out, in) of `like`."""
    return full.reshape(len(like), -1)[:, : like.shape[1]].contiguous()


def _output(block: Block, pair: Pair, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the modules behind a pair make of x with these weights: behind a norm attention, MLP or their sum."""
    if pair.kind != "norm":
        (name,) = pair.multiplied
        return x @ weights[name].T
    parts = {name.partition(".")[0] for name in weights}
    total = torch.zeros(())
    for part in sorted(parts):
        own = {f"{n.partition('.')[2]}.weight": w for n, w in weights.items() if n.startswith(f"{part}.")}
        total = total + functional_call(block.get_submodule(part), own, (x,))
    return total
