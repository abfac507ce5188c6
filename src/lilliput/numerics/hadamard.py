"""Random orthogonal maps that spread every coordinate over all others, and are cheap to apply (needs torch).

Sources: Ashkboos et al., "QuaRot", 2024, section 3 (random signs times a Hadamard matrix, Kronecker products for sizes
that are no power of two); Paley, "On orthogonal matrices", 1933, lemmas 2 and 3, for q prime (the cores of orders such
as 12, 20, 28 and 44).
"""

from dataclasses import dataclass
from functools import cache
from math import isqrt

import torch
from torch import Tensor

CORE_LIMIT = 1024
"""Largest Hadamard core multiplied out; a size that needs a larger one gets a random orthogonal core instead."""


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) (H kron core), H the normalised Walsh-Hadamard matrix of order n / m; R^T R = I.

    signs: (n,) float64 of +1 and -1. core: (m, m) float64, orthogonal, m a divisor of n with n / m a power of two.
    """

    signs: Tensor
    core: Tensor

    @classmethod
    def draw(cls, size: int, generator: torch.Generator) -> "Rotation":
        """Return one of that size: every entry is +-size**-0.5 where `hadamard_core` knows a core, else near that."""
        bits = torch.randint(0, 2, (size,), generator=generator)
        order = core_order(size)
        core = hadamard_core(order) / order**0.5 if order else _orthogonal(size // (size & -size), generator)
        return cls(bits.to(torch.float64) * 2 - 1, core)

    def right(self, x: Tensor) -> Tensor:
        """x: (.., n), any float dtype; returns x R in float64, in n log n steps a row."""
        m = self.core.shape[0]
        steps = self.signs.shape[0] // m
        y = (x.to(torch.float64) * self.signs).reshape(-1, steps, m) @ self.core
        half = 1
        while half < steps:
            a, b = y.view(-1, 2, half, m).unbind(1)
            y = torch.stack((a + b, a - b), 1)
            half *= 2
        mixed: Tensor = y.reshape(x.shape) * steps**-0.5
        return mixed

    def matrix(self) -> Tensor:
        """R itself, (n, n) float64."""
        return self.right(torch.eye(self.signs.shape[0], dtype=torch.float64))


def core_order(size: int) -> int:
    """The smallest order c for which `hadamard_core` knows a matrix and size / c is a power of two; 0 if none is."""
    order = size // (size & -size)
    while order <= min(size, CORE_LIMIT) and size % order == 0:
        if order == 1 or _paley(order):
            return order
        order *= 2
    return 0


@cache
def hadamard_core(order: int) -> Tensor:
    """A Hadamard matrix of that order: (order, order) float64 of +1 and -1. order: 1, or one of Paley's."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley(order)
    assert q, "asked only for orders that core_order returns"
    residues = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0, *(1.0 if i in residues else -1.0 for i in range(1, q))], dtype=torch.float64)
    places = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[1:, 1:] = chi[(places[:, None] - places) % q]
    bordered[0, 1:], bordered[1:, 0] = 1, 1 if q % 4 == 1 else -1
    unit = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return unit + bordered
    twos = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
    return torch.kron(bordered, twos[0]) + torch.kron(unit, twos[1])


def _paley(order: int) -> int:
    """The prime of Paley's construction of that order: order - 1, or order / 2 - 1 if that is 1 modulo 4; 0 if none."""
    for q, wanted in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and q > 2 and q % 4 == wanted and all(q % d for d in range(2, isqrt(q) + 1)):
            return q
    return 0


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over all of them: the Q of a Gaussian one, R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    uniform: Tensor = q * r.diagonal().sign()
    return uniform
