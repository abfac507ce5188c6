"""Bytes to bits a weight: everything a file stores for a matrix counts as that matrix's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

IN_BLOCKS = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)(?=\.|$)")
"""Linear layers of the blocks, by Hugging Face's names; what follows is the tensor: weight, scales, zeros, tables."""


@dataclass(frozen=True)
class Bits:
    """Bits for one weight. linears: what is stored for the matrices of the blocks, over their weights. model: all
    tensors of the file, embedding, head and norms too, over all weights of the model."""

    linears: float
    model: float


def bits_per_weight(stored: Mapping[str, int], weights: Mapping[str, int]) -> Bits:
    """Account for a file.

    stored: bytes of every tensor of the file by name. weights: elements of every parameter of the model, by Hugging
    Face's names, `.weight` included. A tensor belongs to the matrix whose module's name it begins with. Raises
    ValueError where a matrix has no bytes: then the names do not match, and the figure would be too good.
    """
    modules = {name.removesuffix(".weight"): size for name, size in weights.items() if IN_BLOCKS.match(name)}
    held = dict.fromkeys(modules, 0)
    for name, size in stored.items():
        if (match := IN_BLOCKS.match(name)) and match[0] in held:
            held[match[0]] += size
    if empty := [name for name, size in held.items() if size == 0]:
        raise ValueError(f"nothing is stored for {empty[0]} and {len(empty) - 1} other matrices")
    return Bits(
        linears=8 * sum(held.values()) / sum(modules.values()),
        model=8 * sum(stored.values()) / sum(weights.values()),
    )
