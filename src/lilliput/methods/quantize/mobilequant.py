"""MobileQuant: learn the scales, clippings and ranges with which a model can be whole numbers throughout.

Every edge of docs/integer.md has one grid fixed in advance, every matrix symmetric rows. SmoothQuant's scales are folded
into all legal pairs, ranges are read off calibration text, and then the logarithms of the pairs' scales, the clipping of
every row, the rounding of every weight and the step and zero of every edge are trained together, through all blocks, with straight-through gradients,
against what the original puts out: the last block's states, or the logits' distribution. Blocks are run again for the
gradient and the targets lie on disk, so memory is that of one block and of the states between blocks.

A part of the text is held out. The state that does best there is kept, the one before training among the candidates.

Source: Tan et al., "MobileQuant: Mobile-friendly Quantization for On-device Language Models", EMNLP Findings 2024,
sections 3 and 4; Xiao et al., "SmoothQuant", ICML 2023, eq. 4; Shao et al., "OmniQuant", ICLR 2024, eq. 2; Cheng et
al., "Optimize Weight Rounding via Signed Gradient Descent", 2024, eq. 3, for `rounding`.
Deviation: scales and steps are trained as logarithms and zeros relative to their range, so that one set of rates serves
every model; queries and keys are tied as their rotation needs and values as their groups do, where the paper's code is
inexact or skips the pair; clipping starts from the least weighted error and not from 0.98; ranges of 16 bits have room;
the divergence of the logits is the default target; weights have one grid a row at 8 bits too; roundings are trained as
well, by Adam; early stopping.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lilliput.core.errors import ConfigError, QualityFailed, Unsupported
from lilliput.core.graph import Grid
from lilliput.core.progress import Progress
from lilliput.core.spec import PADDING, EncoderSpec
from lilliput.data.streams import Batches
from lilliput.methods.base import IntegerMethod, Integers
from lilliput.methods.journal import Activations, sync
from lilliput.methods.ranges import Loudness, Ranges, sensitivity, unlikeness, widest
from lilliput.models.decoder import Block, Decoder
from lilliput.models.encoder import Encoder
from lilliput.models.pairs import Pair, pairs, smoothing
from lilliput.models.simulate import Simulation
from lilliput.models.sites import PROBABILITIES, WIDE, Site, read_by, run_block, run_end, run_start, site_policy
from lilliput.numerics.learned import cosine
from lilliput.numerics.observers import Rule
from lilliput.numerics.straight import best_share, coded_rows, on_grid, on_rows

EVERY = 60.0
"""Seconds between saved states."""
BETAS = (0.9, 0.95)
_CHECKS = 10
_WARM = 10
"""Steps over which the rates rise."""


@dataclass(frozen=True, kw_only=True)
class MobileQuant(IntegerMethod):
    """Makes a decoder whole numbers.

    bits: of the weights, 8 or 4; end_bits: of embedding and head. sites: bits of edges by a pattern of their names, the last
    that matches counts. budget16: how many edges, or as a fraction what share of their bytes, get 16 bits, those that
    lose most at 8; all others that `sites` does not name get 8, but for scores, which always have 16. None for the usual policy.
    usual16: edges of 16 bits by the usual policy, the residual stream's, keep them, and the budget is for the others.
    alpha: what SmoothQuant's scales leave to the weights, None for no such scales. rule, share, apart: how ranges of 8 bits
    are read off, as in `Observer`; apart: without the first position, which then saturates.
    let, lwc, ranges, rounding: train scales of pairs, clipping of rows, ranges of edges, the roundings of weights.
    scope: all blocks together or one after the other, each for `steps`. loss: squared error of the states behind the last
    block, or divergence of the logits, for an encoder 1 - cosine of the vectors; one block alone always has the former.
    steps of `batch` rows; let_rate, clip_rate, range_rate, rounding_rate: peak changes a step, of logarithms, of logits, of
    logarithms and zeros (a tenth of it at 16 bits), and of roundings in steps. patience: checks, of which there are ten,
    without gain before training ends. held: share of the rows held out. seed: of the order of rows.
    """

    sites: dict[str, int] = field(default_factory=dict, hash=False)
    budget16: int | float | None = None
    usual16: bool = False
    alpha: float | None = 0.5
    rule: Rule = "percentile"
    share: float = 1e-4
    apart: bool = False
    let: bool = True
    lwc: bool = True
    ranges: bool = True
    rounding: bool = True
    scope: Literal["end_to_end", "block"] = "end_to_end"
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
        return self.steps > 0 and (self.let or self.lwc or self.ranges or self.rounding)

    def make(self, model: Decoder | Encoder, batches: Batches, folder: Path, progress: Progress) -> Integers:
        """Return the integer model; see `IntegerMethod.make`.

        Raises QualityFailed, naming step and edge, where a loss or a gradient is not finite; Unsupported for an encoder
        of pictures, and for one block by block.
        """
        site_policy(model.spec, self.sites)  # a bad pattern fails before any work
        if isinstance(model.spec, EncoderSpec) and self.trains and self.scope == "block":
            fix = "Leave scope out"
            raise Unsupported("an encoder is trained end to end", where=f"{self.name}.scope", fix=fix)
        folder.mkdir(parents=True, exist_ok=True)
        return _Run(self, model.requires_grad_(False), batches, folder, progress).finish()


class Student:
    """A model rounded everywhere, and what may be trained of it.

    values: every trainable tensor by name; "let/I/K" logarithms of the scales of pair K of block I; "clip/NAME" logits of
    the share of each row's reach, (out, 1); "nudge/NAME" offsets of roundings in steps, (out, in); "step/B" logarithms
    of steps and "zero/B" zeros in halves of the range, one number an edge of B bits.
    """

    def __init__(
        self, method: MobileQuant, model: Decoder | Encoder, shares: Mapping[str, Tensor], grids: Mapping[str, Grid]
    ) -> None:
        self.method, self.spec = method, model.spec
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self.base = [_within(state, i) for i in range(model.spec.num_layers)]
        self.ends = {name: value for name, value in state.items() if not name.startswith("layers.")}
        for name in _ends(self.spec):
            self.ends[f"{name}.weight"] = on_rows(state[f"{name}.weight"], 1.0, method.width(name))
        self._float_ends = {n: state[f"{n}.weight"] for n in _ends(self.spec)}
        self.values: dict[str, Tensor] = {}
        self.pairs: list[list[Pair]] = []
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            self.pairs.append(pairs(block) if method.let else [])
            for number, pair in enumerate(self.pairs[-1]):
                self.values[f"let/{index}/{number}"] = torch.zeros(pair.width)
        for name, share in shares.items():
            # A share of 1 has no logit, and one near it no gradient.
            self.values[f"clip/{name}"] = torch.logit(share.clamp_max(0.98))
        if method.rounding:
            for index, tensors in enumerate(self.base):
                for name in self.spec.linears(index):
                    self.values[f"nudge/{name}"] = torch.zeros_like(tensors[_local(name)])
        self._place: dict[str, tuple[int, int]] = {}
        for bits in (8, 16):
            own = {name: grid for name, grid in grids.items() if grid.bits == bits}
            self._place |= {name: (bits, i) for i, name in enumerate(own)}
            self.values[f"step/{bits}"] = torch.tensor([g.scale for g in own.values()]).log()
            self.values[f"zero/{bits}"] = torch.tensor([g.zero / 2.0 ** (bits - 1) for g in own.values()])
        self._fixed = {n: g for n, g in grids.items() if not method.ranges or n.endswith(PROBABILITIES)}

    def rates(self) -> dict[str, float]:
        """Peak rates of the tensors that are trained, by name."""
        m = self.method
        peak = {"let": m.let_rate, "clip": m.clip_rate, "nudge": m.rounding_rate}
        if m.ranges:
            peak |= {"step": m.range_rate, "zero": m.range_rate}
        found = {name: peak[name.split("/")[0]] for name in self.values if name.split("/")[0] in peak}
        return {name: rate / 10 if name in ("step/16", "zero/16") else rate for name, rate in found.items()}

    def tame(self) -> None:
        """Bring back what a step of training has moved out of bounds."""
        for name, value in self.values.items():
            reach = {"zero": 1.0, "nudge": 0.5}.get(name.split("/")[0])
            if reach is not None:
                value.data.clamp_(-reach, reach)

    def floats(self, layer: int) -> dict[str, Tensor]:
        """A block's tensors with the scales of pairs in them, before rounding; by name in the block."""
        now = dict(self.base[layer])
        for number, pair in enumerate(self.pairs[layer]):
            now |= pair.scaled(now, self.values[f"let/{layer}/{number}"].exp())
        return now

    def rounded(self, layer: int) -> dict[str, Tensor]:
        """A block's tensors, the matrices rounded."""
        now = self.floats(layer)
        for name in self.spec.linears(layer):
            key = _local(name)
            now[key] = on_rows(now[key], self._share(name), self.method.bits, self.values.get(f"nudge/{name}"))
        return now

    def _share(self, name: str) -> Tensor | float:
        logit = self.values.get(f"clip/{name}")
        return 1.0 if logit is None else torch.sigmoid(logit)

    def site(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `models.sites.Site`."""
        bits, at = self._place[name]
        if bits == 16 and name in self._fixed and torch.is_grad_enabled():
            return x  # nothing to learn, and nothing to learn from
        step, zero = self.values[f"step/{bits}"][at].exp(), self.values[f"zero/{bits}"][at] * 2 ** (bits - 1)
        if name in self._fixed:
            step, zero = step.detach(), zero.detach()
        return on_grid(x, step, zero, bits)

    def block(self, layer: int, x: Tensor, site: Site | None = None) -> Tensor:
        """What a block puts out; see `run_block`. With gradients it is run again for them."""
        use = site or self.site

        def run(x: Tensor) -> Tensor:
            return run_block(self.spec, layer, self.rounded(layer), x, use)

        if not torch.is_grad_enabled():
            return run(x)
        out: Tensor = checkpoint(run, x, use_reentrant=False)
        return out

    def hidden(self, tokens: Tensor, site: Site | None = None) -> Tensor:
        """States behind the last block."""
        hidden = run_start(self.spec, self.ends, tokens, site or self.site)
        for layer in range(self.spec.num_layers):
            hidden = self.block(layer, hidden, site)
        return hidden

    def logits(self, hidden: Tensor, site: Site | None = None) -> Tensor:
        """Logits of states behind the last block, or vectors."""
        return run_end(self.spec, self.ends, hidden, site or self.site)

    @torch.no_grad()
    def result(self, model: Decoder | Encoder, record: Mapping[str, Any]) -> Integers:
        """What training came to, its float tensors put into `model`."""
        m, codes = self.method, {}
        for name in _ends(self.spec):
            codes[name] = coded_rows(self._float_ends[name], 1.0, m.width(name))
        for layer in range(self.spec.num_layers):
            now = self.floats(layer)
            for name in self.spec.linears(layer):
                codes[name] = coded_rows(now[_local(name)], self._share(name), m.bits, self.values.get(f"nudge/{name}"))
            for name, value in now.items():
                model.get_parameter(f"layers.{layer}.{name}").data.copy_(value)
        order = {name: codes[name] for name in self.spec.matrices()}
        return Integers(model, order, self.grids(), record)

    def grids(self) -> dict[str, Grid]:
        """The grid of every edge."""
        found = {}
        for name, (bits, at) in self._place.items():
            top = 2 ** (bits - 1)
            zero = round(float(self.values[f"zero/{bits}"][at]) * top)
            scale = float(self.values[f"step/{bits}"][at].exp())
            found[name] = self._fixed.get(name) or Grid(
                bits=8 if bits == 8 else 16, scale=scale, zero=max(-top, min(top - 1, zero))
            )
        return found


def _within(state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    at = f"layers.{layer}."
    return {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}


def _local(name: str) -> str:
    """A linear layer's weight by its name in the block."""
    return f"{name.split('.', 2)[2]}.weight"


def _ends(spec: Any) -> list[str]:
    return [name for name in spec.matrices() if not name.startswith("layers.")]


@dataclass
class _Phase:
    """One training: of the whole model, or of one block. loss: of some rows, by their numbers."""

    name: str
    steps: int
    loss: Callable[[Sequence[int], Site | None], Tensor]


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
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def finish(self) -> Integers:
        """Do all that is left to do."""
        with torch.no_grad():
            self.student = self._begin()
        if self.method.trains:
            self.original = self._originals()
            self._train()
        return self.student.result(self.model, self.record)

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

    # ---- before training

    def _begin(self) -> Student:
        """Fold SmoothQuant's scales, read off ranges, choose widths."""
        m, spec = self.method, self.spec
        blocks = [block for block in self.model.blocks if isinstance(block, Block)]
        loud = Loudness(_edge(spec, i, name) for i in range(spec.num_layers) for name in _inputs(spec))
        start = Simulation(self.model, {}, {})
        states = (start.states(tokens, loud) for tokens in self._batches(range(len(self.rows))))
        width = self.rows.shape[1]
        self._write("targets", (F.pad(x, (0, 0, 0, width - x.shape[1])) for x in states))
        divided: dict[str, Tensor] = {}
        if m.alpha is not None:
            for layer, block in enumerate(blocks):
                own = dict(block.named_parameters())
                for pair in pairs(block):
                    if pair.kind == "query_key":
                        if m.let:
                            pair.fold(block, _balance(spec, pair, loud, layer))
                        continue
                    edge = _edge(spec, layer, _source(spec, pair.multiplied[0]))
                    weights = [own[f"{name}.weight"].data for name in pair.multiplied]
                    scale = smoothing(pair, loud.peak(edge), weights, m.alpha)
                    pair.fold(block, scale)
                    divided[edge] = scale[pair.columns]
        policy = site_policy(spec, m.sites)
        watched = Ranges(policy, m.rule, m.share, m.apart, read_by(spec))
        folded = Simulation(self.model, {}, {})
        for tokens in self._batches(range(len(self.rows))):
            folded.run(tokens, watched)
        if m.budget16 is not None:
            policy = self._widths(folded, watched, policy)
        shares = {}
        for layer, block in enumerate(blocks if m.lwc else ()):
            for name in spec.linears(layer):
                edge = _edge(spec, layer, _source(spec, name.split(".", 2)[2]))
                energy = loud.energy(edge) / divided.get(edge, torch.ones(())).square()
                shares[name] = best_share(block.get_parameter(_local(name)).data, energy, m.bits)
        return Student(m, self.model, shares, watched.grids(policy))

    def _widths(self, folded: Simulation, watched: Ranges, policy: dict[str, int]) -> dict[str, int]:
        """The policy with 16 bits where they are needed most."""
        m = self.method
        assert m.budget16 is not None
        named = site_policy(self.spec, {"*": 8} | m.sites), site_policy(self.spec, {"*": 16} | m.sites)
        free = {name: 8 for name in policy if named[0][name] != named[1][name] and not name.endswith(WIDE)}
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

    # ---- targets

    def _write(self, name: str, batches: Iterator[Tensor]) -> None:
        self._stream(name).write(batches)

    def _stream(self, name: str) -> Activations:
        return Activations(self.folder / f"{name}.f32", (*self.rows.shape, self.spec.hidden_size))

    def _originals(self) -> dict[str, Tensor]:
        """The float ends, for the logits of targets."""
        return {n: t.detach() for n, t in self.model.state_dict().items() if not n.startswith("layers.")}

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
        with torch.no_grad():
            wanted = run_end(self.spec, self.original, target)
        return unlikeness(self.spec, self.student.logits(hidden, site), wanted)

    def _phases(self) -> Iterator[_Phase]:
        """What is to be trained, in order. Between the phases of blocks the streams of both models move on."""
        m, count = self.method, self.spec.num_layers
        if m.scope == "end_to_end":
            yield _Phase("all", m.steps, self._whole)
            return
        every = range(len(self.rows))
        with torch.no_grad():
            self._write("rounded-0", (run_start(self.spec, self.student.ends, t) for t in self._batches(every)))
            self._write("float-0", (run_start(self.spec, self.original, t) for t in self._batches(every)))
        for layer in range(count):
            now, after = layer % 2, (layer + 1) % 2
            x, clean = self._stream(f"rounded-{now}"), self._stream(f"float-{now}")
            with torch.no_grad():
                base = self.student.base[layer]
                self._write(f"float-{after}", (run_block(self.spec, layer, base, b) for b in clean.batches(m.batch)))
            target = self._stream(f"float-{after}")

            def loss(
                rows: Sequence[int],
                site: Site | None,
                layer: int = layer,
                x: Activations = x,
                target: Activations = target,
            ) -> Tensor:
                # The block's output is read behind the site of whoever reads it, which learns its range here.
                out = self.student.block(layer, x.take(rows), site)
                edge = f"layers.{layer + 1}.input" if layer + 1 < count else "final.input"
                return _relative((site or self.student.site)(edge, out), target.take(rows))

            yield _Phase(f"layers.{layer}", m.steps, loss)
            with torch.no_grad():
                run = self.student.block
                self._write(f"rounded-{after}", (run(layer, b) for b in x.batches(m.batch)))

    # ---- training

    def _train(self) -> None:
        m, rates = self.method, self.student.rates()
        saved = self._load()
        done: dict[str, Any] = json.loads(saved.pop("told")) if saved else {"phase": 0, "history": []}
        history = done["history"]
        for number, phase in enumerate(self._phases()):
            if number < done["phase"]:
                # Its result is in what was loaded, or will be: the values of a phase that is over do not change.
                self._put(saved)
                continue
            state = saved if number == done["phase"] else {}
            history.append(_Training(self, phase, number, rates, state, done if state else {}, history).run())
        self.record |= {"training": history, "scope": m.scope, "loss": m.loss}

    def _put(self, saved: Mapping[str, Tensor]) -> None:
        for name, value in self.student.values.items():
            value.data.copy_(saved[f"value/{name}"])

    @property
    def file(self) -> Path:
        """Where the state of training is kept."""
        return self.folder / "training.safetensors"

    def _load(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        with safe_open(self.file, framework="pt") as file:
            told = file.metadata()
            if told["digest"] != self.digest:
                return {}
            found: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        return found | {"told": told["told"]}

    def save(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Replace the saved state; on disk when this returns."""
        fresh = self.file.with_suffix(".new")
        metadata = {"digest": self.digest, "told": json.dumps(told)}
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh, metadata=metadata)
        sync(fresh)
        fresh.replace(self.file)


class _Training:
    """One phase. A killed one goes on from the last saved step as if nothing had happened."""

    def __init__(
        self,
        run: _Run,
        phase: _Phase,
        number: int,
        rates: Mapping[str, float],
        saved: Mapping[str, Tensor],
        told: Mapping[str, Any],
        history: list[dict[str, Any]],
    ) -> None:
        self.own, self.phase, self.number, self.history = run, phase, number, history
        self.student = run.student
        self.values = {name: self.student.values[name].requires_grad_() for name in rates}
        groups: list[dict[str, Any]] = [{"params": [self.values[n]], "rate": rate} for n, rate in rates.items()]
        self.adam = torch.optim.Adam(groups, lr=1.0, betas=BETAS, eps=1e-12)
        self.first, self.best_step, self.least, self.at_start = 0, 0, math.inf, math.inf
        self.stale = 0
        self.best = {n: v.detach().clone() for n, v in self.values.items()}
        if saved:
            run._put(saved)
            self.first, self.best_step, self.stale = told["step"], told["best_step"], told["stale"]
            self.least, self.at_start = told["least"], told["at_start"]
            for name, value in self.values.items():
                self.best[name] = saved[f"best/{name}"]
                moments = {k: saved[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in saved}
                if moments:
                    self.adam.state[value] = moments

    def run(self) -> dict[str, Any]:
        """Train to the end; leaves the best values in the student, and tells how it went."""
        m, steps = self.own.method, self.phase.steps
        every = max(1, steps // _CHECKS)
        self.own.progress.begin(f"training {self.phase.name}", steps, done=self.first)
        if not self.first:
            self.at_start = self.least = self._held(0)
        order, saved, step = self._order(), time.monotonic(), self.first
        while step < steps and self.stale < m.patience:
            self._step(step, [next(order) for _ in range(m.batch)])
            step += 1
            self.own.progress.advance(1)
            if step % every == 0 or step == steps:
                self._check(step)
            if time.monotonic() - saved >= EVERY:
                self._save(step)
                saved = time.monotonic()
        for name, value in self.values.items():
            value.data.copy_(self.best[name])
            value.requires_grad_(False)
        told = {"phase": self.phase.name, "steps": step, "best_step": self.best_step}
        told |= {"before": self.at_start, "after": self.least}
        return told

    def _check(self, step: int) -> None:
        held = self._held(step)
        if held < self.least:
            self.least, self.best_step, self.stale = held, step, 0
            self.best = {n: v.detach().clone() for n, v in self.values.items()}
        else:
            self.stale += 1

    def _order(self) -> Iterator[int]:
        """Numbers of rows, shuffled anew each time all were seen; a resumed run goes on where it was."""
        rows, m = self.own.trained, self.own.method
        units = list(self.own.groups(rows)) if isinstance(self.own.spec, EncoderSpec) else [[row] for row in rows]
        done, generator = self.first * m.batch, torch.Generator().manual_seed(m.seed * 1000 + self.number)
        while True:
            epoch = [i for at in torch.randperm(len(units), generator=generator).tolist() for i in units[at]]
            yield from epoch[done:] if done < len(epoch) else ()
            done = max(0, done - len(epoch))

    @torch.no_grad()
    def _held(self, step: int) -> float:
        """The loss on the rows held out."""
        rows, batch, total = self.own.kept_out, self.own.method.batch, 0.0
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            total += float(self.phase.loss(part, None)) * len(part)
        if not math.isfinite(total):
            self._fail(step, rows[:batch], total)
        return total / len(rows)

    def _step(self, step: int, rows: list[int]) -> None:
        rate = min(1.0, (step + 1) / _WARM) * (0.1 + 0.9 * cosine(step, self.phase.steps))
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * rate
        with torch.enable_grad():
            loss = self.phase.loss(rows, None)
            if not bool(torch.isfinite(loss)):
                self._fail(step, rows, float(loss.detach()))
            loss.backward()  # type: ignore[no-untyped-call]
        bad = [n for n, v in self.values.items() if v.grad is not None and not bool(v.grad.isfinite().all())]
        if bad:
            self._stop(f"the gradient of {bad[0]} is not finite in step {step + 1}", step)
        self.adam.step()
        self.adam.zero_grad()
        self.student.tame()

    def _fail(self, step: int, rows: Sequence[int], loss: float) -> None:
        """Say where the first number that is not finite is."""
        met: list[str] = []

        def site(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
            if not bool(x.isfinite().all()):
                met.append(name)
            return self.student.site(name, x, seen)

        with torch.no_grad():
            self.phase.loss(rows, site)
        where = f"first at {met[0]}" if met else "behind the last edge"
        self._stop(f"the loss is {loss} in step {step + 1}, {where}", step)

    def _stop(self, what: str, step: int) -> None:
        self._save(step)
        fix = (
            f"Lower the rates; the state before is in {self.own.file.name} and the best one is of step {self.best_step}"
        )
        raise QualityFailed(what, where=self.own.method.name, fix=fix)

    def _save(self, step: int) -> None:
        tensors = {f"value/{n}": v for n, v in self.student.values.items()}
        tensors |= {f"best/{n}": v for n, v in self.best.items()}
        for name, value in self.values.items():
            tensors |= {f"{key}/{name}": t for key, t in self.adam.state.get(value, {}).items()}
        told = {"phase": self.number, "history": self.history, "step": step, "best_step": self.best_step}
        self.own.save(tensors, told | {"least": self.least, "at_start": self.at_start, "stale": self.stale})


def _relative(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square().mean() / target.square().mean()


def _balance(spec: Any, pair: Pair, loud: Loudness, layer: int) -> Tensor:
    """Scales between queries and keys with which their two roundings disturb the scores least: (width,).

    Of scales k**a / q**(1 - a), k and q being the peaks of channels. An edge's rounding is noise of the size of its
    largest peak in every channel, which scores see times the other side; of the keys only what differs from key to key,
    since a softmax does not see what is added to all scores of a query.
    """
    names = _turned(spec)
    sides = []
    for name, shared in zip(names, (pair.columns, pair.rows), strict=True):
        edge = _edge(spec, layer, name)
        peak, energy = loud.peak(edge), loud.energy(edge) if name == names[0] else loud.variance(edge)
        own = shared.expand(len(peak) // len(shared), -1).reshape(-1)  # one set may be for all heads
        most = torch.zeros(pair.width).scatter_reduce(0, own, peak, "amax")
        sides.append((most, torch.zeros(pair.width).scatter_reduce(0, own, energy, "sum")))
    (q, q_energy), (k, k_energy) = sides
    used = (q > 0) & (k > 0)
    best, least = torch.ones(pair.width), torch.inf
    for tenth in range(11):
        scale = torch.where(used, k ** (tenth / 10) / q ** (1 - tenth / 10), torch.ones_like(k))
        noise = (k / scale).amax().square() * (q_energy * scale.square()).sum()
        noise += (q * scale).amax().square() * (k_energy / scale.square()).sum()
        if float(noise) < least:
            best, least = scale, float(noise)
    return best


def _turned(spec: Any) -> tuple[str, str]:
    """The edges of queries and keys that the scores are made of."""
    if spec.rotary is not None:
        return "attn.q", "attn.k"
    return ("attn.q_norm", "attn.k_norm") if spec.qk_norm is not None else ("attn.q_proj", "attn.k_proj")


def _inputs(spec: Any) -> list[str]:
    """Edges of a block whose channels are looked at: those that linear layers read, queries and keys."""
    found = [*_turned(spec), _read(spec, "attn"), "attn.mixed", "mlp.inner" if spec.gated_mlp else "mlp.act"]
    return found if spec.shared_block_norm else [*found, _read(spec, "mlp")]


def _read(spec: Any, part: str) -> str:
    """The edge of a block that the first linear layers of a half read."""
    return f"{part}_norm" if spec.norm_first else f"{part}_input"


def _source(spec: Any, linear: str) -> str:
    """The edge of a block that one of its linear layers reads."""
    kind, _, name = linear.partition(".")
    if name == "o_proj":
        return "attn.mixed"
    if name == "down_proj":
        return "mlp.inner" if spec.gated_mlp else "mlp.act"
    return _read(spec, "attn" if kind == "attn" or spec.shared_block_norm else "mlp")


def _edge(spec: Any, layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"
