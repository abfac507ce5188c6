"""What autograd keeps for a backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor | list[Tensor]], least: int, beside: list[Tensor]) -> int:
    """Bytes of the memory that the graph of `forward` holds on to, what it returns counted too.

    least: bytes; blocks of memory below are left out. beside: tensors that are held anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in beside}
    found: dict[int, Tensor] = {}  # the tensors are kept, so that no address serves twice

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = forward()
    for tensor in made if isinstance(made, list) else [made]:
        pack(tensor)
    sizes = {at: tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in known}
    return sum(size for size in sizes.values() if size >= least)
