"""What keeps a method from making a layer worse without a word (needs torch).

Source: the layer objective of Frantar et al., "GPTQ", 2022, eq. 1: || (W - Q) X ||^2, which the Gram matrix of the
inputs gives without the inputs: tr((W - Q) G (W - Q)^T).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lilliput.core.errors import InputCorrupt
from lilliput.methods.base import Quantizer
from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Accumulator


def output_errors(weight: Tensor, solved: Quantized, gram: Tensor) -> dict[int, float]:
    """Relative squared error of the layer's output at every width: tr(D G D^T) / tr(W G W^T), D = W - Q.

    weight: (out, in) float32. gram: (in, in) float32, sum of x x^T. 0 where the output is 0 anyway.
    """
    whole = _energy(weight, gram)
    return {b: _energy(weight - solved.dequantize(b), gram) / whole if whole > 0 else 0.0 for b in solved.bits}


def _energy(rows: Tensor, gram: Tensor) -> float:
    return max(0.0, float(torch.sum((rows @ gram) * rows, dtype=torch.float64)))


def safer(
    method: Quantizer, weight: Tensor, solved: Quantized, gram: Tensor
) -> tuple[Quantized, dict[int, float], str]:
    """Return `solved`, or round to nearest where that is nearer on the layer's own inputs; errors by width; a note.

    Nearer: the smaller mean over the widths of the logarithm of the error, so that no width outweighs the others.
    """
    errors = output_errors(weight, solved, gram)
    plain = nearest(weight, method.bits, method.group_size, method.sym, bool(solved.ratio))
    rival = output_errors(weight, plain, gram)
    if not all(map(math.isfinite, errors.values())) or mean_log(errors) > mean_log(rival):
        told = ", ".join(f"{b} bits {errors[b]:.3g} against {rival[b]:.3g}" for b in method.bits)
        return plain, rival, f"{method.name} was worse than rounding to nearest ({told}), which was taken"
    return solved, errors, ""


def mean_log(errors: Mapping[int, float]) -> float:
    """Mean of the logarithms: the score of a ladder, in which no width outweighs the others."""
    return sum(math.log(max(e, 1e-30)) for e in errors.values()) / len(errors)


def remark(name: str, stat: Tensor, total: Accumulator) -> str:
    """A note on a layer's inputs that calibration can say little about, or "".

    Raises InputCorrupt, naming the layer, when they were not finite.
    """
    if not bool(torch.isfinite(stat).all()):
        fix = "Check the model and the calibration text, or leave this layer out of the methods that calibrate"
        raise InputCorrupt("its inputs are NaN or infinite on the calibration text", where=name, fix=fix)
    per_input = stat.diagonal() if stat.dim() == 2 else stat
    notes = []
    if dead := int((per_input == 0).sum()):
        notes.append(f"{dead} of {len(per_input)} inputs are never active")
    if stat.dim() == 2 and total.tokens < len(per_input):
        notes.append(f"{total.tokens} tokens for {len(per_input)} inputs")
    return "; ".join(notes)
