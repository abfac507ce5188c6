"""ONNX graphs that compute docs/integer.md itself: the files of `onnx_qdq`, every code the oracle's.

`onnx_whole` says how nodes become operators. There are no encodings: nothing is left for a compiler to round.
"""

from dataclasses import dataclass
from typing import ClassVar

from lilliput.export.onnx_nodes import Builder
from lilliput.export.onnx_qdq import OnnxQdq
from lilliput.export.onnx_whole import WholeBuilder


@dataclass(frozen=True, kw_only=True)
class OnnxInteger(OnnxQdq):
    """Options as of `OnnxQdq`."""

    NAME: ClassVar[str] = "onnx-integer"
    BUILDER: ClassVar[type[Builder]] = WholeBuilder
    ADVICE: ClassVar[tuple[str, ...]] = (
        "Of graphs for any number of tokens ONNX Runtime plans the memory in a time that grows with the square of their layers:",
        "set `enable_mem_reuse` of the session options to False, or export a fixed length.",
    )
    EXACT: ClassVar[bool] = True
    ACTIVATIONS: ClassVar[str] = "is whole numbers on a fixed grid, and what computes them does so in 64 bits"
