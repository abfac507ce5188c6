"""Fixed ranges as the JSON that compilers for phones' NPUs read beside a model ("quantization overrides").

One object a tensor, or a list of one a row: bitwidth, scale, offset, min, max, is_symmetric, dtype, in the manner of
version 0.6.1 of the encodings of AIMET, which Qualcomm's converters take. There codes count from zero up:

    value = scale * (n + offset), 0 <= n < 2**bitwidth, so offset = -(2**(bitwidth - 1) + zero) for our signed codes
"""

from typing import Any

import numpy as np

from lilliput.core.graph import Grid
from lilliput.export.onnx_graph import Phase

VERSION = "0.6.1"


def encodings(phase: Phase) -> dict[str, Any]:
    """Return the encodings of one graph by the names of its tensors; weights and biases row by row.

    Scores behind a mask and the weights of norms have no grid in the graph. They get one of 16 bits, over what they can
    be, so that no compiler calibrates one of its own.
    """
    activations = {name: [_of_grid(grid)] for name, grid in phase.tensors.items()}
    for name, (least, most) in phase.masked.items():
        scale = (most - least) / 65535
        zero = min(max(round(-least / scale) - 32768, -32768), 32767)
        activations[name] = [_of_grid(Grid(bits=16, scale=scale, zero=zero))]
    params = {}
    for name, matrix in phase.params.items():
        rows = zip(matrix.scale, matrix.zero, strict=True)
        params[name] = [_signed(matrix.bits, float(scale), int(zero)) for scale, zero in rows]
    for name in phase.gains:
        params[name] = [_signed(16, float(np.abs(phase.blobs[name].data).max()) / 32767 or 1.0)]
    for name in phase.blobs:
        if name.endswith(".bias") and f"{name}.scale" in phase.blobs:
            params[name] = [_signed(32, float(scale)) for scale in phase.blobs[f"{name}.scale"].data]
    return {"version": VERSION, "activation_encodings": activations, "param_encodings": params}


def _of_grid(grid: Grid) -> dict[str, Any]:
    return _signed(grid.bits, grid.scale, grid.zero)


def _signed(bits: int, scale: float, zero: int = 0) -> dict[str, Any]:
    """zero: among codes with a sign; in the file they begin at 0."""
    offset = -(1 << (bits - 1)) - zero
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(zero == 0),
        "min": scale * offset,
        "max": scale * (offset + (1 << bits) - 1),
        "scale": scale,
        "offset": offset,
    }
