"""Changes the manifest of a finished artifact: what was measured of it, and the schedule it follows."""

import fcntl
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from lilliput.artifact.container import Layout, Planned, PlannedFile
from lilliput.artifact.disk import SCHEDULE_TEMPORARY, hash_all, read_manifest, sync, write_whole
from lilliput.artifact.entries import EmbeddingQuality, FileEntry, LayerRecord, QualityEntry, ScheduleEntry
from lilliput.artifact.schema import MANIFEST_FILE, Manifest, fingerprint, seal, version_of
from lilliput.core.errors import ConfigError

_SCHEDULE_FILE = re.compile(r"schedule-[0-9a-f]{16}\.safetensors")


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
    manifest = read_manifest(folder)
    tensors = {name: entry for name, entry in manifest.files.items() if name.endswith(".safetensors")}
    changes: dict[str, Any] = {"files": hash_all(folder, tensors)}
    if quality is not None:
        changes["quality"] = tuple(quality)
    if layers is not None:
        changes["layers"] = tuple(layers)
    if graph_quality is not None and manifest.integer is not None:
        changes["integer"] = manifest.integer.model_copy(update={"quality": graph_quality})
    write_whole(folder / MANIFEST_FILE, seal(manifest.model_copy(update=changes)))
    sync(folder)
    return read_manifest(folder)


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
    read_manifest(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of two writers the second takes over what the first wrote
        return _exchange_schedule(folder, handle, schedule, tensors or {})
    finally:
        os.close(handle)


def _exchange_schedule(
    folder: Path, handle: int, schedule: ScheduleEntry | None, tensors: Mapping[str, npt.NDArray[np.float32]]
) -> Manifest:
    manifest, temporary = read_manifest(folder), folder / SCHEDULE_TEMPORARY
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
    write_whole(folder / MANIFEST_FILE, seal(changed))
    for left in sorted(entry.name for entry in folder.iterdir() if _SCHEDULE_FILE.fullmatch(entry.name)):
        if left not in files:
            (folder / left).unlink()
    os.fsync(handle)
    return read_manifest(folder)


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
