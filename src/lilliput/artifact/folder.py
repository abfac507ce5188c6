"""A folder whose files we open by plain name only: relative to a directory handle, never through a symbolic link."""

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from lilliput.artifact.entries import plain_name
from lilliput.core.errors import InputCorrupt, InputMissing

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a pipe must not make us wait
_FIX = "Give a folder that `lilliput compress` wrote"
_COPY = "Copy the file itself into the folder; from the Hugging Face hub, download with --local-dir"


class Folder:
    """An open directory. Raises InputMissing when there is none at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputMissing("there is no such folder", str(path), _FIX) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputMissing(f"cannot be opened as a folder ({reason})", str(path), _FIX) from None

    def where(self, name: str) -> str:
        """Full path of one file, for messages."""
        return str(self.path / name)

    def names(self) -> list[str]:
        """Every name in the folder, sorted."""
        return sorted(os.listdir(self._handle))

    def size(self, name: str) -> int | None:
        """Bytes of a regular file, None where there is none. Raises InputCorrupt for a link or anything else."""
        plain_name(name)
        try:
            found = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(found.st_mode):
            raise InputCorrupt("a symbolic link, which we do not follow", self.where(name), _COPY)
        if not stat.S_ISREG(found.st_mode):
            raise InputCorrupt("not a regular file", self.where(name), _COPY)
        return found.st_size

    def open(self, name: str) -> tuple[int, int]:
        """Return a descriptor, owned by the caller, and the size of a regular file. Raises InputMissing, InputCorrupt."""
        plain_name(name)
        try:
            handle = os.open(name, _FLAGS, dir_fd=self._handle)
        except FileNotFoundError:
            fix = "Copy it there, or make the artifact again"
            raise InputMissing("the file is not there", self.where(name), fix) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise InputCorrupt("a symbolic link, which we do not follow", self.where(name), _COPY) from None
            raise InputMissing(
                f"cannot be read ({error.strerror})", self.where(name), "Check its permissions"
            ) from None
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            raise InputCorrupt("not a regular file", self.where(name), _COPY)
        return handle, found.st_size

    def read(self, name: str, limit: int) -> bytes:
        """Return a whole file of at most `limit` bytes."""
        handle, size = self.open(name)
        with os.fdopen(handle, "rb") as file:
            if size > limit:
                raise InputCorrupt(f"{size} bytes, more than the {limit} we read", self.where(name), _FIX)
            return file.read(limit + 1)

    def close(self) -> None:
        """Let go of the directory."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
