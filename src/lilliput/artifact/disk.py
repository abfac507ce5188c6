"""Small files of an artifact's folder put on the disk for good, and the folder read back."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lilliput.artifact.entries import FileEntry, plain_name
from lilliput.artifact.folder import Folder
from lilliput.artifact.schema import INDEX_FILE, MANIFEST_FILE, MANIFEST_LIMIT, Manifest, load_manifest

JOURNAL_FILE = ".written"
"""In a partial folder until it is published: the run's key, then the name of each tensor that is on disk for good."""

SCHEDULE_TEMPORARY = ".schedule.tmp"
"""What a schedule has learned, until its digest names it."""


def _temporary(name: str) -> str:
    return f".{name}.tmp"


_TEMPORARIES = {SCHEDULE_TEMPORARY, *(_temporary(name) for name in (MANIFEST_FILE, INDEX_FILE))}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder. Raises InputMissing or InputCorrupt."""
    with Folder(folder) as opened:
        return load_manifest(opened.read(MANIFEST_FILE, MANIFEST_LIMIT), opened.where(MANIFEST_FILE))


def hash_all(folder: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
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


def write_whole(path: Path, data: bytes) -> None:
    """Put a small file in place in one step, on the disk when this returns."""
    temporary = path.with_name(_temporary(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; when the context ends that file is on the disk and stands in the place of `path`, if any."""
    fresh = path.with_suffix(".new")
    yield fresh
    sync(fresh)
    fresh.replace(path)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
