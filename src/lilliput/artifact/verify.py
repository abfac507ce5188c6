"""Holds every byte of an artifact against what it claims.

A changed byte anywhere is found: in manifest.json because it carries its own digest and has only one spelling, in any
other file because the manifest has its digest. Beyond that, what must be zero is zero and what must be finite is.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from lilliput.artifact.container import Container
from lilliput.artifact.entries import OUTLIER_PARTS, FileEntry, QuantEntry
from lilliput.artifact.folder import Folder
from lilliput.artifact.plan import Plan
from lilliput.artifact.read import Artifact, open_tensors
from lilliput.artifact.schema import (
    CONSTANTS_FILE,
    MANIFEST_FILE,
    MANIFEST_LIMIT,
    Manifest,
    load_manifest,
    rung_file,
    schedule_misfit,
)
from lilliput.artifact.stored import StoredOutliers
from lilliput.core.errors import InputCorrupt, InputMissing
from lilliput.numerics.packing import INPUTS, LEVEL_BITS, ROWS, UNIT_MOST, unpack_fields

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are."""

_CHUNK = 4 << 20


class VerifyReport(BaseModel):
    """What `verify` found. ok: no problems. absent: files of wider widths this copy does without.

    ignored: names beginning with a dot, which no reader opens (.gitattributes, .cache of a download).
    """

    model_config = ConfigDict(frozen=True)

    path: str
    ok: bool
    bits: tuple[int, ...]
    files: int
    bytes: int
    absent: tuple[str, ...]
    ignored: tuple[str, ...]
    problems: tuple[str, ...]


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Check every byte of the artifact at `path`, in bounded memory.

    Damage is reported, one line a problem, not raised. Raises InputMissing when `path` is no folder or has no
    manifest, Unsupported when a newer lilliput wrote it.
    """
    with Folder(Path(path)) as folder:
        try:
            raw = folder.read(MANIFEST_FILE, MANIFEST_LIMIT)
            manifest = load_manifest(raw, folder.where(MANIFEST_FILE))
        except InputCorrupt as error:
            return _report(path, (), 0, 0, [str(error)])
        return _Check(folder, manifest, progress).run(len(raw))


def _report(
    path: str | Path,
    bits: tuple[int, ...],
    files: int,
    count: int,
    problems: list[str],
    absent: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> VerifyReport:
    return VerifyReport(
        path=str(path),
        ok=not problems,
        bits=bits,
        files=files,
        bytes=count,
        absent=absent,
        ignored=ignored,
        problems=tuple(problems),
    )


class _Check:
    def __init__(self, folder: Folder, manifest: Manifest, progress: Progress | None) -> None:
        self.folder, self.manifest, self.plan = folder, manifest, Plan.of(manifest)
        self.progress, self.read, self.problems = progress, 0, list[str]()
        self.total = sum(entry.size for entry in manifest.files.values())

    def run(self, manifest_bytes: int) -> VerifyReport:
        names = self.folder.names()
        ignored = tuple(name for name in names if name.startswith("."))
        for name in names:
            if name not in self.manifest.files and name not in (MANIFEST_FILE, *ignored):
                self._say("is not in the manifest", ascii(name)[1:-1], "Move it out of the folder")
        bits, absent = self._widths(set(names))
        self.total -= sum(self.manifest.files[name].size for name in absent)
        files = 1
        for name, entry in self.manifest.files.items():
            if name in absent:
                continue
            files += 1
            try:
                self._file(name, entry)
            except (InputCorrupt, InputMissing) as error:
                self.problems.append(str(error))
        if not self.problems:
            self._schedule()
        return _report(self.folder.path, bits, files, self.read + manifest_bytes, self.problems, absent, ignored)

    def _widths(self, names: set[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Widths served, and the rung files that a narrower copy rightly lacks."""
        served = tuple(
            b for b in self.manifest.bits if all(rung_file(n) in names for n in self.manifest.bits if n <= b)
        )
        wider = [rung_file(b) for b in self.manifest.bits if b not in served]
        whole = bool(served) and not any(name in names for name in wider)
        return served, tuple(wider) if whole else ()

    def _file(self, name: str, entry: FileEntry) -> None:
        handle, size = self.folder.open(name)
        try:
            digest = self._hash(handle)
        finally:
            os.close(handle)
        if size != entry.size:
            self._say(f"{size} bytes where the manifest says {entry.size}", name)
        elif digest != entry.sha256:
            self._say("the contents do not match their SHA-256", name)
        if name == CONSTANTS_FILE and self.manifest.integer is not None:
            self._graph()
        if name in self.plan.tensors:
            self._tensors(open_tensors(self.plan, name, *self.folder.open(name), self.folder.where(name)))

    def _graph(self) -> None:
        """Have the integer graph read as a runner would, which refuses what it could not follow."""
        if {rung_file(b) for b in self.manifest.bits} <= set(self.folder.names()):  # a narrower copy has no matrices
            with Artifact.open(self.folder.path) as artifact:
                artifact.integer()

    def _schedule(self) -> None:
        """Hold what a schedule learned against the model and the horizon it is kept with."""
        with Artifact.open(self.folder.path) as artifact:
            misfit = schedule_misfit(self.manifest, artifact.schedule_tensors()[1])
        if misfit is not None:
            self._say(f"schedule: {misfit}", MANIFEST_FILE, "Learn it anew with `lilliput schedule`")

    def _hash(self, handle: int) -> str:
        digest, at = hashlib.sha256(), 0
        while chunk := os.pread(handle, _CHUNK, at):
            digest.update(chunk)
            at += len(chunk)
            self.read += len(chunk)
            if self.progress:
                self.progress(self.read, self.total)
        return digest.hexdigest()

    def _tensors(self, file: Container) -> None:
        for name, slot in file.header.slots.items():
            module, _, last = name.rpartition(".")
            module, _, kind = module.rpartition(".")
            entry = self.manifest.entries.get(module)
            if slot.padding:
                if file.view(name).any():
                    self._say("padding is not zero", f"{file.where}: {name}")
            elif entry and kind == "plane":
                if any(part.any() for part in _outside(entry, file, name, entry.fields[int(last)])):
                    self._say("a code outside the matrix is not zero", f"{file.where}: {name}")
            elif entry and kind == "table":
                self._table(entry, file, name)
            elif entry and kind == "outlier":
                self._outliers(entry, file, name)
            elif entry and kind in ("ratio", "unit"):
                self._rows(entry, file, name, UNIT_MOST if kind == "unit" else 255)
            elif entry:
                self._grid(entry, file, name)

    def _rows(self, entry: QuantEntry, file: Container, name: str, most: int) -> None:
        values = file.view(name).reshape(-1)
        if values[entry.out :].any():
            self._say("a value outside the matrix is not zero", f"{file.where}: {name}")
        if int(values.max()) > most:
            self._say(f"a unit is {int(values.max())}, beyond {most}", f"{file.where}: {name}")

    def _outliers(self, entry: QuantEntry, file: Container, name: str) -> None:
        module, _, last = name.rpartition(".outlier.")
        if last != OUTLIER_PARTS[-1]:  # all three are looked at together
            return
        parts = (file.view(f"{module}.outlier.{part}") for part in OUTLIER_PARTS)
        try:
            StoredOutliers(*parts).check(entry.columns)
        except ValueError as error:
            self._say(str(error), f"{file.where}: {module}")

    def _grid(self, entry: QuantEntry, file: Container, name: str) -> None:
        values = file.view(name)  # (row tiles, groups, 16)
        step = max(1, _CHUNK // (values[:1].nbytes or 1))
        halves = values.dtype == np.float16
        if halves and not all(np.isfinite(values[at : at + step]).all() for at in range(0, len(values), step)):
            self._say("a value is not finite", f"{file.where}: {name}")
        if entry.out % ROWS and np.ascontiguousarray(values[-1, :, entry.out % ROWS :]).view(np.uint8).any():
            self._say("a value outside the matrix is not zero", f"{file.where}: {name}")

    def _table(self, entry: QuantEntry, file: Container, name: str) -> None:
        values = file.view(name)  # (row tiles, 16, 2**b): few bytes beside the codes
        if int(values.max()) >= 1 << LEVEL_BITS:
            self._say(f"an entry is {int(values.max())}, beyond {LEVEL_BITS} bits", f"{file.where}: {name}")
        if (values[..., 1:] < values[..., :-1]).any():
            self._say("the entries of a row go down", f"{file.where}: {name}")
        if entry.out % ROWS and values[-1, entry.out % ROWS :].any():
            self._say("a value outside the matrix is not zero", f"{file.where}: {name}")

    def _say(self, what: str, where: str, fix: str = "Copy the file again from its source") -> None:
        at = where if where.startswith(str(self.folder.path)) else self.folder.where(where)
        self.problems.append(f"{at}: {what}. {fix}.")


def _outside(entry: QuantEntry, file: Container, name: str, width: int) -> Iterator[np.ndarray]:
    """Codes of one plane that lie beyond the matrix: rows of the last row tile, inputs of the last input tile."""
    plane = file.view(name)  # (row tiles, input tiles, 64 * width)
    if entry.out % ROWS:
        last = unpack_fields([plane[-1:]], [width], ROWS, plane.shape[1] * INPUTS)
        yield last[entry.out % ROWS :]
    if entry.columns % INPUTS:
        last = unpack_fields([plane[:, -1:]], [width], plane.shape[0] * ROWS, INPUTS)
        yield last[:, entry.columns % INPUTS :]
