"""SmoothQuant: move the outliers of activations into the weights before both are rounded to 8 bits.

Input j of the layers that read one norm is divided by s_j, and their columns are multiplied by it. The norm takes the
division up, so nothing is left to do at run time.

Source: Xiao et al., "SmoothQuant", ICML 2023, eqs. 3 and 4: s_j = max |X_j|^alpha / max |W_j|^(1 - alpha).
Deviation: alpha is searched for every pair, by the error of the output with both sides rounded to 8 bits, and no scaling
at all is among the candidates; pairs other than norms may be asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods.base import BlockData, BlockMethod, Quantizer
from lilliput.methods.calibration import inputs_of, linear, peaks_of, sample
from lilliput.models.decoder import Block
from lilliput.models.pairs import Pair, pairs, smoothing
from lilliput.numerics.grids import nearest
from lilliput.numerics.observers import rounded_per_token

_KINDS = ("norm", "value", "inner")


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(BlockMethod):
    """Share the outliers between activations and weights.

    alphas: how much of them the weights take, each in [0, 1]; one value is used for every pair, of several the best
    of each pair or none. kinds: the pairs to treat, of "norm", "value" and "inner". samples, length: rows of the calibration
    text, and tokens of each, that candidates are judged by; peaks are those of the whole text.
    """

    alphas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    kinds: tuple[str, ...] = ("norm",)
    samples: int = 8
    length: int = 128

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= a <= 1 for a in self.alphas):
            what = f"alphas is {list(self.alphas)}, not shares in [0, 1]"
            raise ConfigError(what, where="smoothquant.alphas", fix="Give one or several, such as [0.5]")
        if not self.kinds or not set(self.kinds) <= set(_KINDS):
            what = f"kinds is {list(self.kinds)}"
            raise ConfigError(what, where="smoothquant.kinds", fix=f"Give some of {', '.join(_KINDS)}")
        if self.samples < 1 or self.length < 1:
            what = f"samples is {self.samples} and length {self.length}"
            raise ConfigError(what, where="smoothquant", fix="Give at least 1 of each")

    @torch.no_grad()
    def apply(self, block: Block, data: BlockData, after: Mapping[str, Quantizer]) -> str:
        """Fold the scales of every pair that has a layer to be quantized; see `BlockMethod.apply`."""
        todo = list(self._todo(block, after))
        if not todo:
            return ""
        names = sorted({name for pair in todo for name in pair.multiplied})
        peaks = peaks_of(block, names, data)
        inputs = inputs_of(block, names, sample(data, self.samples, self.length))
        told = []
        for pair in todo:
            grids = [after.get(f"layers.{block.layer}.{name}") for name in pair.multiplied]
            weights = [linear(block, name).weight.detach() for name in pair.multiplied]
            scales = {alpha: smoothing(pair, peaks[pair.multiplied[0]], weights, alpha) for alpha in self.alphas}
            alpha: float | None = self.alphas[0]
            if len(self.alphas) > 1:
                x = inputs[pair.multiplied[0]]
                errors = {a: _error(x, weights, s[pair.columns], grids) for a, s in scales.items()}
                least = min(self.alphas, key=errors.__getitem__)
                alpha = least if errors[least] < _error(x, weights, torch.ones(x.shape[-1]), grids) else None
            if alpha is not None:
                pair.fold(block, scales[alpha])
            told.append(f"{pair.divided} {'none' if alpha is None else f'{alpha:g}'}")
        return f"alpha: {', '.join(told)}"

    def _todo(self, block: Block, after: Mapping[str, Quantizer]) -> Iterator[Pair]:
        for pair in pairs(block):
            prefix = f"layers.{block.layer}."
            kept = any(fnmatchcase(prefix + n, p) for n in (pair.divided, *pair.multiplied) for p in self.exclude)
            if pair.kind in self.kinds and any(prefix + n in after for n in pair.multiplied) and not kept:
                yield pair


def _error(x: Tensor, weights: list[Tensor], columns: Tensor, grids: list[Quantizer | None]) -> float:
    """Squared error of the outputs with x / columns and w * columns rounded to 8 bits. Layers that stay float are left out."""
    rounded, total = rounded_per_token(x / columns), 0.0
    for weight, grid in zip(weights, grids, strict=True):
        if grid is not None:
            made = nearest(weight * columns, (8,), grid.group_size, grid.sym).dequantize(8)
            total += float((rounded @ made.T - x @ weight.T).square().mean())
    return total
