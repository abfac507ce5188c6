"""What keeps a method from making a layer worse without a word (needs torch).

Source: the layer objective of Frantar et al., "GPTQ", 2022, eq. 1: || (W - Q) X ||^2, which the Gram matrix of the
inputs gives without the inputs: tr((W - Q) G (W - Q)^T).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lilliput.core.errors import InputCorrupt
from lilliput.methods.base import Quantizer, Statistic
from lilliput.numerics.codebooks import even
from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Accumulator

_FIX = "Check the model and the calibration text, or leave this layer out of the methods that calibrate"


def output_errors(weight: Tensor, solved: Quantized, stat: Tensor, *, single: bool = False) -> dict[int, float]:
    """Relative squared error at every width: of the layer's output, tr(D G D^T) / tr(W G W^T), D = W - Q.

    weight: (out, in) float32. stat: (in, in) float32, G, sum of x x^T; where `single`, (out, in) float32, what each
    weight's own error counts, and the error is sum(F D^2) / sum(F W^2). 0 where there is nothing to err in; NaN where
    one of these is.
    """
    whole = energy(weight, stat, single=single)
    left = {b: energy(weight - solved.dequantize(b), stat, single=single) for b in solved.bits}
    return {b: 0.0 if whole == 0 else one / whole for b, one in left.items()}


def energy(rows: Tensor, stat: Tensor, *, single: bool = False) -> float:
    """tr(R G R^T), or sum(F R^2) where `single`; see `output_errors`. NaN stays NaN: it is not a small error."""
    felt = rows * stat if single else rows @ stat
    found = float(torch.sum(felt * rows, dtype=torch.float64))
    return 0.0 if found < 0 else found


def safer(
    method: Quantizer, weight: Tensor, solved: Quantized, stat: Tensor
) -> tuple[Quantized, dict[int, float], str]:
    """Return `solved`, or round to nearest where that is nearer by what the method knows of the layer; errors by width;
    a note.

    stat: what the method was given, a Gram matrix or, of Statistic.FISHER, what each weight counts. Nearer: the smaller
    mean over the widths of the logarithm of the error, so that no width outweighs the others. Where the method makes
    tables, rounding to nearest is on even levels written as tables; where `solved` has outliers, beside the same ones.
    """
    single = method.needs is Statistic.FISHER
    errors = output_errors(weight, solved, stat, single=single)
    rest = weight if solved.outliers is None else solved.outliers.taken_from(weight)
    if solved.table:
        plain = even(rest, method.bits, method.group_size, method.sym)
    else:
        plain = nearest(rest, method.bits, method.group_size, method.sym, bool(solved.ratio))
    plain = replace(plain, outliers=solved.outliers)
    rival = output_errors(weight, plain, stat, single=single)
    if not all(map(math.isfinite, errors.values())) or mean_log(errors) > mean_log(rival):
        told = ", ".join(f"{b} bits {errors[b]:.3g} against {rival[b]:.3g}" for b in method.bits)
        return plain, rival, f"{method.name} was worse than rounding to nearest ({told}), which was taken"
    return solved, errors, ""


def mean_log(errors: Mapping[int, float]) -> float:
    """Mean of the logarithms: the score of a ladder, in which no width outweighs the others."""
    return sum(math.log(max(e, 1e-30)) for e in errors.values()) / len(errors)


def finite(name: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pass on what a part of the model puts out on the calibration text.

    Raises InputCorrupt, naming it, where that is not finite: no method behind it could know better than to go on.
    """
    for batch in batches:
        if not bool(torch.isfinite(batch).all()):
            raise InputCorrupt("what it puts out on the calibration text is NaN or infinite", where=name, fix=_FIX)
        yield batch


def remark(name: str, stat: Tensor, total: Accumulator) -> str:
    """A note on a layer's inputs that calibration can say little about, or "".

    Raises InputCorrupt, naming the layer, when they were not finite.
    """
    if not bool(torch.isfinite(stat).all()):
        raise InputCorrupt("its inputs are NaN or infinite on the calibration text", where=name, fix=_FIX)
    per_input = stat.diagonal() if stat.dim() == 2 else stat
    notes = []
    if dead := int((per_input == 0).sum()):
        notes.append(f"{dead} of {len(per_input)} inputs are never active")
    if stat.dim() == 2 and total.tokens < len(per_input):
        notes.append(f"{total.tokens} tokens for {len(per_input)} inputs")
    return "; ".join(notes)
