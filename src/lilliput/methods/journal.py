"""What a sweep must not lose: after every step one small file, replaced atomically, and the calibration activations.

A run killed at any moment finds here the last finished step and everything the next one reads; files of the unfinished
step are simply written again. Nothing in this folder is part of the artifact.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput.artifact.disk import replacing, sync
from lilliput.core.errors import InputCorrupt


@dataclass
class State:
    """How far a sweep is.

    step: finished steps (the embedding is the first, then the blocks, then the head). streams: hidden states of the
    probe, (1, length, hidden) float32, under the width that made them ("float" for the original). records: one a layer,
    as plain data.
    """

    step: int = 0
    streams: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """Saves and finds a sweep's State in a folder, and keeps calibration activations there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = folder / "state.safetensors"

    def load(self) -> State:
        """Return the last saved state, or a fresh one."""
        if not self._file.exists():
            return State()
        try:
            with safe_open(self._file, framework="pt") as file:
                told = json.loads(file.metadata()["state"])
                streams = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
            return State(told["step"], streams, told["records"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            fix = "Give --no-resume to start anew"
            raise InputCorrupt(f"was damaged ({error})", where=str(self._file), fix=fix) from None

    def save(self, state: State) -> None:
        """Replace the saved state by this one; on disk when this returns."""
        told = json.dumps({"step": state.step, "records": state.records})
        with replacing(self._file) as fresh:
            save_file({k: v.contiguous() for k, v in state.streams.items()}, fresh, metadata={"state": told})
        sync(self._folder)

    def forget(self) -> None:
        """Drop the saved state."""
        self._file.unlink(missing_ok=True)

    def activations(self, step: int, shape: tuple[int, int, int], of: str = "hidden") -> "Activations":
        """The calibration activations as they are after `step` finished steps; two generations are kept in turns.

        of: "hidden" for the compressed model's, "original" for the original's.
        """
        return Activations(self._folder / f"{of}-{step % 2}.f32", shape)


class Activations:
    """(samples, length, hidden) float32 on disk, read and written a batch at a time, so memory stays that of a batch."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._shape = path, shape

    @property
    def samples(self) -> int:
        """Rows there are."""
        return self._shape[0]

    def take(self, index: Sequence[int]) -> Tensor:
        """Return the rows with those numbers: (len(index), length, hidden) float32."""
        mapped = np.memmap(self._path, np.float32, "r", shape=self._shape)
        return torch.from_numpy(np.stack([mapped[i] for i in index]))

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield (up to `size`, length, hidden) tensors in order."""
        samples, length, hidden = self._shape
        with self._path.open("rb") as file:
            for start in range(0, samples, size):
                count = min(size, samples - start)
                flat = np.fromfile(file, np.float32, count * length * hidden)
                yield torch.from_numpy(flat).view(count, length, hidden)

    def write(self, batches: Iterator[Tensor]) -> None:
        """Write batches in order, replacing what was there; on disk when this returns."""
        with self._path.open("wb") as file:
            for batch in batches:
                batch.to(torch.float32).contiguous().numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())


def steps_done(folder: Path) -> int:
    """Finished steps of the sweep whose journal is in `folder`; 0 where none can be told."""
    try:
        return Journal(folder).load().step if folder.is_dir() else 0
    except InputCorrupt:
        return 0
