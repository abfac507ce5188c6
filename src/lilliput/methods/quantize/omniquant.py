"""OmniQuant: train the ranges of a block's grids, and if asked its scales and roundings, on what the block puts out.

Learned weight clipping (LWC): two factors per group shrink the range that the grid spans. Learned equivalent
transformation (LET, option `let`): the scales of the block's legal pairs. Learned rounding (option `learn_rounding`): every
weight may be moved by half a step before it is rounded. All minimise the squared error between the output of the
quantized block, fed by the quantized blocks before it, and that of the original block, fed by originals.

All widths of a ladder are trained at once: the loss is the mean over widths of the error relative to that of rounding
to nearest, each width being the top bits of the same codes under a grid of its own.

Training can only help: what comes out is compared, as it will be stored, with rounding to nearest, and a block that
would be worse keeps the latter. A loss that is not finite ends the training of the block at its best state so far.

Source: Shao et al., "OmniQuant", ICLR 2024, eqs. 1 to 5; Cheng et al., "Optimize Weight Rounding via Signed Gradient
Descent" (AutoRound), 2024, eqs. 3 and 4, for `learn_rounding`.
Deviation: nested widths; scales without shifts, as logarithms, tied as `models/pairs.py` says; q and k are not scaled
against each other, which changes nothing where each row has scales of its own; grids as they are stored; Adam without decay.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from lilliput.core.errors import ConfigError
from lilliput.methods.base import BlockData, BlockQuantizer
from lilliput.methods.calibration import evenly
from lilliput.methods.safety import mean_log
from lilliput.models.decoder import Block
from lilliput.models.pairs import Pair, pairs
from lilliput.numerics.grids import nearest
from lilliput.numerics.learned import LearnedGrid, cosine, signed_step
from lilliput.numerics.nested import Quantized

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OmniQuant(BlockQuantizer):
    """Train grids on the output of a block.

    epochs: passes over the rows. samples: rows of the calibration text to train on, the first `length` tokens of each.
    rows: of them a step. lr: of the bounds' logits and, ten times smaller, of narrower grids. let, let_lr: train the
    scales of pairs, of their logarithms. learn_rounding: train roundings too, by signed steps that together span half a code.
    """

    original: ClassVar[bool] = True
    epochs: int = 5
    samples: int = 32
    length: int = 256
    rows: int = 4
    lr: float = 0.05
    let: bool = False
    let_lr: float = 0.005
    learn_rounding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("epochs", 0), ("samples", 1), ("length", 1), ("rows", 1)):
            if (value := getattr(self, key)) < least:
                raise ConfigError(f"{key} is {value}", where=f"{self.name}.{key}", fix=f"Give at least {least}")
        for key in ("lr", "let_lr"):
            if not 0 <= (rate := getattr(self, key)) < 1:
                fix = "Give a rate from 0 to below 1, such as 0.01"
                raise ConfigError(f"{key} is {rate}", where=f"{self.name}.{key}", fix=fix)

    def held_bytes(self, *, weights: int, grids: int, row: int, rows: int) -> int:
        """What `_Task` and `LearnedGrid` hold, and the graph of one width; see `Method.held_bytes`."""
        each = (
            4 + 1 + 4 * 4
        )  # as it came, rounded to nearest; in groups, before the clamp, before the scale, the matrix
        each += 3 * 4 if self.let else 0  # scaled, and what the ends of its groups are found in
        each += 3 * 4 if self.learn_rounding else 0  # the offset, its gradient, its best
        own = 5 * 4 + 2  # a number, its gradient, two moments of Adam, its best; and that of the rounding to nearest
        return each * weights + own * grids + min(self.rows, rows) * row

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Round to nearest: the ends have no block to be trained in."""
        return nearest(weight, self.bits, self.group_size, self.sym, self.shared)

    def solve_block(self, block: Block, names: Sequence[str], data: BlockData) -> tuple[dict[str, Quantized], str]:
        """Train, compare with rounding to nearest, return the better; see `BlockQuantizer.solve_block`."""
        task = _Task(self, block, names, data)
        with torch.enable_grad():
            stopped = task.train()
        plain = task.plain
        with torch.no_grad():
            trained, tensors = task.result()
            before, after = task.errors(plain, task.frozen), task.errors(trained, tensors)
            told = ", ".join(f"{b} bits {after[b]:.3g} for {before[b]:.3g}" for b in self.bits)
            if not all(e < torch.inf for e in after.values()) or mean_log(after) > mean_log(before):
                return plain, f"{stopped}training did not help ({told}); rounded to nearest"
            for name, value in tensors.items():
                block.get_parameter(name).data.copy_(value)
        return trained, f"{stopped}block error {told}"


class _Task:
    """One block in training. frozen: its tensors as they came, by name within the block; plain: rounded to nearest."""

    def __init__(self, method: OmniQuant, block: Block, names: Sequence[str], data: BlockData) -> None:
        assert data.targets is not None, "the method says `original`"
        self.method, self.block, self.data = method, block, data
        self.frozen: Tensors = {name: value.detach().clone() for name, value in block.named_parameters()}
        self.local = {name: f"{name.split('.', 2)[2]}.weight" for name in names}
        m = method
        self.plain = {n: nearest(self.frozen[k], m.bits, m.group_size, m.sym, m.shared) for n, k in self.local.items()}
        self.grids = {
            n: LearnedGrid(self.frozen[k], m.bits, m.group_size, m.sym, m.learn_rounding, m.shared)
            for n, k in self.local.items()
        }
        self.scales = [(pair, torch.zeros(pair.width, requires_grad=True)) for pair in self._pairs()]
        self.rows = evenly(data.inputs.samples, m.samples)
        self.batch = min(m.rows, data.batch)

    def _pairs(self) -> Iterator[Pair]:
        solved = set(self.local.values())
        for pair in pairs(self.block) if self.method.let else ():
            # A layer left to another method, or in float, is no concern of this one.
            linears = [n for n in (pair.divided, *pair.multiplied) if n.endswith("_proj")]
            if pair.kind != "query_key" and all(f"{n}.weight" in solved for n in linears):
                yield pair

    def _draw(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        assert self.data.targets is not None, "checked above"
        length = self.method.length
        x, y = (of.take(rows)[:, :length] for of in (self.data.inputs, self.data.targets))
        return x, y

    def _floats(self) -> Tensors:
        """The block's tensors with the pairs' scales in them."""
        now = dict(self.frozen)
        for pair, log in self.scales:
            now |= pair.scaled(now, log.exp())
        return now

    def train(self) -> str:
        """Leave the parameters as they were at the end of the best epoch; return what stopped it early, or ""."""
        m = self.method
        batches = [self.rows[i : i + self.batch] for i in range(0, len(self.rows), self.batch)]
        steps, step = m.epochs * len(batches), 0
        if not steps:
            return ""
        with torch.no_grad():
            base = {b: max(e, 1e-30) for b, e in self.errors(self.plain, self.frozen).items()}
        grids = list(self.grids.values())
        adam = torch.optim.Adam(
            [
                {"params": [p for g in grids for p in g.bounds], "peak": m.lr},
                {"params": [p for g in grids for p in g.grids] or [torch.zeros(1)], "peak": m.lr / 10},
                {"params": [log for _, log in self.scales] or [torch.zeros(1)], "peak": m.let_lr},
            ]
        )
        nudges = [g.nudge for g in grids if g.nudge is not None]
        trained = [p for g in grids for p in g.parameters] + [log for _, log in self.scales]
        best, least = [p.detach().clone() for p in trained], torch.inf
        generator = torch.Generator().manual_seed(0)
        stopped = ""
        for _ in range(m.epochs):
            total = 0.0
            for index in torch.randperm(len(batches), generator=generator).tolist():
                loss = self._backward(batches[index], base)
                total += loss
                if not loss < torch.inf or not all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained):
                    stopped = f"stopped at step {step} of {steps}, the loss not finite; "
                    break
                for group in adam.param_groups:
                    group["lr"] = group["peak"] * cosine(step, steps)
                for nudge in nudges:  # the rates add up to half a code
                    signed_step(nudge, (1 - step / steps) / steps, 0.5)
                adam.step()
                adam.zero_grad()
                step += 1
            if stopped:
                break
            if total < least:
                best, least = [p.detach().clone() for p in trained], total
        with torch.no_grad():
            for parameter, value in zip(trained, best, strict=True):
                parameter.copy_(value)
        return stopped

    def _backward(self, rows: Sequence[int], base: Mapping[int, float]) -> float:
        """Add the gradients of the loss on some rows, one width after the other; return the loss."""
        x, y = self._draw(rows)
        total = 0.0
        for width in self.method.bits:
            now = self._floats()
            for name, key in self.local.items():
                now[key] = self.grids[name].at(now[key], width)
            loss = (self._run(now, x) - y).square().mean() / (base[width] * len(base))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _run(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.block, dict(tensors), (x,))
        return out

    def result(self) -> tuple[dict[str, Quantized], Tensors]:
        """What training came to: codes, and the block's tensors that they belong to."""
        now = self._floats()
        return {name: self.grids[name].quantized(now[key]) for name, key in self.local.items()}, now

    def errors(self, coded: Mapping[str, Quantized], tensors: Mapping[str, Tensor]) -> dict[int, float]:
        """Mean squared error of the block's output by width, over all rows of training."""
        sums = dict.fromkeys(self.method.bits, 0.0)
        for width in sums:
            now = dict(tensors) | {key: coded[name].dequantize(width) for name, key in self.local.items()}
            for start in range(0, len(self.rows), self.batch):
                part = self.rows[start : start + self.batch]
                x, y = self._draw(part)
                sums[width] += float((self._run(now, x) - y).square().mean()) * len(part)
        return {width: total / len(self.rows) for width, total in sums.items()}
