"""Tune: trains the codes and the grids of every width together, so that the model says what the original says.

Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", 2023, sections 2.1 (the original writes the text
that is trained on) and 2.2 (its output distribution is the target); Nair et al., "Matryoshka Quantization", 2025, section
3 (one weight trained through all of its top bits); Chen et al., "EfficientQAT", 2024, section 3.3 (grids trained end to
end); straight-through gradients after Bengio et al., 2013.
Deviation: the loss is the sum over the widths of the logarithm of KL, so that a share lost at one width weighs as much as
the same share at another; KL itself would see the narrowest alone, and with its root the widest still lost what the
narrow ones gained. Every width has grids of its own where its store does, else a ratio a row; the model is not trained
on the text, only held to the original on it. What the original writes begins with some tokens of the calibration text,
in the place of a random one, and is drawn as it is from there on. Widths beyond those trained keep the original weight's
place within the trained cell. With tables only grids are trained, and codes stay.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lilliput.artifact.disk import replacing
from lilliput.core.errors import ConfigError, QualityFailed
from lilliput.core.progress import Progress
from lilliput.data.streams import I32, Batches
from lilliput.methods.base import Tuner
from lilliput.models.decoder import Decoder
from lilliput.models.writing import SIDE_BYTES, side_by_side, write
from lilliput.numerics.learned import cosine
from lilliput.numerics.nested import Quantized
from lilliput.numerics.trainable import Trainable

BETAS = (0.9, 0.95)
EVERY = 60.0
"""Seconds between saved states."""
OPENING = 16
"""Tokens of the calibration text that what the original writes begins with; half of a row where rows are short."""


@dataclass(frozen=True, kw_only=True)
class Tune(Tuner):
    """Trains by distillation for `steps` steps of `batch` rows.

    learning_rate: of the weights behind the codes, in steps of the widest width trained. grid_rate: of the logarithm of
    the scales and of the zeros in steps. widths: those to train for; empty for all served up to 4 bits, or for the
    narrowest where all are wider. written: the original writes every row of the training, as long as those of the
    calibration text, which it only takes openings from; false trains on the calibration text itself, again and again.
    codes: false freezes the codes and trains grids alone, which needs far less memory. ends: treat the embedding and the
    head as well.
    """

    steps: int = 300
    batch: int = 4
    learning_rate: float = 0.005
    grid_rate: float = 0.003
    widths: tuple[int, ...] = ()
    written: bool = True
    codes: bool = True
    ends: bool = True

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "learning_rate", "grid_rate"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} is {getattr(self, key)}", f"tune.{key}", "Give a number above 0")

    def covers(self, name: str) -> bool:
        """Whether the matrix of that canonical name is trained."""
        wanted = name.startswith("layers.") or self.ends
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def held_bytes(self, *, weights: int, grids: int, row: int, rows: int) -> int:
        """What `Trainable` holds, and the graph of one width; see `Method.held_bytes`."""
        moved = 4 * 4  # the number, its gradient and the two moments of Adam
        graph = 4 + 4 + (1 if self.codes else 0)  # the matrix, its codes from their middle, which weights are inside
        training = (graph + (moved if self.codes else 0)) * weights + moved * grids + self.batch * row
        return max(training, SIDE_BYTES) if self.written else training

    def tune(
        self,
        original: Decoder,
        student: Decoder,
        coded: Mapping[str, Quantized],
        batches: Batches,
        folder: Path,
        progress: Progress,
        served: Sequence[int],
    ) -> dict[str, Quantized]:
        """Return codes and grids of the same ladders; see `Tuner.tune`.

        Raises QualityFailed, naming the step, when the loss is not finite.
        """
        # Before anything is held for the training: the two need not fit side by side.
        rows = written(self, original, batches.rows, folder, progress) if self.written else batches.rows
        return Run(self, original, student, coded, rows, folder, progress, served).finish()


def written(options: Tune, original: Decoder, given: I32, folder: Path, progress: Progress) -> I32:
    """A row for every row of every step, written by the original: (steps * batch, length) int32.

    given: (samples, length) rows of the calibration text. Where all of them begin with one token, as a BOS, so does every
    row. Kept in `folder` as they are written; how many were there when a run was killed changes none of them.
    """
    wanted, length = options.steps * options.batch, given.shape[1]
    opening, rows = max(1, min(OPENING, length // 2)), torch.from_numpy(given.astype(np.int64))
    times = ceil(wanted / side_by_side(original, length))
    at_once = ceil(wanted / times)  # all alike, so that few are written in vain
    file = folder / "written.safetensors"
    parts = [load_file(file)["rows"]] if file.exists() else []
    done = sum(map(len, parts))
    progress.begin("text by the original", wanted, done=min(done, wanted))
    folder.mkdir(parents=True, exist_ok=True)
    while done < wanted:
        generator = torch.Generator().manual_seed((torch.initial_seed() * 1_000_003 + done) % (1 << 63))
        row = torch.randint(len(rows), (at_once, 1), generator=generator)
        start = torch.randint(length - opening + 1, (at_once, 1), generator=generator)
        openings = rows[row, start + torch.arange(opening)]
        if bool((rows[:, 0] == rows[0, 0]).all()):
            openings[:, 0] = rows[0, 0]
        parts.append(write(original, openings, length, generator).to(torch.int32))
        with replacing(file) as fresh:
            save_file({"rows": torch.cat(parts)}, fresh)
        progress.advance(min(at_once, wanted - done))
        done += at_once
    return torch.cat(parts)[:wanted].numpy()


class Run:
    """One training on its way."""

    def __init__(
        self,
        options: Tune,
        original: Decoder,
        student: Decoder,
        coded: Mapping[str, Quantized],
        rows: I32,
        folder: Path,
        progress: Progress,
        served: Sequence[int],
    ) -> None:
        self.options, self.original, self.student, self.coded = options, original, student, coded
        self.rows, self.folder, self.progress = rows, folder, progress
        chosen = [n for n in coded if options.covers(n)]
        weights = student.state_dict()
        self.layers = {
            n: Trainable(weights[f"{n}.weight"].float(), coded[n], options.codes and not coded[n].table) for n in chosen
        }
        usual = [b for b in served if b <= 4] or served[:1]
        self.widths = [b for b in options.widths or usual if b in served]
        if not self.widths:
            what = f"widths {list(options.widths)} are none of those served, {list(served)}"
            raise ConfigError(what, "tune.widths", f"Give some of {list(served)}")
        # With a width of its own for every layer all widths are one and the same model, which counts once.
        self.widths = list({tuple(q.serving(b) for q in coded.values()): b for b in self.widths}.values())
        groups: list[dict[str, Any]] = []
        for name, layer in self.layers.items():
            if layer.weight.requires_grad:
                # Adam moves every weight by about its rate, noise or not: the finest grid says how much noise may be.
                rate = options.learning_rate * _step(coded[name].grid(layer.serving(self.widths[-1]))[0])
                groups.append({"params": [layer.weight], "rate": rate, "name": name})
            groups.append({"params": layer.grids(), "rate": options.grid_rate, "name": name})
        self.optimizer = torch.optim.Adam(groups, lr=1.0, betas=BETAS, eps=1e-12)
        # What is not trained does not change: the codes of the ends, when they are left alone.
        self.fixed = {n: q for n, q in coded.items() if n not in self.layers}

    def finish(self) -> dict[str, Quantized]:
        """Train what is left to train and return the result."""
        self.original.requires_grad_(False)
        self.student.requires_grad_(False)
        first = self._load()
        self.progress.begin("tune", self.options.steps, done=first)
        order = self._order(first)
        saved = time.monotonic()
        for step in range(first, self.options.steps):
            self._step(step, [next(order) for _ in range(self.options.batch)])
            self.progress.advance(1)
            if time.monotonic() - saved > EVERY:
                self._save(step + 1)
                saved = time.monotonic()
        made = {n: layer.quantized(layer.serving(self.widths[-1])) for n, layer in self.layers.items()}
        return {n: made.get(n) or self.fixed[n] for n in self.coded}

    def _order(self, steps: int) -> Iterator[int]:
        """Numbers of rows, shuffled anew each time all were seen, from where so many steps have left off."""
        done, generator = steps * self.options.batch, torch.Generator().manual_seed(torch.initial_seed())
        while True:
            epoch = torch.randperm(len(self.rows), generator=generator).tolist()
            yield from epoch[done:] if done < len(epoch) else ()
            done = max(0, done - len(epoch))

    def _step(self, step: int, rows: list[int]) -> None:
        rate = min(1.0, (step + 1) / 20) * cosine(step, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        tokens = torch.from_numpy(np.ascontiguousarray(self.rows[rows])).to(torch.int64)
        with torch.no_grad():
            target = torch.log_softmax(self.original(tokens), -1)
        self.optimizer.zero_grad()
        for width in self.widths:
            with torch.enable_grad():
                divergence = self._divergence(width, tokens, target)
                if not bool(torch.isfinite(divergence)):
                    what = f"the divergence at {width} bits is {float(divergence.detach())} in step {step + 1}"
                    fix = "Lower learning_rate and grid_rate; the codes of the stages before are kept"
                    raise QualityFailed(what, where="tune", fix=fix)
                torch.log(divergence.clamp_min(1e-8)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _divergence(self, width: int, tokens: Tensor, target: Tensor) -> Tensor:
        """Mean KL(original || student) in nats over the tokens, at one width."""
        weights = {f"{n}.weight": layer.at(layer.serving(width)) for n, layer in self.layers.items()}
        weights |= {f"{n}.weight": q.dequantize(q.serving(width)) for n, q in self.fixed.items()}
        logits = functional_call(self.student, weights, (tokens,))
        return F.kl_div(torch.log_softmax(logits, -1), target, reduction="none", log_target=True).sum(-1).mean()

    # ---- what a killed run goes on from

    @property
    def _file(self) -> Path:
        return self.folder / "state.safetensors"

    def _save(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"step": torch.tensor(step)}
        for name, layer in self.layers.items():
            for key, value in layer.named():
                state[f"{name}/{key}"] = value.detach()
                for moment, tensor in self.optimizer.state.get(value, {}).items():
                    state[f"{name}/{key}/{moment}"] = tensor
        with replacing(self._file) as fresh:
            save_file({k: v.contiguous() for k, v in state.items()}, fresh)

    def _load(self) -> int:
        """Take up a saved state; return the steps it has behind it."""
        if not self._file.exists():
            return 0
        state = load_file(self._file)
        for name, layer in self.layers.items():
            for key, value in layer.named():
                value.data.copy_(state[f"{name}/{key}"])
                moments = {m: state.get(f"{name}/{key}/{m}") for m in ("step", "exp_avg", "exp_avg_sq")}
                if all(tensor is not None for tensor in moments.values()):
                    self.optimizer.state[value] = moments
        return int(state["step"])


def _step(scale: Tensor) -> float:
    """The usual step of a matrix's groups; 0 where all its numbers are. scale: (out, groups) float32."""
    used = scale[scale > 0]
    return float(used.mean()) if len(used) else 0.0
