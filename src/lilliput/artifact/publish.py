"""Puts a finished artifact in its place in one step, and never in the place of anything else."""

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lilliput.artifact import strict_json
from lilliput.artifact.disk import JOURNAL_FILE, read_manifest, sync
from lilliput.artifact.folder import Folder
from lilliput.artifact.schema import MANIFEST_FILE, MANIFEST_LIMIT
from lilliput.core.errors import ConfigError, LilliputError


def partial_of(out: Path) -> Path:
    """Folder in which the artifact `out` is made: a sibling, so that publishing is a rename."""
    return out.absolute().with_name(out.name + ".partial")


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
    read_manifest(partial)
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
    sync(out.parent)


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
