"""The one loop that feeds layers to methods, block by block, for every method alike.

In each block the original runs first (the probe's float stream), then statistics are gathered on what the already
compressed blocks before it put out, then every method solves its layers, and the compressed block's output feeds the
next. Only one block is in memory at a time; activations of the calibration text wait on disk.

Two things travel through the blocks: the calibration activations, when a method wants statistics, at the width `feed`;
and the probe, a short text followed through the original and through every width. Its logits say in the end how far
each width is from the original, and are what the engine must reproduce from the saved artifact. An encoder's probe is
some short texts or pictures, and the vectors it makes of them stand in the place of logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lilliput.core.progress import Progress
from lilliput.core.spec import EncoderSpec, ModelSpec
from lilliput.data.images import Pictures
from lilliput.data.streams import Batches
from lilliput.methods import outliers
from lilliput.methods.base import BlockData, BlockMethod, BlockQuantizer, LayerMethod, Quantizer, Statistic
from lilliput.methods.calibration import gathered
from lilliput.methods.fisher import Fisher
from lilliput.methods.journal import Activations, Journal, State
from lilliput.methods.safety import energy, finite, remark, safer
from lilliput.methods.sources import Frame, Source
from lilliput.models.decoder import Block, Decoder
from lilliput.models.encoder import Encoder
from lilliput.numerics.nested import Quantized

Solved = Tensor | Quantized
FLOAT = "float"
_JUDGED = (Statistic.GRAM, Statistic.FISHER)
"""What a method knows of a layer that also tells whether rounding to nearest would have been nearer."""


class Sink(Protocol):
    """Where results go. Writing the same result twice must be harmless."""

    def quantized(self, name: str, value: Quantized, weight: Tensor) -> None:
        """Take codes; weight: what they stand for, (out, in), any float dtype."""

    def floating(self, name: str, value: Tensor) -> None: ...
    def settle(self) -> None:
        """Have all that was given on disk before returning."""


@dataclass(frozen=True)
class Job:
    """What one sweep does.

    methods: for every layer to treat, its methods in order; a layer not named stays as it is. blocks: what changes each
    block before its layers are solved. widths: those the result serves, ascending; empty when nothing is quantized.
    probe: (1, length) int64, for an encoder what it takes: (texts, length) int64 or (pictures, patches, columns) float32.
    slice_rows: rows of a tall matrix solved at a time, which bounds memory. fisher: what methods that need
    Statistic.FISHER are given.
    """

    methods: Mapping[str, Sequence[LayerMethod]]
    widths: tuple[int, ...]
    probe: Tensor
    calibration: Batches | Pictures | None = None
    slice_rows: int = 1 << 16
    blocks: Sequence[BlockMethod] = ()
    fisher: Fisher | None = None

    @property
    def rungs(self) -> tuple[int, ...]:
        """The widths to follow; 0 stands for "as it is" when there are none."""
        return self.widths or (0,)

    @property
    def feed(self) -> int:
        """The width whose output feeds the next block: 4 where it is served, since most use is there."""
        return 4 if 4 in self.rungs else self.rungs[-1]

    @property
    def original(self) -> bool:
        """Whether a method wants to know what the original's blocks put out."""
        chains = [m for chain in self.methods.values() for m in chain if isinstance(m, BlockQuantizer)]
        return any(m.original for m in self.blocks) or any(m.original for m in chains)


@dataclass(frozen=True)
class Outcome:
    """logits: (length, vocab) float32 of the probe, by width and under "float"; records: one a layer.

    Of an encoder: (texts or pictures, embedding_size).
    """

    logits: dict[str, Tensor]
    records: list[dict[str, Any]]


class Sweep:
    """Runs a Job from where its journal says the last run stopped."""

    def __init__(self, source: Source, sink: Sink, job: Job, journal: Journal, progress: Progress) -> None:
        self.source, self.sink, self.job, self.journal, self.progress = source, sink, job, journal, progress
        self.spec = source.spec

    @torch.no_grad()
    def run(self) -> Outcome:
        """Do all steps that are still to do and return the probe's logits and the record of every layer."""
        state = self.journal.load()
        sizes = self._sizes()
        self.progress.begin("compress", sum(sizes), done=sum(sizes[: state.step]))
        if state.step == 0:
            self._embedding(state)
            self._finish(state, sizes)
        while state.step <= self.spec.num_layers:
            self._block(state, state.step - 1)
            self._finish(state, sizes)
        return self._head(state, sizes[-1])

    def _finish(self, state: State, sizes: Sequence[int]) -> None:
        self.sink.settle()
        state.step += 1
        self.journal.save(state)
        self.progress.advance(sizes[state.step - 1])

    def _sizes(self) -> list[int]:
        """Weights handled in each step: the embedding, every block, the head."""
        matrices = self.spec.matrices()
        first = math.prod(matrices[self.spec.entrance])
        last = first if isinstance(self.spec, ModelSpec) else math.prod(matrices.get("projection", (0,)))
        blocks = [sum(o * c for o, c in self.spec.linears(i).values()) for i in range(self.spec.num_layers)]
        return [first, *blocks, last]

    # ---- the three kinds of step

    def _embedding(self, state: State) -> None:
        name = self.spec.entrance
        weight = self.source.read(f"{name}.weight")
        solved, output, worse = self._solve_tall(name, weight, None)
        self._put(name, solved, weight, state, output, worse)
        self._keep("embed_class.weight", "embed_positions.weight", "embed_types.weight")
        self._keep("embed_norm.weight", "embed_norm.bias")
        frame = self.source.frame()
        state.streams = {str(b): embed(frame, self.job.probe, rows_of(solved, b)) for b in self.job.rungs}
        state.streams[FLOAT] = embed(frame, self.job.probe, rows_of(weight, 0))
        if self.job.calibration is not None:
            rows = rows_of(solved, self.job.feed)
            hidden = (embed(frame, as_inputs(b), rows) for b in self.job.calibration)
            self._activations(1).write(finite(name, hidden))
            if self.job.original:
                exact = rows_of(weight, 0)
                plain = (embed(frame, as_inputs(b), exact) for b in self.job.calibration)
                self._activations(1, "original").write(finite(name, plain))

    def _block(self, state: State, index: int) -> None:
        block = self.source.block(index)
        state.streams[FLOAT] = block(state.streams[FLOAT])
        linears = block.linears()
        data = self._block_data(state, block)
        notes = {name: [note] for name in linears if (note := self._prepare(block, data, linears))}
        errors: dict[str, dict[int, float]] = {}
        original = {name: linear.weight.data for name, linear in linears.items()}
        solved: dict[str, Solved] = dict(original)
        for round_ in range(max((len(self.job.methods.get(n, ())) for n in linears), default=0)):
            todo = {n: self.job.methods[n][round_] for n in linears if len(self.job.methods.get(n, ())) > round_}
            stats = self._gather(state, block, {n: m.needs for n, m in todo.items() if m.needs.streamed})
            stats |= {n: (self._fisher(n), "") for n, m in todo.items() if m.needs is Statistic.FISHER}
            for names in _together(todo):
                method = todo[names[0]]
                if isinstance(method, BlockQuantizer):
                    assert data is not None, "planning refuses a recipe that lacks its calibration text"
                    made_here, note = method.solve_block(block, names, data)
                    solved |= made_here
                    for name in names if note else ():
                        notes.setdefault(name, []).append(note)
                    continue
                (name,) = names
                weight = solved[name]
                assert isinstance(weight, Tensor), "a layer is quantized last"
                stat, note = stats.get(name, (None, ""))
                made = outliers.solve(method, weight, stat)
                if isinstance(made, Quantized) and isinstance(method, Quantizer) and method.needs in _JUDGED:
                    assert stat is not None, "gathered above"
                    made, errors[name], worse = safer(method, weight, made, stat)
                    note = "; ".join(filter(None, (note, worse)))
                solved[name] = made
                notes.setdefault(name, []).extend([note] if note else [])
            self._install(linears, solved, self.job.feed)
        for rung in self.job.rungs:
            self._install(linears, solved, rung)
            state.streams[str(rung)] = block(state.streams[str(rung)])
        for name in linears:
            self._put(name, solved[name], original[name], state, errors.get(name, {}), "; ".join(notes.get(name, ())))
        for name, value in block.state_dict().items():
            full = f"layers.{index}.{name}"
            if full.removesuffix(".weight") not in linears:
                self.sink.floating(full, value)
        if self.job.calibration is not None and index + 1 < self.spec.num_layers + self._head_needs():
            self._install(linears, solved, self.job.feed)
            before = self._activations(state.step).batches(self.job.calibration.batch_size)
            self._activations(state.step + 1).write(finite(f"layers.{index}", map(block, before)))

    def _head(self, state: State, size: int) -> Outcome:
        """Solve the head; nothing after it reads the journal, so a run killed here does this step again."""
        frame = self.source.frame()
        self._keep("final_norm.weight", "final_norm.bias", "lm_head.bias")
        if isinstance(self.spec, EncoderSpec):
            assert isinstance(frame, Encoder), "a source knows its spec"
            self._keep("projection.weight")
            self.sink.settle()
            self.progress.advance(size)
            return Outcome({name: frame.finish(stream) for name, stream in state.streams.items()}, state.records)
        assert isinstance(frame, Decoder), "a source knows its spec"
        tied = frame.spec.tied_head
        name = "embed_tokens" if tied else "lm_head"
        weight = self.source.read(f"{name}.weight")
        stat, note = self._head_statistic(frame, state)
        # A tied head was stored with the embedding; solving it again costs less than keeping it all the while.
        solved, output, worse = self._solve_tall(name, weight, stat)
        if not tied:
            self._put(name, solved, weight, state, output, "; ".join(filter(None, (note, worse))))
        self.sink.settle()
        logits = {str(b): project(frame, state.streams[str(b)], solved, b) for b in self.job.rungs}
        logits[FLOAT] = project(frame, state.streams[FLOAT], weight, 0)
        self.progress.advance(size)
        return Outcome(logits, state.records)

    # ---- their parts

    def _keep(self, *names: str) -> None:
        """Hand on those of these tensors that there are, as they are."""
        for name in names:
            if self.source.has(name):
                self.sink.floating(name, self.source.read(name))

    def _activations(self, step: int, of: str = "hidden") -> Activations:
        assert self.job.calibration is not None, "asked for only with calibration"
        rows = self.job.calibration.rows
        samples, length = len(rows), self.spec.context if rows.ndim == 3 else rows.shape[1]
        return self.journal.activations(step, (samples, length, self.spec.hidden_size), of)

    def _block_data(self, state: State, block: Block) -> BlockData | None:
        """The calibration text at this block, which is still the original."""
        if self.job.calibration is None:
            return None
        batch, targets = self.job.calibration.batch_size, None
        if self.job.original:
            targets = self._activations(state.step + 1, "original")
            rows = self._activations(state.step, "original").batches(batch)
            targets.write(finite(f"layers.{block.layer}", map(block, rows)))
        return BlockData(self._activations(state.step), targets, batch)

    def _prepare(self, block: Block, data: BlockData | None, linears: Mapping[str, nn.Linear]) -> str:
        """Let the BlockMethods change the block; return their notes."""
        notes = []
        for method in self.job.blocks:
            assert data is not None, "planning refuses a recipe that lacks its calibration text"
            chains = {name: self.job.methods.get(name, ()) for name in linears}
            after = {n: chain[-1] for n, chain in chains.items() if chain and isinstance(chain[-1], Quantizer)}
            notes.append(method.apply(block, data, after))
        return "; ".join(filter(None, notes))

    def _gather(self, state: State, block: Block, needs: Mapping[str, Statistic]) -> dict[str, tuple[Tensor, str]]:
        """Statistics of the inputs of the layers named, over all calibration tokens, each with a note on them."""
        if not needs:
            return {}
        assert self.job.calibration is not None, "planning refuses a recipe that lacks its calibration text"
        batches = self._activations(state.step).batches(self.job.calibration.batch_size)
        sums = gathered(block, needs, batches)
        return {name: (value := total.value(), remark(name, value, total)) for name, total in sums.items()}

    def _head_needs(self) -> bool:
        return any(m.needs.streamed for m in self.job.methods.get("lm_head", ()))

    def _head_statistic(self, frame: Decoder, state: State) -> tuple[Tensor | None, str]:
        if not self._head_needs():
            return None, ""
        assert self.job.calibration is not None, "planning refuses a recipe that lacks its calibration text"
        needs = {m.needs for m in self.job.methods["lm_head"] if m.needs.streamed}
        assert len(needs) == 1, "planning refuses methods that want different statistics of the head"
        gathered = needs.pop().accumulator(self.spec.hidden_size)
        for batch in self._activations(state.step).batches(self.job.calibration.batch_size):
            gathered.add(frame.final_norm(batch).flatten(0, -2))
        value = gathered.value()
        return value, remark("lm_head", value, gathered)

    def _solve_tall(self, name: str, weight: Tensor, stat: Tensor | None) -> tuple[Solved, dict[int, float], str]:
        """Solve the embedding or the head, some rows at a time where the method allows it.

        Returns the result, the relative error of its output by width, and a note.
        """
        methods = self.job.methods.get(name, ())
        rows = self.job.slice_rows if all(m.rows_alone for m in methods) else weight.shape[0]
        parts: list[Solved] = []
        left, whole, notes = dict[int, float](), 0.0, list[str]()
        for start in range(0, weight.shape[0], rows):
            part: Solved = weight[start : start + rows]
            for method in methods:
                assert isinstance(part, Tensor), "a layer is quantized last"
                own = self._fisher(name, slice(start, start + rows)) if method.needs is Statistic.FISHER else stat
                before = part.to(torch.float32)
                part = method.solve(before, own)  # `Quantizer.at` gives the ends no outliers
                if isinstance(part, Quantized) and isinstance(method, Quantizer) and method.needs in _JUDGED:
                    if own is None:  # the embedding of a method that learns from inputs: ids have no Gram matrix
                        continue
                    part, errors, worse = safer(method, before, part, own)
                    counts = energy(before, own, single=method.needs is Statistic.FISHER)
                    left = {b: left.get(b, 0.0) + error * counts for b, error in errors.items()}
                    whole += counts
                    notes += [f"rows from {start} on: {worse}"] if worse else []
            parts.append(part.to(weight.dtype) if isinstance(part, Tensor) else part)
        output = {b: error / whole if whole else 0.0 for b, error in left.items()}
        coded = [part for part in parts if isinstance(part, Quantized)]
        made = Quantized.stack(coded) if coded else torch.cat([p for p in parts if isinstance(p, Tensor)])
        return made, output, "; ".join(notes)

    def _fisher(self, name: str, rows: slice = slice(None)) -> Tensor:
        assert self.job.fisher is not None, "gathered before a sweep whose methods need it"
        return self.job.fisher.value(name, rows)

    def _put(
        self,
        name: str,
        solved: Solved,
        original: Tensor,
        state: State,
        output: Mapping[int, float] = MappingProxyType({}),
        note: str = "",
    ) -> None:
        """Hand a result on and note how far it is from the original. output: relative error of its output, by width."""
        state.records = [r for r in state.records if r["name"] != name]
        noise: dict[str, float] = {}
        if isinstance(solved, Quantized):
            self.sink.quantized(name, solved, original)
            noise = {str(b): noise_ratio_db(original, solved, b, self.job.slice_rows) for b in solved.bits}
        else:
            self.sink.floating(f"{name}.weight", solved)
            if name in self.job.methods:
                noise = {"32": noise_ratio_db(original, solved, 0, self.job.slice_rows)}
        if noise:
            before = self.job.blocks if name.startswith("layers.") else ()
            record: dict[str, Any] = {
                "name": name,
                "method": "+".join(m.name for m in (*before, *self.job.methods[name])),
                "sqnr_db": noise,
            }
            record |= {"error": {str(b): float(f"{e:.4g}") for b, e in output.items()}} if output else {}
            state.records.append(record | ({"note": note} if note else {}))

    @staticmethod
    def _install(linears: Mapping[str, nn.Linear], solved: Mapping[str, Solved], rung: int) -> None:
        for name, linear in linears.items():
            linear.weight.data = at_width(solved[name], rung)


# ---- pure helpers


def _together(todo: Mapping[str, LayerMethod]) -> list[list[str]]:
    """Layers to solve at once: those of one BlockQuantizer, and every other layer alone."""
    joint: dict[BlockQuantizer, list[str]] = {}
    groups = []
    for name, method in todo.items():
        if not isinstance(method, BlockQuantizer):
            groups.append([name])
        elif method in joint:
            joint[method].append(name)
        else:
            groups.append(joint.setdefault(method, [name]))
    return groups


def at_width(solved: Solved, rung: int) -> Tensor:
    """The (out, in) float32 matrix a width means."""
    if isinstance(solved, Tensor):
        return solved.to(torch.float32)
    return solved.dequantize(solved.serving(rung))


def rows_of(solved: Solved, rung: int) -> Callable[[Tensor], Tensor]:
    """A function from row numbers to those rows in float32."""
    if isinstance(solved, Tensor):
        return lambda index: solved[index].to(torch.float32)
    return lambda index: solved.rows(index).dequantize(solved.serving(rung))


def as_inputs(batch: npt.NDArray[np.generic]) -> Tensor:
    """A batch as a model takes it: ids as int64, patches as float32, in memory of their own."""
    return torch.tensor(batch, dtype=torch.int64 if batch.dtype.kind == "i" else torch.float32)


def embed(frame: Frame, tokens: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Hidden states (batch, length, hidden) of (batch, length) tokens or patches, from only the rows they name."""
    if isinstance(frame, Encoder):
        return frame.embed(tokens, rows)
    unique, inverse = torch.unique(tokens, return_inverse=True)
    frame.embed_tokens.weight = nn.Parameter(rows(unique), requires_grad=False)
    return frame.embed(inverse)


def project(frame: Decoder, hidden: Tensor, solved: Solved, rung: int, rows: int = 1 << 13) -> Tensor:
    """Logits (length, vocab) of one sequence, from some rows of the head at a time."""
    head: nn.Embedding | nn.Linear = frame.embed_tokens if frame.spec.tied_head else frame.lm_head
    bias = getattr(head, "bias", None)
    parts = []
    for start in range(0, solved.shape[0], rows):
        here = slice(start, start + rows)
        part = solved[here] if isinstance(solved, Tensor) else solved.rows(here)
        head.weight = nn.Parameter(at_width(part, rung), requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias[here], requires_grad=False)
        parts.append(frame.finish(hidden)[0])
    if bias is not None:
        head.bias = bias
    return torch.cat(parts, -1)


def noise_ratio_db(original: Tensor, solved: Solved, rung: int, rows: int) -> float:
    """Signal to noise of the weights, 20 log10(||W|| / ||W - solved||) in dB to four digits; 999 where nothing changed."""
    signal = noise = 0.0
    for start in range(0, original.shape[0], rows):
        exact = original[start : start + rows].to(torch.float32)
        part = solved[start : start + rows] if isinstance(solved, Tensor) else solved.rows(slice(start, start + rows))
        signal += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        noise += float(torch.linalg.vector_norm(exact - at_width(part, rung), dtype=torch.float64)) ** 2
    if not noise or not signal:
        return 999.0 if not noise else -999.0
    return float(f"{10 * math.log10(signal / noise):.4g}")
