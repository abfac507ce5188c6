"""Writes an artifact into a partial folder, layer by layer and resumable."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from lilliput.artifact.container import PlannedFile, check_free_space
from lilliput.artifact.disk import JOURNAL_FILE, hash_all, read_manifest, sync, write_whole
from lilliput.artifact.entries import (
    OUTLIER_PARTS,
    DataInfo,
    EmbeddingQuality,
    IntegerInfo,
    LayerRecord,
    QualityEntry,
    QuantEntry,
    SourceInfo,
)
from lilliput.artifact.plan import Plan as Plan
from lilliput.artifact.schema import INDEX_FILE, MANIFEST_FILE, Manifest, seal, version_of
from lilliput.artifact.stored import StoredOutliers
from lilliput.core.errors import ConfigError, OutOfResource, QualityFailed
from lilliput.numerics.packing import (
    LEVEL_BITS,
    ROWS,
    counted_bits,
    pack_fields,
    pack_scales,
    pack_zeros,
    tile_groups,
    tile_rows,
    tile_table,
)

_VERSION: str = resolve_name("lilliput:__version__")  # by name: the package itself is above this room
_CHUNK = 1 << 23  # codes packed at once: bounds memory for an embedding of a hundred thousand rows
F16 = npt.NDArray[np.float16]


class ArtifactWriter:
    """Fills a partial folder as its plan says. Use `start`, `put_*` in any order, `sync` now and then, `finish`."""

    def __init__(self, folder: Path, plan: Plan, files: dict[str, PlannedFile], journal: int, done: set[str]) -> None:
        self.folder, self.plan = folder, plan
        self._files, self._journal = files, journal
        self._done, self._fresh = done, list[str]()

    @classmethod
    def start(cls, folder: Path, plan: Plan, key: str = "") -> "ArtifactWriter":
        """Create the partial folder, its space reserved, or reopen one where a run with the same `key` stopped.

        key: names what the numbers depend on (recipe, source, data, seed), one line. What an earlier run had synced
        is in `done`.
        Raises OutOfResource, leaving no files it made, when the disk cannot hold `plan.total_bytes()`; ConfigError
        when the folder is an artifact, holds another run's work, or a run is writing there now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST_FILE).exists() and not (folder / JOURNAL_FILE).exists():
            raise ConfigError("holds a finished artifact", str(folder), "Give another folder, or delete this one")
        journal = os.open(folder / JOURNAL_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            done = _begin(folder, journal, key, plan)
            try:
                files, fresh = _open_files(folder, plan)
            except OutOfResource:
                (folder / JOURNAL_FILE).unlink()  # nothing is left that it could vouch for
                raise
            for name in (MANIFEST_FILE, INDEX_FILE):  # not whole until `finish` says so again
                (folder / name).unlink(missing_ok=True)
        except BaseException:
            os.close(journal)
            raise
        known = plan.entries.keys() | plan.floats.keys()
        writer = cls(folder, plan, files, journal, set() if fresh else done & known)
        writer._rewrite(key)
        return writer

    @property
    def done(self) -> frozenset[str]:
        """Names of entries and float tensors that are on the disk for good, from this run or from an earlier one."""
        return frozenset(self._done)

    def put_quantized(
        self,
        name: str,
        codes: npt.NDArray[np.uint8],
        scale: Mapping[int, F16],
        zero: Mapping[int, F16] | None = None,
        table: Mapping[int, npt.NDArray[np.uint8]] | None = None,
        ratio: Mapping[int, npt.NDArray[np.uint8]] | None = None,
        outliers: StoredOutliers | None = None,
    ) -> None:
        """Write one quantized matrix.

        codes: (out, columns) uint8 of max(bits) bits; scale[b], and zero[b] unless the entry is symmetric: (out,
        groups) float16 for each width of the entry's ladder, or, where the entry is shared, for the narrowest, and
        ratio[b]: (out,) uint8 for each. table[b]: (out, 2**b) uint8 for each of its `tables`. Where its `grid_bits` are
        8, scales and zeros are such as bytes can say. outliers: as many as the entry has, or None.
        Raises QualityFailed when a scale or zero is not finite, ValueError when something does not fit the entry,
        OutOfResource when the disk is full.
        """
        entry, table, ratio = self.plan.entries[name], table or {}, ratio or {}
        _check_codes(name, entry, codes)
        grids = {"scale": scale, "zero": zero or {}}
        for kind, widths in {**grids, "table": table, "ratio": ratio}.items():
            wanted = [bits for bits in entry.bits if kind in entry.grids(bits)]
            if sorted(widths) != wanted:
                raise ValueError(f"{name}: {kind}s for the widths {sorted(widths)}, not {wanted}")
        for kind, by_width in grids.items():
            for bits, grid in by_width.items():
                _check_grid(name, kind, bits, entry, grid)
        for rows in ratio.values():
            if rows.dtype != np.uint8 or rows.shape != (entry.out,):
                raise ValueError(f"{name}: the ratio is {rows.dtype} {rows.shape}, not uint8 {(entry.out,)}")
        for bits in entry.tables:
            _check_table(name, bits, entry, table[bits])
        _check_outliers(name, entry, outliers)
        for row in range(0, entry.out, self._rows(entry)):
            packed = pack_fields(codes[row : row + self._rows(entry)], entry.fields)
            for index, field in enumerate(packed):
                self._write(f"{name}.plane.{index}", field, row // ROWS)
        for part, values in _stored_grids(entry, grids):
            self._write(f"{name}.{part}", values)
        for bits in entry.tables:
            self._write(f"{name}.table.{bits}", tile_table(table[bits]))
        for bits, rows in ratio.items():
            self._write(f"{name}.ratio.{bits}", tile_rows(rows))
        if outliers is not None:
            for part in OUTLIER_PARTS:
                self._write(f"{name}.outlier.{part}", getattr(outliers, part))
        self._fresh.append(name)

    def put_float(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write one float tensor, in the shape of its entry; BF16 as the uint16 of its bits. Raises ValueError."""
        if array.shape != self.plan.floats[name].shape:
            raise ValueError(f"{name}: {array.shape} does not fit {self.plan.floats[name].shape}")
        self._write(name, array)
        self._fresh.append(name)

    def sync(self) -> None:
        """Return once everything put so far is on the disk and an interrupted run will find it in `done`."""
        for file in self._files.values():
            file.sync()
        os.write(self._journal, "".join(f"{name}\n" for name in self._fresh).encode())
        os.fsync(self._journal)
        self._done |= set(self._fresh)
        self._fresh.clear()

    def finish(
        self,
        *,
        source: SourceInfo,
        recipe: JsonValue,
        seed: int,
        data: DataInfo | None = None,
        tools: Mapping[str, str] | None = None,
        quality: Sequence[QualityEntry | EmbeddingQuality] = (),
        layers: Sequence[LayerRecord] = (),
        integer: IntegerInfo | None = None,
    ) -> Manifest:
        """Write the index and, last, the manifest; the writer is closed then.

        Every other file the artifact is to have (tokenizer, config.json, README.md, with `integer` the graph and its
        constants) must be in the folder already.
        Raises ValueError when a tensor was never put.
        """
        self.sync()
        absent = sorted((self.plan.entries.keys() | self.plan.floats.keys()) - self._done)
        if absent:
            raise ValueError(f"{len(absent)} tensors were never put, the first is {absent[0]}")
        for file in self._files.values():
            file.close()
        write_whole(self.folder / INDEX_FILE, self.plan.index_json())
        manifest = Manifest(
            schema_version=version_of(self.plan.spec, self.plan.entries, integer=integer is not None),
            lilliput_version=_VERSION,
            bits=self.plan.bits,
            spec=self.plan.spec,
            source=source,
            recipe=recipe,
            seed=seed,
            data=data,
            tools=dict(sorted((tools or {}).items())),
            quality=tuple(quality),
            layers=tuple(layers),
            integer=integer,
            entries=dict(self.plan.entries),
            floats=dict(self.plan.floats),
            files=hash_all(self.folder),
        )
        write_whole(self.folder / MANIFEST_FILE, seal(manifest))
        sync(self.folder)
        self.close()
        return read_manifest(self.folder)

    def close(self) -> None:
        """Let go of the files; what was put since the last `sync` may be lost."""
        for file in self._files.values():
            file.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _rows(self, entry: QuantEntry) -> int:
        return max(ROWS, _CHUNK // entry.columns // ROWS * ROWS)

    def _write(self, name: str, array: npt.NDArray[Any], row: int = 0) -> None:
        self._files[self.plan.home[name][0]].write(name, array, row)

    def _rewrite(self, key: str) -> None:
        text = "".join(f"{line}\n" for line in (key, *sorted(self._done))).encode()
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        os.write(self._journal, text)
        os.fsync(self._journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _begin(folder: Path, journal: int, key: str, plan: Plan) -> set[str]:
    """Lock the journal and return the names in it. Raises ConfigError when it, or the folder, is another's."""
    if "\n" in key:
        raise ValueError("the key of a run is one line")
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError("another run is writing here", str(folder), "Wait for it or give another folder") from None
    text = os.pread(journal, os.fstat(journal).st_size, 0).decode("utf-8", "replace")
    if "\n" not in text:
        found = [name for name in plan.files if (folder / name).exists()]
        if found:  # without a journal they are not ours to overwrite
            (folder / JOURNAL_FILE).unlink()
            raise ConfigError(f"already holds a {found[0]}", str(folder), "Give another folder, or delete this one")
        text = f"{key}\n"
        os.pwrite(journal, text.encode(), 0)
    first, *names = text.split("\n")[:-1]  # a last line without its newline was cut off
    if first != key:
        fix = f"Delete it to start anew, or repeat the run that made it ({first[:80]!r})"
        raise ConfigError("holds the unfinished work of another run", str(folder), fix)
    return set(names)


def _open_files(folder: Path, plan: Plan) -> tuple[dict[str, PlannedFile], bool]:
    """Reopen the tensor files or create them all; True when they are new. Raises ConfigError, OutOfResource."""
    present = [name for name in plan.files if (folder / name).exists()]
    if len(present) < len(plan.files):  # none, or the run stopped while it reserved its space
        for name in present:
            (folder / name).unlink()
        check_free_space(folder, plan.total_bytes())
        files: dict[str, PlannedFile] = {}
        try:
            for name, layout in plan.files.items():
                files[name] = PlannedFile.create(folder / name, layout)
        except BaseException:
            for name, file in files.items():
                file.close()
                (folder / name).unlink()
            raise
        return files, True
    files = {}
    for name, layout in plan.files.items():
        reopened = PlannedFile.reopen(folder / name, layout)
        if reopened is None:
            for file in files.values():
                file.close()
            fix = "Delete the folder to start anew, or repeat the run that made it"
            raise ConfigError("was planned for another artifact", str(folder / name), fix)
        files[name] = reopened
    return files, False


def _check_codes(name: str, entry: QuantEntry, codes: npt.NDArray[np.uint8]) -> None:
    if codes.dtype != np.uint8 or codes.shape != (entry.out, entry.columns):
        raise ValueError(f"{name}: codes are {codes.dtype} {codes.shape}, not uint8 {(entry.out, entry.columns)}")
    if int(codes.max()) >= 1 << entry.bits[-1]:
        raise ValueError(f"{name}: a code is {int(codes.max())}, beyond {entry.bits[-1]} bits")


def _check_grid(name: str, kind: str, bits: int, entry: QuantEntry, values: F16) -> None:
    if values.dtype != np.float16 or values.shape != (entry.out, entry.groups):
        raise ValueError(f"{name}: {kind} is {values.dtype} {values.shape}, not float16 {(entry.out, entry.groups)}")
    if not np.isfinite(values).all():
        what = f"the {kind} for {bits} bits is not finite in float16"
        raise QualityFailed(what, name, "Exclude this layer, and look for huge or broken weights in the checkpoint")


def _stored_grids(entry: QuantEntry, grids: Mapping[str, Mapping[int, F16]]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Scales, zeros and units as they are stored, each with what follows the matrix in its name. Raises ValueError."""
    for bits, scale in grids["scale"].items():
        zero = grids["zero"].get(bits)
        if entry.grid_bits == 8:
            packed, unit = pack_scales(scale)
            yield f"scale.{bits}", tile_groups(packed)
            yield f"unit.{bits}", tile_rows(unit)
            if zero is not None:
                yield f"zero.{bits}", tile_groups(pack_zeros(zero, counted_bits(bits, entry.tables)))
            continue
        yield f"scale.{bits}", tile_groups(scale)
        if zero is not None:
            yield f"zero.{bits}", tile_groups(zero)


def _check_table(name: str, bits: int, entry: QuantEntry, table: npt.NDArray[np.uint8]) -> None:
    if table.dtype != np.uint8 or table.shape != (entry.out, 1 << bits):
        raise ValueError(f"{name}: the table is {table.dtype} {table.shape}, not uint8 {(entry.out, 1 << bits)}")
    if int(table.max()) >= 1 << LEVEL_BITS or (table[:, 1:] < table[:, :-1]).any():
        raise ValueError(f"{name}: the table for {bits} bits goes beyond {LEVEL_BITS} bits, or down along a row")


def _check_outliers(name: str, entry: QuantEntry, outliers: StoredOutliers | None) -> None:
    if outliers is None:
        if entry.outliers:
            raise ValueError(f"{name}: the {entry.outliers} outliers of the entry are not there")
        return
    shapes = {"counts": (entry.out,), "columns": (entry.outliers,), "values": (entry.outliers,)}
    for part, shape in shapes.items():
        array, dtype = getattr(outliers, part), np.float16 if part == "values" else np.uint16
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{name}: {part} of outliers are {array.dtype} {array.shape}, not {dtype.__name__} {shape}"
            )
    try:
        outliers.check(entry.columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
