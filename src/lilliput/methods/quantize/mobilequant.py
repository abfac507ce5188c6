"""MobileQuant: learn the scales, clippings and ranges with which a model can be whole numbers throughout.

Every edge of docs/integer.md has one grid fixed in advance, every matrix rows, symmetric or with a whole zero each.
SmoothQuant's scales are folded into all legal pairs, ranges are read off calibration text, and then the scales of pairs,
the clipping of every row, the rounding of every weight and the step and zero of every edge of 8 bits are trained with
straight-through gradients: block by block against each block's output, the last against the logits, then the ranges through all blocks against what
the original puts out, the last block's states or the logits' distribution; or all of it through all blocks. These are run
again for the gradient and states lie on disk, so memory is that of one block and of the states between blocks.

Source: Tan et al., "MobileQuant: Mobile-friendly Quantization for On-device Language Models", EMNLP Findings 2024,
sections 3 and 4; Xiao et al., "SmoothQuant", ICML 2023, eq. 4; Shao et al., "OmniQuant", ICLR 2024, eq. 2; Cheng et
al., "Optimize Weight Rounding via Signed Gradient Descent", 2024, eq. 3, for `rounding`; Frantar et al., "GPTQ", ICLR
2023, algorithm 1, for roundings that are swept.
Deviation: scales and steps are trained as logarithms and zeros relative to their range, so that one set of rates serves
every model; queries and keys are tied as their rotation needs and values as their groups do, where the paper's code is
inexact or skips the pair; clipping starts from the least weighted error and not from 0.98; ranges of 16 bits have room;
ranges of the edges that usually have 16 bits are not trained; the divergence of the logits is the default target; weights
have one grid a row at 8 bits too; blocks are trained alone first, and end to end what does not turn roundings; roundings are trained as well, by Adam, or swept; early stopping.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.progress import Progress
from lilliput.core.spec import PADDING, AnySpec, EncoderSpec
from lilliput.data.streams import Batches
from lilliput.methods.base import IntegerMethod, Integers
from lilliput.methods.feedback import TOKENS, feed_back
from lilliput.methods.folding import fold_scales, watched_channels
from lilliput.methods.journal import Activations
from lilliput.methods.ranges import Loudness, Ranges, sensitivity, unlikeness, widest
from lilliput.methods.student import Student, local
from lilliput.methods.training import Loss, Phase, Regime, Saved, train
from lilliput.models.decoder import Decoder
from lilliput.models.encoder import Encoder
from lilliput.models.simulate import Simulation
from lilliput.models.sites import (
    WIDE,
    Site,
    before_rotation,
    read_by,
    run_block,
    run_end,
    run_start,
    site_policy,
    source_of,
)
from lilliput.numerics.observers import Rule
from lilliput.numerics.straight import best_share

CHECKS = 10
"""In all steps of a phase."""
GENTLE = 0.3
"""Of the rate of ranges, where the blocks are trained already."""


@dataclass(frozen=True, kw_only=True)
class MobileQuant(IntegerMethod):
    """Makes a decoder whole numbers.

    bits: of the weights, 8 or 4; end_bits: of embedding and head. sym: rows of 4 bits are symmetric, as those of 8 bits,
    of embedding and of head always are; else they have a zero each. sites: bits of edges by a pattern of their names, the last
    that matches counts. budget16: how many edges, or as a fraction what share of their bytes, get 16 bits, those that
    lose most at 8; all others that `sites` does not name get 8, but for scores, which always have 16. None for the usual policy.
    usual16: edges of 16 bits by the usual policy, the residual stream's, keep them, and the budget is for the others.
    rotary16: edges between a projection and the rotation of its heads have 16 bits, unless `sites` names them: what is
    rounded to 8 behind the rotation is then not rounded to 8 in front of it as well. The cache keeps codes of 8 bits.
    alpha: what SmoothQuant's scales leave to the weights, None for no such scales. rule, share, apart: how ranges of 8 bits
    are read off, as in `Observer`; apart: without the first position, which then saturates.
    let, lwc, ranges: train scales of pairs, clipping of rows, ranges of edges. rounding: of weights, trained with all else,
    swept behind it so that every column takes up what those before it got wrong, or to nearest.
    scope: all blocks together; one after the other, each for `steps`; or both, the latter and then, for a third of the
    steps, the ranges of all together: scales, clipping and roundings stay, since whatever moves them turns roundings
    that fit each other. loss: squared error of the states behind the last
    block, or divergence of the logits, for an encoder 1 - cosine of the vectors; one block alone has the former, but for the last.
    steps of `batch` rows; let_rate, clip_rate, range_rate, rounding_rate: peak changes a step, of logarithms, of logits, of
    logarithms and zeros (a tenth of it at 16 bits), and of roundings in steps. patience: checks, of which there are ten,
    without gain before training ends. held: share of the rows held out. seed: of the order of rows.
    """

    sym: bool = False
    sites: dict[str, int] = field(default_factory=dict, hash=False)
    budget16: int | float | None = None
    usual16: bool = False
    rotary16: bool = False
    alpha: float | None = 0.5
    rule: Rule = "percentile"
    share: float = 1e-4
    apart: bool = False
    let: bool = True
    lwc: bool = True
    ranges: bool = True
    rounding: Literal["trained", "swept", "nearest"] = "trained"
    scope: Literal["both", "end_to_end", "block"] = "both"
    loss: Literal["hidden", "logits"] = "logits"
    steps: int = 300
    batch: int = 4
    let_rate: float = 0.01
    clip_rate: float = 0.03
    range_rate: float = 0.01
    rounding_rate: float = 0.01
    patience: int = 4
    held: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("steps", 0), ("batch", 1), ("patience", 1)):
            if (value := getattr(self, key)) < least:
                raise ConfigError(f"{key} is {value}", where=f"{self.name}.{key}", fix=f"Give at least {least}")
        for key in ("let_rate", "clip_rate", "range_rate", "rounding_rate"):
            if not 0 <= (rate := getattr(self, key)) < 1:
                fix = "Give a rate from 0 to below 1, such as 0.01"
                raise ConfigError(f"{key} is {rate}", where=f"{self.name}.{key}", fix=fix)
        for key in ("alpha", "share", "held"):
            part = getattr(self, key)
            if part is not None and not 0 <= part <= (0.5 if key == "held" else 1):
                raise ConfigError(f"{key} is {part}", where=f"{self.name}.{key}", fix="Give a share such as 0.5")
        budget = self.budget16
        if budget is not None and (budget < 0 or (isinstance(budget, float) and budget > 1)):
            fix = "Give a number of edges such as 8, or a share of their bytes such as 0.1"
            raise ConfigError(f"budget16 is {budget}", where=f"{self.name}.budget16", fix=fix)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.steps > 0 and (self.let or self.lwc or self.ranges or self.rounding == "trained")

    @property
    def zeros(self) -> bool:
        """Whether rows of the blocks have a zero each."""
        return self.bits == 4 and not self.sym

    def named(self, spec: AnySpec) -> dict[str, int]:
        """Bits of the edges that are not left to the usual policy or to the budget, as `site_policy` takes them."""
        return dict.fromkeys(before_rotation(spec) if self.rotary16 else (), 16) | self.sites

    def make(self, model: Decoder | Encoder, batches: Batches, folder: Path, progress: Progress) -> Integers:
        """Return the integer model; see `IntegerMethod.make`.

        Raises QualityFailed, naming step and edge, where a loss or a gradient is not finite; Unsupported for an encoder
        of pictures, and for one block by block.
        """
        site_policy(model.spec, self.named(model.spec))  # a bad pattern fails before any work
        if isinstance(model.spec, EncoderSpec) and self.trains and self.scope == "block":
            fix = "Leave scope out"
            raise Unsupported("an encoder is trained end to end", where=f"{self.name}.scope", fix=fix)
        folder.mkdir(parents=True, exist_ok=True)
        return _Run(self, model.requires_grad_(False), batches, folder, progress).finish()


class _Run:
    """One model on its way to whole numbers."""

    def __init__(
        self, method: MobileQuant, model: Decoder | Encoder, batches: Batches, folder: Path, progress: Progress
    ) -> None:
        self.method, self.model, self.spec, self.folder, self.progress = method, model, model.spec, folder, progress
        self.rows = torch.from_numpy(np.array(batches.rows, np.int64))
        self.record: dict[str, Any] = {}
        kept = len(self.rows) - math.ceil(method.held * len(self.rows)) if method.held else len(self.rows)
        if method.trains and not 0 < kept < len(self.rows):
            what = f"{len(self.rows)} rows of text leave none to train on or none to hold out"
            raise ConfigError(what, where=f"{method.name}.held", fix="Give at least 2 rows and hold out a part of them")
        if isinstance(self.spec, EncoderSpec):  # texts of one length stand together, for they are run together
            length = (self.rows != PADDING).sum(1)
            parts = [torch.arange(kept), torch.arange(kept, len(self.rows))]
            self.rows = self.rows[torch.cat([part[length[part].argsort(stable=True)] for part in parts])]
        self.lengths: list[int] = (self.rows != PADDING).sum(1).tolist()
        self.trained, self.kept_out = list(range(kept)), list(range(kept, len(self.rows)))
        told = json.dumps(method.options(), sort_keys=True) + batches.sha256 + self.spec.model_dump_json()
        self.saved = Saved(folder / "training.safetensors", hashlib.sha256(told.encode()).hexdigest())

    def finish(self) -> Integers:
        """Do all that is left to do."""
        m = self.method
        with torch.no_grad():
            self.student = self.begin()
        if m.trains:
            self.record |= {"training": self.train(), "scope": m.scope, "loss": m.loss}
        if m.rounding == "swept" and not self._by_blocks:
            self._sweep()
        return self.student.result(self.model, self.record)

    @property
    def _by_blocks(self) -> bool:
        return self.method.trains and self.method.scope != "end_to_end" and not isinstance(self.spec, EncoderSpec)

    # ---- rows and streams

    def groups(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows that are run together, in order: `batch` of them at the most, of one length."""
        for length, same in groupby(rows, lambda row: self.lengths[row]):
            assert length > 0, "a text has tokens"
            every = list(same)
            yield from (every[at : at + self.method.batch] for at in range(0, len(every), self.method.batch))

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """Ids of rows of one length, without padding."""
        return self.rows[list(rows), : self.lengths[rows[0]]]

    def _batches(self, rows: Sequence[int]) -> Iterator[Tensor]:
        return (self.tokens(group) for group in self.groups(rows))

    @property
    def _every(self) -> range:
        return range(len(self.rows))

    def _stream(self, name: str, rows: int | None = None) -> Activations:
        """States of all rows, or of the first ones."""
        every, length = self.rows.shape
        return Activations(self.folder / f"{name}.f32", (rows or every, length, self.spec.hidden_size))

    def _write(self, name: str, batches: Iterator[Tensor]) -> None:
        """Keep states of rows, in the order of `groups`."""
        width = self.rows.shape[1]
        self._stream(name).write(F.pad(x, (0, 0, 0, width - x.shape[1])) for x in batches)

    def _read(self, name: str, rows: Sequence[int]) -> Iterator[Tensor]:
        stream = self._stream(name, len(rows))
        return (stream.take(group)[:, : self.lengths[group[0]]] for group in self.groups(rows))

    def _starts(self, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> Iterator[Tensor]:
        return (run_start(self.spec, tensors, tokens, self.student.site) for tokens in self._batches(rows))

    def _inputs(self, layer: int, rows: Sequence[int]) -> Iterator[Tensor]:
        """What comes into a block of the rounded model; of two blocks at a time there is any."""
        return self._read(f"rounded-{layer % 2}", rows)

    def _enough(self) -> Sequence[int]:
        """Rows that `feed_back` is to read: of an encoder all, since they are in order of length."""
        widest = max(columns for _, columns in self.spec.linears(0).values())
        if isinstance(self.spec, EncoderSpec):
            return self._every
        return self.trained[: TOKENS * widest // self.rows.shape[1] + 1]

    # ---- before training

    def begin(self) -> Student:
        """Fold scales, read off ranges, choose widths."""
        m, spec = self.method, self.spec
        loud = Loudness(watched_channels(spec))
        start = Simulation(self.model, {}, {})
        self._write("targets", (start.states(tokens, loud) for tokens in self._batches(self._every)))
        divided = {} if m.alpha is None else fold_scales(self.model, loud, m.alpha, turned=m.let)
        policy = site_policy(spec, m.named(spec))
        watched = Ranges(policy, m.rule, m.share, m.apart, read_by(spec))
        folded = Simulation(self.model, {}, {})
        for tokens in self._batches(self._every):
            folded.run(tokens, watched)
        if m.budget16 is not None:
            policy = self._widths(folded, watched, policy)
        shares = {}
        for layer, block in enumerate(self.model.blocks if m.lwc else ()):
            for name in spec.linears(layer):
                edge = source_of(spec, name)
                energy = loud.energy(edge) / divided.get(edge, torch.ones(())).square()
                shares[name] = best_share(block.get_parameter(local(name)).data, energy, m.bits, sym=not m.zeros)
        learns = {"scales": m.let, "ranges": m.ranges, "roundings": m.rounding != "nearest"}
        return Student(m, self.model, shares, watched.grids(policy), zeros=m.zeros, **learns)

    def _widths(self, folded: Simulation, watched: Ranges, policy: dict[str, int]) -> dict[str, int]:
        """The policy with 16 bits where they are needed most."""
        m = self.method
        assert m.budget16 is not None
        named = m.named(self.spec)
        low, high = site_policy(self.spec, {"*": 8} | named), site_policy(self.spec, {"*": 16} | named)
        free = {name: 8 for name in policy if low[name] != high[name] and not name.endswith(WIDE)}
        if m.usual16:
            free = {name: 8 for name in free if policy[name] == 8}
        self.progress.begin("sensitivity of edges", len(free))
        rows = list(self._batches(self.kept_out or self.trained))
        if not isinstance(self.spec, EncoderSpec):
            rows = rows[:4]  # an encoder's are short, and in order of their lengths
        found = sensitivity(folded, watched, free, rows, lambda: self.progress.advance(1))
        chosen = widest(found, m.budget16, watched.sizes)
        self.record |= {"sensitivity": found, "sixteen": chosen}
        return policy | free | dict.fromkeys(chosen, 16)

    # ---- training

    def train(self) -> list[dict[str, Any]]:
        """Train what `begin` returned, and tell how every phase went."""
        m = self.method
        # The float ends, for the logits of targets.
        self.original = {n: t.detach() for n, t in self.model.state_dict().items() if not n.startswith("layers.")}
        batched = isinstance(self.spec, EncoderSpec)
        regime = Regime(
            method=m.name,
            units=list(self.groups(self.trained)) if batched else [[row] for row in self.trained],
            held=[self.kept_out[at : at + m.batch] for at in range(0, len(self.kept_out), m.batch)],
            batch=m.batch,
            checks=CHECKS,
            patience=m.patience,
            seed=m.seed,
        )
        return train(self.student, self._phases(), regime, self.saved, self.progress)

    def _rates(self) -> dict[str, float]:
        """Peak rates of what is to be trained, by name."""
        m = self.method
        found = {"let": m.let_rate, "clip": m.clip_rate}
        if m.ranges:
            found |= dict.fromkeys(("step/8", "zero/8"), m.range_rate)
            found |= dict.fromkeys(("step/16", "zero/16"), m.range_rate / 10)
        if m.rounding == "trained":
            found["nudge"] = m.rounding_rate
        every = {name: found.get(name, found.get(name.split("/")[0])) for name in self.student.values}
        return {name: rate for name, rate in every.items() if rate is not None}

    @torch.no_grad()
    def _sweep(self) -> None:
        """Choose all roundings by `feed_back`."""
        rows = self._enough()
        self._write("rounded-0", self._starts(self.student.ends, rows))
        self.progress.begin("roundings", self.spec.num_layers)
        for layer in range(self.spec.num_layers):
            feed_back(self.student, layer, partial(self._inputs, layer, rows))
            self._pass(layer, rows)
            self.progress.advance(1)

    def _pass(self, layer: int, rows: Sequence[int]) -> None:
        """Have ready what comes into the next block."""
        tensors, site = self.student.rounded(layer), self.student.site
        made = (run_block(self.spec, layer, tensors, x, site) for x in self._inputs(layer, rows))
        self._write(f"rounded-{(layer + 1) % 2}", made)

    def _phases(self) -> Iterator[Phase]:
        """What is to be trained, in order. Between the phases of blocks the streams of both models move on."""
        m, rates = self.method, self._rates()
        if not self._by_blocks:
            yield Phase("all", m.steps, self._whole, rates)
            return
        yield from self._one_by_one(m.steps, rates)
        ranges = {name: GENTLE * rate for name, rate in rates.items() if name.split("/")[0] in ("step", "zero")}
        if m.scope == "both" and ranges:
            yield Phase("all", math.ceil(m.steps / 3), self._whole, ranges)

    def _one_by_one(self, steps: int, rates: Mapping[str, float]) -> Iterator[Phase]:
        """A phase for each block."""
        every = self._every
        with torch.no_grad():
            self._write("rounded-0", self._starts(self.student.ends, every))
            self._write("float-0", self._starts(self.original, every))
        for layer in range(self.spec.num_layers):
            now, after = f"float-{layer % 2}", f"float-{(layer + 1) % 2}"
            with torch.no_grad():
                base = self.student.base[layer]
                self._write(after, (run_block(self.spec, layer, base, x) for x in self._read(now, every)))
            yield Phase(f"layers.{layer}", steps, self._of_block(layer, self._stream(after)), rates)
            with torch.no_grad():
                if self.method.rounding == "swept":
                    feed_back(self.student, layer, partial(self._inputs, layer, self._enough()))
                self._pass(layer, every)

    def _of_block(self, layer: int, target: Activations) -> Loss:
        """The loss of one block, of the rounded model's inputs."""
        given = self._stream(f"rounded-{layer % 2}")
        last = layer + 1 == self.spec.num_layers
        edge = "final.input" if last else f"layers.{layer + 1}.input"

        def loss(rows: Sequence[int], site: Site | None) -> Tensor:
            out = self.student.block(layer, given.take(rows), site)
            if last and self.method.loss == "logits":  # nothing but the head is behind it
                return self._unlike(out, target.take(rows), site)
            # The block's output is read behind the site of whoever reads it, which learns its range here.
            return _relative((site or self.student.site)(edge, out), target.take(rows))

        return loss

    def _whole(self, rows: Sequence[int], site: Site | None = None) -> Tensor:
        """The loss of the whole model on some rows, the mean over them."""
        groups = list(self.groups(sorted(rows, key=self.lengths.__getitem__)))
        return torch.stack([len(group) * self._part(group, site) for group in groups]).sum() / len(rows)

    def _part(self, rows: Sequence[int], site: Site | None) -> Tensor:
        """The same for rows that are run together."""
        hidden = self.student.hidden(self.tokens(rows), site)
        target = self._stream("targets").take(rows)[:, : hidden.shape[1]]
        if self.method.loss == "hidden":
            return _relative(hidden, target)
        return self._unlike(hidden, target, site)

    def _unlike(self, hidden: Tensor, target: Tensor, site: Site | None) -> Tensor:
        """The divergence of what states behind the last block come to."""
        with torch.no_grad():
            wanted = run_end(self.spec, self.original, target)
        return unlikeness(self.spec, self.student.logits(hidden, site), wanted)


def _relative(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square().mean() / target.square().mean()
