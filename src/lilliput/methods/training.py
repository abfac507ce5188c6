"""Training a Student in phases, by Adam, with rows of the text held out, killed at any moment and gone on from.

The state that does best on the rows held out is kept, the one before training among the candidates. Rates rise over the
first steps and fall along half a cosine.

Source: Kingma and Ba, "Adam", ICLR 2015; Prechelt, "Early Stopping - But When?", 1998.
Deviation: none.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput.artifact.disk import replacing
from lilliput.core.errors import QualityFailed
from lilliput.core.progress import Progress
from lilliput.methods.student import Student
from lilliput.models.sites import Site
from lilliput.numerics.learned import cosine

EVERY = 60.0
"""Seconds between saved states."""
BETAS = (0.9, 0.95)
_WARM = 10
"""Steps over which the rates rise."""


Loss = Callable[[Sequence[int], Site | None], Tensor]


@dataclass
class Phase:
    """One training: of the whole model, or of one block.

    loss: of some rows, by their numbers, at a site. rates: peak changes a step of the values that are trained, by name.
    """

    name: str
    steps: int
    loss: Loss
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Regime:
    """What all phases share.

    method: who trains, for messages. units: rows to train on, those of a unit one behind the other. held: groups of rows
    to judge by. batch: rows a step. checks: in all steps of a phase. patience: checks without gain before a phase ends.
    seed: of the order of units.
    """

    method: str
    units: Sequence[Sequence[int]]
    held: Sequence[Sequence[int]]
    batch: int
    checks: int
    patience: int
    seed: int


class Saved:
    """The file with the state of a training. digest: of all it depends on; a state of another one is none."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest

    @property
    def there(self) -> bool:
        """Whether there is a state."""
        if not self.path.exists():
            return False
        with safe_open(self.path, framework="pt") as file:
            return bool(file.metadata()["digest"] == self.digest)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the last state and what was told of it; nothing where there is none."""
        if not self.there:
            return {}, {}
        with safe_open(self.path, framework="pt") as file:
            names, told = file.keys(), json.loads(file.metadata()["told"])
            return {name: file.get_tensor(name) for name in names}, told

    def save(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Replace the state; on disk when this returns."""
        metadata = {"digest": self.digest, "told": json.dumps(told)}
        with replacing(self.path) as fresh:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh, metadata=metadata)


def train(
    student: Student, phases: Iterator[Phase], regime: Regime, saved: Saved, progress: Progress
) -> list[dict[str, Any]]:
    """Train the student in phases and return how each went. A killed run goes on as if nothing had happened.

    phases: between two of them is done what the next one needs.
    Raises QualityFailed, naming step and edge, where a loss or a gradient is not finite.
    """
    tensors, told = saved.load()
    told = told or {"phase": 0, "history": []}
    history: list[dict[str, Any]] = told["history"]
    for number, phase in enumerate(phases):
        if number < told["phase"]:
            # Its result is in what was loaded, or will be: until all are trained together a finished block stays as it is.
            _put(student, tensors)
            continue
        state = tensors if number == told["phase"] else {}
        history.append(_Training(student, phase, number, regime, saved, progress, history).run(state, told))
    return history


def _put(student: Student, tensors: Mapping[str, Tensor]) -> None:
    for name, value in student.values.items():
        value.data.copy_(tensors[f"value/{name}"])


class _Training:
    """One phase."""

    def __init__(
        self,
        student: Student,
        phase: Phase,
        number: int,
        regime: Regime,
        saved: Saved,
        progress: Progress,
        history: list[dict[str, Any]],
    ) -> None:
        self.student, self.phase, self.number, self.regime = student, phase, number, regime
        self.saved, self.progress, self.history = saved, progress, history
        self.values = {name: student.values[name].requires_grad_() for name in phase.rates}
        groups: list[dict[str, Any]] = [{"params": [self.values[n]], "rate": rate} for n, rate in phase.rates.items()]
        self.adam = torch.optim.Adam(groups, lr=1.0, betas=BETAS, eps=1e-12)
        self.first, self.best_step, self.least, self.at_start = 0, 0, math.inf, math.inf
        self.stale = 0
        self.best = {n: v.detach().clone() for n, v in self.values.items()}

    def _go_on(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        _put(self.student, tensors)
        self.first, self.best_step, self.stale = told["step"], told["best_step"], told["stale"]
        self.least, self.at_start = told["least"], told["at_start"]
        for name, value in self.values.items():
            self.best[name] = tensors[f"best/{name}"]
            moments = {k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors}
            if moments:
                self.adam.state[value] = moments

    def run(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Train to the end; leaves the best values in the student, and tells how it went.

        tensors, told: a saved state to go on from, or nothing.
        """
        if tensors:
            self._go_on(tensors, told)
        steps, batch = self.phase.steps, self.regime.batch
        every = max(1, steps // self.regime.checks)
        self.progress.begin(f"training {self.phase.name}", steps, done=self.first)
        if not self.first:
            self.at_start = self.least = self._held(0)
        order, saved, step = self._order(), time.monotonic(), self.first
        while step < steps and self.stale < self.regime.patience:
            self._step(step, [next(order) for _ in range(batch)])
            step += 1
            self.progress.advance(1)
            if step % every == 0 or step == steps:
                self._check(step)
            if time.monotonic() - saved >= EVERY:
                self._save(step)
                saved = time.monotonic()
        for name, value in self.values.items():
            value.data.copy_(self.best[name])
            value.requires_grad_(False)
        went = {"phase": self.phase.name, "steps": step, "best_step": self.best_step}
        return went | {"before": self.at_start, "after": self.least}

    def _check(self, step: int) -> None:
        held = self._held(step)
        if held < self.least:
            self.least, self.best_step, self.stale = held, step, 0
            self.best = {n: v.detach().clone() for n, v in self.values.items()}
        else:
            self.stale += 1

    def _order(self) -> Iterator[int]:
        """Numbers of rows, shuffled anew each time all were seen; a resumed run goes on where it was."""
        units, seed = self.regime.units, self.regime.seed
        done, generator = self.first * self.regime.batch, torch.Generator().manual_seed(seed * 1000 + self.number)
        while True:
            epoch = [i for at in torch.randperm(len(units), generator=generator).tolist() for i in units[at]]
            yield from epoch[done:] if done < len(epoch) else ()
            done = max(0, done - len(epoch))

    @torch.no_grad()
    def _held(self, step: int) -> float:
        """The loss on the rows held out."""
        total, count = 0.0, 0
        for rows in self.regime.held:
            total += float(self.phase.loss(rows, None)) * len(rows)
            count += len(rows)
        if not math.isfinite(total):
            self._fail(step, self.regime.held[0], total)
        return total / count

    def _step(self, step: int, rows: list[int]) -> None:
        rate = min(1.0, (step + 1) / _WARM) * cosine(step, self.phase.steps)
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
        self.student.tame(self.values)

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
        fix = f"Lower the rates; the state before is in {self.saved.path.name} and the best one is of step {self.best_step}"
        raise QualityFailed(what, where=self.regime.method, fix=fix)

    def _save(self, step: int) -> None:
        tensors = {f"value/{n}": v for n, v in self.student.values.items()}
        tensors |= {f"best/{n}": v for n, v in self.best.items()}
        for name, value in self.values.items():
            tensors |= {f"{key}/{name}": t for key, t in self.adam.state.get(value, {}).items()}
        told = {"phase": self.number, "history": self.history, "step": step, "best_step": self.best_step}
        self.saved.save(tensors, told | {"least": self.least, "at_start": self.at_start, "stale": self.stale})
