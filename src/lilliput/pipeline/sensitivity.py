"""How much the model loses when one layer alone runs at a width: what an allocation of widths is decided by.

For every layer and width the layer is solved as the recipe would, put into the float model, and the mean KL divergence
of the model's next-token distribution from the float one is taken over some rows of the calibration text. Only blocks
from the changed one on are run again. Results are kept block by block, so that a killed run goes on.

Source: the sensitivity metric of Cai et al., "ZeroQ", CVPR 2020, section 3.2 (KL of the outputs with one layer
quantized). Deviation: real text in the place of distilled inputs, and every layer as its own method solves it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lilliput.artifact.disk import replacing
from lilliput.core.errors import InputCorrupt
from lilliput.core.progress import Progress
from lilliput.data.streams import I32
from lilliput.methods import outliers
from lilliput.methods.base import LayerMethod, Quantizer, Statistic
from lilliput.methods.calibration import gathered
from lilliput.methods.fisher import Fisher
from lilliput.methods.journal import Activations
from lilliput.methods.sources import Source
from lilliput.models import Block
from lilliput.numerics.nested import Quantized

SLICE = 2048
"""Tokens of calibration text measured on, rounded up to whole rows. Each token compares two whole distributions, so
far fewer are needed than for a loss."""

Losses = dict[str, dict[int, float]]


class Sensitivities:
    """The measurement over one model. folder: where results and the float model's outputs are kept.

    methods: those of every layer in order; one that ends with a Quantizer is measured at every width of its ladder.
    rows: (samples, length) token ids; the first ones are used. fisher: what methods that need Statistic.FISHER are given.
    """

    def __init__(
        self,
        source: Source,
        methods: Mapping[str, Sequence[LayerMethod]],
        rows: I32,
        fisher: Fisher | None,
        folder: Path,
        progress: Progress,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._source, self._fisher, self._folder, self._progress = source, fisher, folder, progress
        self._methods = {n: chain for n, chain in methods.items() if chain and isinstance(chain[-1], Quantizer)}
        self._file = folder / "sensitivity.json"
        count = min(len(rows), -(-SLICE // rows.shape[1]))
        self._tokens = torch.tensor(rows[:count], dtype=torch.int64)

    @torch.no_grad()
    def measure(self) -> Losses:
        """Mean KL in nats a token of the float model from itself with one layer coded, by layer and width."""
        found = self._load()
        if found.keys() >= self._methods.keys():
            return found
        self._model = self._source.whole()
        spec = self._model.spec
        samples, length = self._tokens.shape
        self._exact = Activations(self._folder / "exact.f32", (samples, length, spec.vocab_size))
        self._exact.write(self._logs(self._model.embed(row), 0) for row in _singly(self._tokens))
        self._progress.begin("sensitivity", len(self._methods), done=len(found))
        self._layer("embed_tokens", self._model.embed_tokens, None, -1, None, found)
        hidden = self._model.embed(self._tokens)
        for index, block in enumerate(self._model.blocks):
            assert isinstance(block, Block), "a decoder has blocks"
            linears = block.linears()
            todo = [name for name in linears if name in self._methods and name not in found]
            stats = self._statistics(block, hidden, todo)
            for name in todo:
                self._layer(name, linears[name], stats.get(name), index, hidden, found)
            hidden = torch.cat([block(row) for row in _singly(hidden)])
        if not spec.tied_head:
            normed = self._model.final_norm(hidden).flatten(0, -2)
            needs = {m.needs for m in self._methods.get("lm_head", ()) if m.needs.streamed}
            sums = [need.accumulator(spec.hidden_size) for need in needs]
            for total in sums:
                total.add(normed)
            stat = sums[0].value() if sums else None
            self._layer("lm_head", self._model.lm_head, stat, spec.num_layers, hidden, found)
        return found

    def _layer(
        self,
        name: str,
        module: nn.Embedding | nn.Linear,
        stat: Tensor | None,
        index: int,
        hidden: Tensor | None,
        found: Losses,
    ) -> None:
        """Measure one layer at all its widths. hidden: what enters block `index`; None for the tokens themselves."""
        if name in found or name not in self._methods:
            return
        *before, quantizer = self._methods[name]
        assert isinstance(quantizer, Quantizer), "chosen for that"
        weight = module.weight.data
        for method in before:
            changed = method.solve(weight, self._own(name, method, stat))
            assert isinstance(changed, Tensor), "a layer is quantized last"
            weight = changed
        losses = {}
        for bits in quantizer.bits:
            made = outliers.solve(replace(quantizer, bits=(bits,)), weight, self._own(name, quantizer, stat))
            assert isinstance(made, Quantized), "a quantizer makes codes"
            with _instead(module, made):
                losses[bits] = self._loss(index, hidden)
            if not math.isfinite(losses[bits]):
                what = f"at {bits} bits the model says NaN or infinity on the calibration text"
                raise InputCorrupt(what, where=name, fix="Check the model, or leave this layer out of the recipe")
        found[name] = losses
        self._save(found)
        self._progress.advance(1)

    def _own(self, name: str, method: LayerMethod, stat: Tensor | None) -> Tensor | None:
        if method.needs is Statistic.FISHER:
            assert self._fisher is not None, "gathered before"
            return self._fisher.value(name)
        return stat if method.needs.streamed else None

    def _statistics(self, block: Block, hidden: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        needs = {n: m.needs for n in names for m in self._methods[n] if m.needs.streamed}
        sums = gathered(block, needs, _singly(hidden))
        return {name: total.value() for name, total in sums.items()}

    def _logs(self, hidden: Tensor, start: int) -> Tensor:
        """Log-probabilities (1, length, vocab) of one row that enters block `start`."""
        for block in list(self._model.blocks)[start:]:
            hidden = block(hidden)
        return torch.log_softmax(self._model.finish(hidden).float(), -1)

    def _loss(self, index: int, hidden: Tensor | None) -> float:
        total, count = 0.0, 0
        for at, tokens in enumerate(_singly(self._tokens)):
            row = self._model.embed(tokens) if hidden is None else hidden[at : at + 1]
            logs, exact = self._logs(row, max(index, 0)), self._exact.take([at])
            kl = (exact.exp() * (exact - logs)).sum(-1)
            total, count = total + float(kl.sum(dtype=torch.float64)), count + kl.numel()
        return 0.0 if total < 0 else total / count

    def _load(self) -> Losses:
        if not self._file.exists():
            return {}
        try:
            told = json.loads(self._file.read_text("utf-8"))
            return {name: {int(b): float(loss) for b, loss in losses.items()} for name, losses in told.items()}
        except (ValueError, AttributeError) as error:
            fix = "Give --no-resume to start anew"
            raise InputCorrupt(f"was damaged ({error})", where=str(self._file), fix=fix) from None

    def _save(self, found: Losses) -> None:
        with replacing(self._file) as fresh:
            fresh.write_text(json.dumps(found, indent=1), "utf-8")


def _singly(batch: Tensor) -> Iterator[Tensor]:
    """The rows of a batch, each as a batch of one."""
    return (batch[at : at + 1] for at in range(len(batch)))


@contextmanager
def _instead(module: nn.Embedding | nn.Linear, made: Quantized) -> Iterator[None]:
    """While the context lasts, the module has the weights that codes of one width mean."""
    weight = module.weight.data
    try:
        module.weight.data = made.dequantize(made.bits[-1])
        yield
    finally:
        module.weight.data = weight
