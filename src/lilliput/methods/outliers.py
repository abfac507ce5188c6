"""Weights that a narrow grid would be drawn out for, kept in half precision beside the codes (needs torch).

A matrix W is parted into S + E: S has a few numbers, in the places of the weights that an ordinary grid of the narrowest
width costs most, and E, what is left, has a level of that grid there. The method that makes the codes is given E in the
place of W, with the same statistic, so whatever it minimises for E it minimises for W; every width then adds S.

Source: Kim et al., "SqueezeLLM", ICML 2024, section 4.2 (dense and sparse decomposition); Dettmers et al., "SpQR", 2023.
Deviation: the choice is by the squared error on grids that are fitted to what is left over, and takes turns with them, so
that it finds what stands out of a group and not what is large in the matrix; an outlier's place has a level, not zero, so
that its code errs little; one choice serves all widths. Errors are not weighted by the inputs where codes are made with
feedback, which makes up for them: weighted ones lose (docs/decisions/0007).
"""

from dataclasses import replace

import torch
from torch import Tensor

from lilliput.methods.base import LayerMethod, Quantizer, Statistic
from lilliput.numerics.grids import Refit, encode, grouped, minmax_grid
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import Outliers

ROUNDS, TURNS = 3, 6
"""Times the outliers are chosen, and turns of codes and grids before each; more change nothing that is seen."""
_LARGEST = 65504.0


def solve(method: LayerMethod, weight: Tensor, stat: Tensor | None) -> Tensor | Quantized:
    """Return what should stand in a weight's place, as `LayerMethod.solve`, with the outliers that the method is asked for."""
    if not isinstance(method, Quantizer) or not method.kept(*weight.shape):
        return method.solve(weight, stat)
    outliers = choose(method, weight, stat if method.needs is Statistic.FISHER else None)
    return replace(method.solve(outliers.taken_from(weight), stat), outliers=outliers)


def choose(method: Quantizer, weight: Tensor, counts: Tensor | None) -> Outliers:
    """The `method.kept` outliers of `weight`, (out, in) float32.

    counts: (out, in) float32, what the squared error of each weight counts; None for all alike. The same weights are
    chosen whatever the widths beyond the narrowest.
    """
    chosen, made = torch.zeros_like(weight, dtype=torch.bool), _middles(weight, method.group_size)
    for _ in range(ROUNDS):
        cost = (weight - made).square_()
        most = (cost if counts is None else cost.mul_(counts)).flatten().topk(method.kept(*weight.shape)).indices
        chosen.zero_().view(-1)[most] = True
        made = _coded(method, weight, torch.where(chosen, made, weight), counts)
    return Outliers.at(chosen, (weight - made).clamp_(-_LARGEST, _LARGEST))


def _middles(weight: Tensor, group_size: int) -> Tensor:
    """The mean of each group in all its places. A first grid would span the outliers and give them levels of their own."""
    full, mask = grouped(weight, group_size)
    mean = full.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return mean.expand_as(full).reshape(len(weight), -1)[:, : weight.shape[1]]


def _coded(method: Quantizer, weight: Tensor, rest: Tensor, counts: Tensor | None) -> Tensor:
    """The levels nearest to `weight` on grids of the narrowest width that are fitted to `rest`, from its ends on."""
    bits, size = method.bits[0], method.group_size
    scale, zero = minmax_grid(rest, bits, size, method.sym)
    fit = Refit(rest, size, counts)
    for _ in range(TURNS):
        scale, zero = fit.grid(encode(rest, scale, zero, bits, size), bits, method.sym)
    codes = encode(weight, scale, zero, bits, size)
    return Quantized(codes, (bits,), size, {bits: scale}, {} if zero is None else {bits: zero}).dequantize(bits)
