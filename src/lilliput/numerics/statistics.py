"""What a method may know of a layer's inputs, gathered batch by batch in constant memory (needs torch).

Nothing here grows with the number of tokens: a norm is one number an input, a Gram matrix one an input pair. An input
that is all zero, as padding is, says nothing and counts as no token.
"""

from typing import Protocol

import torch
from torch import Tensor


class Accumulator(Protocol):
    """Takes (tokens, in) activations in any number of batches; `value` is the statistic of all `tokens` of them."""

    tokens: int

    def add(self, inputs: Tensor) -> None: ...
    def value(self) -> Tensor: ...


class InputNorm:
    """L2 norm of every input feature over all tokens: (in,) float32, summed in float64."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (tokens, in), any float dtype."""
        self._sum += inputs.to(torch.float64).square().sum(0)
        self.tokens += _said(inputs)

    def value(self) -> Tensor:
        """Return (in,) float32."""
        return self._sum.sqrt().to(torch.float32)


class InputPeak:
    """Largest size of every input feature over all tokens: (in,) float32."""

    def __init__(self, columns: int) -> None:
        self._peak = torch.zeros(columns)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (tokens, in), any float dtype."""
        self._peak = torch.maximum(self._peak, inputs.to(torch.float32).abs().amax(0))
        self.tokens += _said(inputs)

    def value(self) -> Tensor:
        """Return (in,) float32."""
        return self._peak


class Gram:
    """X^T X over all tokens, X (tokens, in): (in, in) float32. Divided by nothing: see `tokens` for a mean."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (tokens, in), any float dtype; products are summed in float32."""
        flat = inputs.to(torch.float32)
        self._sum.addmm_(flat.T, flat)
        self.tokens += _said(flat)

    def value(self) -> Tensor:
        """Return (in, in) float32, symmetric."""
        return self._sum


def _said(inputs: Tensor) -> int:
    """How many of (tokens, in) inputs are not all zero."""
    return int((inputs != 0).any(1).sum())
