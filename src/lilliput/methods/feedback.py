"""Roundings of a Student chosen column by column, each taking up what those before it got wrong.

In a block the linear layers that read one edge are solved together, in the order of the computation, so that every layer is
solved for the inputs it will have: those of the rounded model, at 8 bits, behind layers that are solved. The grids stay
what they are. An offset is the least that puts a weight a quarter of a step within the cell of its code.

Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1, with static grids.
Deviation: inputs are those of the rounded model, activations included.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lilliput.methods.student import Student, local
from lilliput.models.sites import run_block, source_of
from lilliput.numerics.columns import Factor, sweep
from lilliput.numerics.nested import Quantized
from lilliput.numerics.straight import coded_rows

INSIDE = 0.25
"""Steps between a moved weight and the end of its cell."""
TOKENS = 32
"""Tokens that are read for each channel of the widest edge; more tell little."""
_DAMPING = 0.01


@torch.no_grad()
def feed_back(student: Student, layer: int, inputs: Callable[[], Iterator[Tensor]]) -> None:
    """Set the offsets of the roundings of one block of `student`.

    inputs: what comes into it in the rounded model, (batch, length, hidden) at a time, each time anew.
    """
    spec, readers = student.spec, dict[str, list[str]]()
    for name in spec.linears(layer):
        readers.setdefault(source_of(spec, name), []).append(name)
    for edge, names in readers.items():
        factor = Factor.of(_gram(student, layer, edge, inputs()), _DAMPING)
        floats = student.floats(layer)
        for name in names:
            weight = floats[local(name)]
            made, _ = sweep(weight, factor, coded_rows(weight, student.share(name), student.maker.bits))
            student.values[f"nudge/{name}"].copy_(offsets(weight, made))


def _gram(student: Student, layer: int, edge: str, inputs: Iterator[Tensor]) -> Tensor:
    """Sum of x x^T of what passes an edge of a block: (channels, channels) float32."""
    total, tensors = torch.zeros(()), student.rounded(layer)

    def site(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        out = student.site(name, x, seen)
        if name == edge:
            raise _Met(out)
        return out

    for x in inputs:
        try:
            run_block(student.spec, layer, tensors, x, site)
        except _Met as met:
            flat = met.value.flatten(0, -2)
            total = total + flat.T @ flat
    return total


class _Met(Exception):
    """What passes the edge; nothing behind it has to be computed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def offsets(weight: Tensor, made: Quantized) -> Tensor:
    """The least offsets, in steps, with which `on_rows` rounds a matrix to given codes, `INSIDE` steps from where it would
    not: (out, in).

    weight: (out, in). made: rows of one width with whole zeros.
    """
    (bits,) = made.bits
    step, off = (value.to(torch.float32) for value in (made.scale[bits], made.zero[bits]))
    last = 2**bits - 1
    code, zero = made.codes.to(torch.float32), last / 2 + off
    place = weight / step
    low = torch.where(code > 0, code - zero - 0.5 + INSIDE, -torch.inf)
    high = torch.where(code < last, code - zero + 0.5 - INSIDE, torch.inf)
    return place.clamp(low, high) - place
