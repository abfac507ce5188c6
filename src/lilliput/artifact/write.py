"""Writes an artifact into a partial folder, layer by layer and resumable, and publishes it in one step."""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue, ValidationError

from lilliput.artifact import strict_json
from lilliput.artifact.container import Layout, Planned, PlannedFile, check_free_space
from lilliput.artifact.folder import Folder
from lilliput.artifact.plan import Plan as Plan
from lilliput.artifact.schema import (
    INDEX_FILE,
    MANIFEST_FILE,
    MANIFEST_LIMIT,
    DataInfo,
    EmbeddingQuality,
    FileEntry,
    IntegerInfo,
    LayerRecord,
    Manifest,
    QualityEntry,
    QuantEntry,
    ScheduleEntry,
    SourceInfo,
    fingerprint,
    load_manifest,
    plain_name,
    seal,
    version_of,
)
from lilliput.core.errors import ConfigError, LilliputError, OutOfResource, QualityFailed
from lilliput.numerics.packing import LEVEL_BITS, ROWS, pack_fields, tile_groups, tile_rows, tile_table

_VERSION: str = resolve_name("lilliput:__version__")  # by name: the package itself is above this room
JOURNAL_FILE = ".written"
"""In a partial folder until it is published: the run's key, then the name of each tensor that is on disk for good."""

_CHUNK = 1 << 23  # codes packed at once: bounds memory for an embedding of a hundred thousand rows
_SCHEDULE_FILE = re.compile(r"schedule-[0-9a-f]{16}\.safetensors")
_SCHEDULE_TEMPORARY = ".schedule.tmp"
F16 = npt.NDArray[np.float16]


def partial_of(out: Path) -> Path:
    """Folder in which the artifact `out` is made: a sibling, so that publishing is a rename."""
    return out.absolute().with_name(out.name + ".partial")


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
    ) -> None:
        """Write one quantized matrix.

        codes: (out, columns) uint8 of max(bits) bits; scale[b], and zero[b] unless the entry is symmetric: (out,
        groups) float16 for each width of the entry's ladder, or, where the entry is shared, for the narrowest, and
        ratio[b]: (out,) uint8 for each. table[b]: (out, 2**b) uint8 for each of its `tables`.
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
            for bits, values in by_width.items():
                _check_grid(name, kind, bits, entry, values)
        for rows in ratio.values():
            if rows.dtype != np.uint8 or rows.shape != (entry.out,):
                raise ValueError(f"{name}: the ratio is {rows.dtype} {rows.shape}, not uint8 {(entry.out,)}")
        for bits in entry.tables:
            _check_table(name, bits, entry, table[bits])
        for row in range(0, entry.out, self._rows(entry)):
            packed = pack_fields(codes[row : row + self._rows(entry)], entry.fields)
            for index, field in enumerate(packed):
                self._write(f"{name}.plane.{index}", field, row // ROWS)
        for kind, by_width in grids.items():
            for bits, values in by_width.items():
                self._write(f"{name}.{kind}.{bits}", tile_groups(values))
        for bits in entry.tables:
            self._write(f"{name}.table.{bits}", tile_table(table[bits]))
        for bits, rows in ratio.items():
            self._write(f"{name}.ratio.{bits}", tile_rows(rows))
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
        _write_whole(self.folder / INDEX_FILE, self.plan.index_json())
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
            files=_hash_all(self.folder),
        )
        _write_whole(self.folder / MANIFEST_FILE, seal(manifest))
        _sync_folder(self.folder)
        self.close()
        return _read_manifest(self.folder)

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


def amend(
    folder: Path,
    *,
    quality: Sequence[QualityEntry | EmbeddingQuality] | None = None,
    layers: Sequence[LayerRecord] | None = None,
    graph_quality: QualityEntry | EmbeddingQuality | None = None,
) -> Manifest:
    """Replace the measurements in a finished folder's manifest, and take in side files changed or added since.

    For what can only be known once the artifact runs: its quality, and a README.md that cites it.
    """
    manifest = _read_manifest(folder)
    tensors = {name: entry for name, entry in manifest.files.items() if name.endswith(".safetensors")}
    changes: dict[str, Any] = {"files": _hash_all(folder, tensors)}
    if quality is not None:
        changes["quality"] = tuple(quality)
    if layers is not None:
        changes["layers"] = tuple(layers)
    if graph_quality is not None and manifest.integer is not None:
        changes["integer"] = manifest.integer.model_copy(update={"quality": graph_quality})
    _write_whole(folder / MANIFEST_FILE, seal(manifest.model_copy(update=changes)))
    _sync_folder(folder)
    return _read_manifest(folder)


def set_schedule(
    path: str | Path, schedule: ScheduleEntry | None, tensors: Mapping[str, npt.NDArray[np.float32]] | None = None
) -> Manifest:
    """Give a finished artifact the schedule it follows by default, in place of the one it has; None takes that away.

    tensors: what it learned, by name, float32; with them goes a file named by its digest, and `schedule.file` and
    `schedule.model` are filled in. The new manifest takes the place of the old one in a single step: whoever opens the
    artifact meanwhile, or after a crash, has one schedule or the other, whole. (A crash can leave a file of a schedule
    that no manifest names; the next call removes it.)
    Raises ConfigError for a schedule that does not fit the artifact, InputMissing or InputCorrupt when there is no
    artifact at `path`.
    """
    folder = Path(path)
    _read_manifest(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of two writers the second takes over what the first wrote
        return _exchange_schedule(folder, handle, schedule, tensors or {})
    finally:
        os.close(handle)


def _exchange_schedule(
    folder: Path, handle: int, schedule: ScheduleEntry | None, tensors: Mapping[str, npt.NDArray[np.float32]]
) -> Manifest:
    manifest, temporary = _read_manifest(folder), folder / _SCHEDULE_TEMPORARY
    files = {name: entry for name, entry in manifest.files.items() if not _SCHEDULE_FILE.fullmatch(name)}
    try:
        if schedule is not None and tensors:
            schedule = schedule.model_copy(update={"model": fingerprint(manifest)})
            size, digest = _write_tensors(temporary, tensors, schedule)
            schedule = schedule.model_copy(update={"file": f"schedule-{digest[:16]}.safetensors"})
            files[str(schedule.file)] = FileEntry(sha256=digest, size=size)
        changes: dict[str, Any] = {
            "schema_version": version_of(
                manifest.spec, manifest.entries, schedule=schedule, integer=manifest.integer is not None
            ),
            "schedule": None if schedule is None else schedule.model_dump(),
            "files": dict(sorted(files.items())),
        }
        try:
            changed = Manifest.model_validate(dict(manifest) | changes)
        except ValidationError as error:
            what = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
            fix = f"Use widths of {list(manifest.bits)}, falling, and steps that ascend from 0"
            raise ConfigError(what.removeprefix("Value error, "), f"{folder}: schedule", fix) from None
        if changed.schedule is not None and changed.schedule.file is not None:
            os.replace(temporary, folder / changed.schedule.file)
            os.fsync(handle)
    finally:
        temporary.unlink(missing_ok=True)
    _write_whole(folder / MANIFEST_FILE, seal(changed))
    for left in sorted(entry.name for entry in folder.iterdir() if _SCHEDULE_FILE.fullmatch(entry.name)):
        if left not in files:
            (folder / left).unlink()
    os.fsync(handle)
    return _read_manifest(folder)


def _write_tensors(
    path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], schedule: ScheduleEntry
) -> tuple[int, str]:
    """Write a safetensors file that says what it was learned for, and return its size and SHA-256."""
    path.unlink(missing_ok=True)
    metadata = {"format": "lilliput", "horizon": str(schedule.horizon), "model": str(schedule.model)}
    plan = [Planned(name, "F32", array.shape) for name, array in tensors.items()]
    file = PlannedFile.create(path, Layout.of(plan, metadata))
    try:
        for name, array in tensors.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                what = f"{name} is {array.dtype}, or not finite"
                raise ConfigError(what, "schedule", "Give finite float32 numbers")
            file.write(name, np.ascontiguousarray(array), 0)
        file.sync()
    finally:
        file.close()
    with path.open("rb") as written:
        return os.fstat(written.fileno()).st_size, hashlib.file_digest(written, "sha256").hexdigest()


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless `publish` may put an artifact at `out`; call it before the work starts.

    It may where nothing is, on an empty folder, and, with `overwrite`, on an artifact that holds nothing else.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError("exists and is not a folder", str(out), "Give another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError("already exists", str(out), "Give --overwrite or another folder")
    strangers = _strangers(out)
    if strangers:
        what = f"holds {strangers[0]}, which is not part of an artifact"
        raise ConfigError(what, str(out), "Give another folder; we only ever replace an artifact")


def publish(partial: Path, out: Path, *, overwrite: bool = False) -> None:
    """Move a finished partial folder to `out` in one step: a reader sees the old artifact or the new, never a part.

    Raises ConfigError as `check_output` does, or when the two are on different disks; InputMissing or InputCorrupt
    when `partial` is not finished.
    """
    check_output(out, overwrite=overwrite)
    _read_manifest(partial)
    partial, out = partial.absolute(), out.absolute()
    try:
        if not out.exists() or not any(out.iterdir()):
            os.rename(partial, out)  # of a folder: fails, changing nothing, if someone filled `out` meanwhile
        elif _exchange(partial, out):
            _remove_artifact(partial)  # which is the old one now
        else:
            aside = out.with_name(f".{out.name}.{os.getpid()}")  # not one step, but nothing is lost if we die here
            os.rename(out, aside)
            os.rename(partial, out)
            _remove_artifact(aside)
        (out / JOURNAL_FILE).unlink(missing_ok=True)  # last: until now it says whose work this is
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise ConfigError(f"is on another disk than {partial}", str(out), "Keep both on one disk") from None
        raise
    _sync_folder(out.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        call, tail = getattr(libc, "renamex_np", None), (ctypes.c_uint(2),)  # RENAME_SWAP
        arguments: tuple[Any, ...] = (os.fsencode(first), os.fsencode(second))
    else:
        call, tail = getattr(libc, "renameat2", None), (ctypes.c_uint(2),)  # RENAME_EXCHANGE
        here = ctypes.c_int(-100)  # AT_FDCWD
        arguments = (here, os.fsencode(first), here, os.fsencode(second))
    if call is None:
        return False
    if call(*arguments, *tail) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _strangers(folder: Path) -> list[str]:
    """Names in `folder` that its own manifest does not account for."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        with Folder(folder) as opened:
            data = strict_json.parse(opened.read(MANIFEST_FILE, MANIFEST_LIMIT), str(folder), "")
    except LilliputError:
        return names
    files = data.get("files")
    if "lilliput_version" not in data or not isinstance(files, dict):
        return names
    return [name for name in names if name not in files and name not in (MANIFEST_FILE, JOURNAL_FILE)]


def _remove_artifact(folder: Path) -> None:
    """Delete an artifact's own files, the manifest last, and its folder; anything else in it stays."""
    names = [path.name for path in folder.iterdir()]
    own = set(names) - set(_strangers(folder)) - {MANIFEST_FILE}
    for name in (*sorted(own), MANIFEST_FILE):
        (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()


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


def _check_table(name: str, bits: int, entry: QuantEntry, table: npt.NDArray[np.uint8]) -> None:
    if table.dtype != np.uint8 or table.shape != (entry.out, 1 << bits):
        raise ValueError(f"{name}: the table is {table.dtype} {table.shape}, not uint8 {(entry.out, 1 << bits)}")
    if int(table.max()) >= 1 << LEVEL_BITS or (table[:, 1:] < table[:, :-1]).any():
        raise ValueError(f"{name}: the table for {bits} bits goes beyond {LEVEL_BITS} bits, or down along a row")


def _hash_all(folder: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Sizes and digests of every file but the manifest, by name; `known` ones are taken over."""
    found: dict[str, FileEntry] = {}
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST_FILE, JOURNAL_FILE):
            continue
        if path.name in _TEMPORARIES:  # of a run that died while it wrote one
            path.unlink()
            continue
        plain_name(path.name)
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        if known and path.name in known:
            found[path.name] = known[path.name]
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.name] = FileEntry(sha256=digest, size=os.fstat(file.fileno()).st_size)
    return found


def _read_manifest(folder: Path) -> Manifest:
    with Folder(folder) as opened:
        return load_manifest(opened.read(MANIFEST_FILE, MANIFEST_LIMIT), opened.where(MANIFEST_FILE))


def _temporary(name: str) -> str:
    return f".{name}.tmp"


_TEMPORARIES = {_SCHEDULE_TEMPORARY, *(_temporary(name) for name in (MANIFEST_FILE, INDEX_FILE))}


def _write_whole(path: Path, data: bytes) -> None:
    """Put a small file in place in one step, on the disk when this returns."""
    temporary = path.with_name(_temporary(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
