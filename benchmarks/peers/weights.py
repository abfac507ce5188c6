"""Random weights in blocks, the same for every writer and for the reference of the tests: NumPy and nothing else.

A weight is (code - zero) * scale of its block; two codes of 4 bits share a byte, the earlier one in its low half.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

EPS, BASE = 1e-5, 10000.0
"""Of every normalization and of the rotary embedding."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One matrix (out, columns): 4 or 8 bits a code, `group` columns to a scale."""

    codes: npt.NDArray[np.uint8]  # (out, columns * bits / 8)
    scales: npt.NDArray[np.float32]  # (out, columns / group), exact in float16
    zeros: npt.NDArray[np.uint8]  # (out, columns / group), one a byte
    bits: int

    def values(self) -> npt.NDArray[np.float32]:
        """(out, columns) of what the codes stand for."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        blocks = codes.reshape(*self.scales.shape, -1).astype(np.float32) - self.zeros[..., None]
        return np.asarray((blocks * self.scales[..., None]).reshape(codes.shape), dtype=np.float32)


def blocks(name: str, out: int, columns: int, bits: int, group: int, *, seed: int = 0, centred: bool = True) -> Blocks:
    """The matrix `name`: it keeps the size of what it is given. centred: every zero is the middle, as no zero says."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    middle, size = 1 << (bits - 1), (out, columns // group)
    codes = np.frombuffer(rng.bytes(out * columns * bits // 8), dtype=np.uint8).reshape(out, -1)
    # codes are uniform: their standard deviation is 2**bits / sqrt(12)
    step = (12 / columns) ** 0.5 / (1 << bits)
    scales = (rng.random(size, dtype=np.float32) * np.float32(0.2) + np.float32(0.9)) * np.float32(step)
    zeros = np.full(size, middle, dtype=np.uint8) if centred else rng.integers(middle - 1, middle + 2, size, np.uint8)
    return Blocks(codes=codes, scales=scales.astype(np.float16).astype(np.float32), zeros=zeros, bits=bits)


def matrices(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (out, in) of every matrix of a Llama of that shape, embedding first, head last."""
    hidden, inter, vocab = shape["hidden"], shape["inter"], shape["vocab"]
    kv = shape["kv"] * (hidden // shape["heads"])
    yield "embed", (vocab, hidden)
    for layer in range(shape["layers"]):
        sizes = {"qkv": (hidden + 2 * kv, hidden), "o": (hidden, hidden)}
        sizes |= {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        yield from ((f"layers.{layer}.{name}", size) for name, size in sizes.items())
    yield "head", (vocab, hidden)


def gains(shape: dict[str, int], name: str, seed: int = 0) -> npt.NDArray[np.float32]:
    """(hidden,) factors of the normalization `name`, around 1: ones would hide a mix-up."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    return rng.uniform(0.8, 1.2, shape["hidden"]).astype(np.float32)


def rotation(shape: dict[str, int], context: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines (context, head size / 2) of the positions from 0; one half of a head turns with the other."""
    half = shape["hidden"] // shape["heads"] // 2
    angles = np.arange(context)[:, None] * BASE ** (-np.arange(half) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
