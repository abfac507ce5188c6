"""The calibration text at one block, as methods that treat a whole block read it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lilliput.core.spec import AnySpec
from lilliput.methods.base import BlockData, Statistic
from lilliput.models.decoder import Block
from lilliput.models.sites import source_of
from lilliput.numerics.statistics import Accumulator, InputPeak


def evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers 0 .. count - 1, spread evenly."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def sample(data: BlockData, samples: int, length: int) -> Tensor:
    """Some rows of what comes into the block, cut short: (up to samples, up to length, hidden) float32."""
    return data.inputs.take(evenly(data.inputs.samples, samples))[:, :length].contiguous()


def linear(block: Block, name: str) -> nn.Linear:
    """The linear layer of that name within the block, such as "attn.q_proj"."""
    found = block.get_submodule(name)
    assert isinstance(found, nn.Linear), name
    return found


def first_readers(spec: AnySpec, needs: Mapping[str, Statistic]) -> dict[str, str]:
    """For every layer of a block, by canonical name, the first that reads the same edge and needs the same of it.

    What one of them sees the others see, so one statistic serves all.
    """
    first: dict[tuple[str, Statistic], str] = {}
    return {name: first.setdefault((source_of(spec, name), need), name) for name, need in needs.items()}


def gathered(block: Block, needs: Mapping[str, Statistic], batches: Iterable[Tensor]) -> dict[str, Accumulator]:
    """For every layer of `needs`, by canonical name, what it needs of its inputs while `batches` run through the block.

    batches: of (rows, length, hidden); not looked at where nothing is needed. Layers that read the same share an
    accumulator.
    """
    linears, first = block.linears(), first_readers(block.spec, needs)
    sums = {name: needs[name].accumulator(linears[name].in_features) for name in set(first.values())}
    if sums:
        with watching(linears, sums):
            for batch in batches:
                block(batch)
    return {name: sums[one] for name, one in first.items()}


def inputs_of(block: Block, names: Iterable[str], rows: Tensor) -> dict[str, Tensor]:
    """What the linear layers named within the block read when `rows`, (samples, length, hidden), run through it.

    Returns (samples, length, in) float32 each.
    """
    linears = {name: linear(block, name) for name in names}
    sums = {name: _Keep() for name in linears}
    with torch.no_grad(), watching(linears, sums):
        block(rows)
    return {name: one.value().view(*rows.shape[:2], -1) for name, one in sums.items()}


def peaks_of(block: Block, names: Iterable[str], data: BlockData) -> dict[str, Tensor]:
    """Largest size of every input of the layers named within the block, over the whole calibration text: (in,)."""
    linears = {name: linear(block, name) for name in names}
    sums = {name: InputPeak(one.in_features) for name, one in linears.items()}
    with torch.no_grad(), watching(linears, sums):
        for batch in data.inputs.batches(data.batch):
            block(batch)
    return {name: one.value() for name, one in sums.items()}


class _Keep:
    """An Accumulator that keeps everything; for samples only."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        self._parts.append(inputs)
        self.tokens += len(inputs)

    def value(self) -> Tensor:
        return torch.cat(self._parts)


@contextmanager
def watching(linears: Mapping[str, nn.Linear], sums: Mapping[str, Accumulator]) -> Iterator[None]:
    """Feed the inputs of the layers named in `sums` to their accumulators while the context lasts."""

    def hook(total: Accumulator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: total.add(inputs[0].flatten(0, -2))

    handles = [linears[name].register_forward_pre_hook(hook(total)) for name, total in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
