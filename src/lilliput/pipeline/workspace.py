"""OUT.partial: where one run works, locked from its first act to its last, and never anybody else's folder.

    owner      says the folder is ours; the lock of the run that is working
    artifact/  what will be published; its writer's journal names the run it belongs to
    work/      what a resumed run reads: run.json, the sweep's journal, activations

The writer's journal is the one truth about how much of the artifact is there. It goes away when the artifact is
published. Before it is there, while whole-model stages run and sensitivities are gathered, run.json names the run
whose work this is. Whatever stands here under another run's key is left over.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lilliput.artifact.disk import JOURNAL_FILE, sync
from lilliput.artifact.publish import partial_of
from lilliput.core.errors import ConfigError
from lilliput.methods.journal import Journal

_PARTS = {"owner", "artifact", "work"}
_OWNER = b"lilliput compress works here; delete the folder only when no run does\n"


class Workspace:
    """The folder of one run, as a context: locked inside, gone afterwards if `finished` was called."""

    def __init__(self, out: Path) -> None:
        self.out, self.root = out, partial_of(out)
        self.artifact, self.work = self.root / "artifact", self.root / "work"
        self._lock = -1

    def check(self) -> None:
        """Raise ConfigError when the place is taken by something that is not ours; changes nothing."""
        if not self.root.is_symlink() and not self.root.exists():
            return
        fix = "Move it away, or give another output"
        if self.root.is_symlink() or not self.root.is_dir():
            raise ConfigError("is in the way and is not a folder of ours", where=str(self.root), fix=fix)
        names = {path.name for path in self.root.iterdir()}
        if names - _PARTS or (names and (self.root / "owner").is_symlink()):
            stranger = min(names - _PARTS, default="owner")
            raise ConfigError(f"holds {stranger}, which is not ours", where=str(self.root), fix=fix)
        if names and "owner" not in names:
            raise ConfigError("was not made by a run of compress", where=str(self.root), fix=fix)

    def reserved_bytes(self) -> int:
        """Bytes of disk an earlier run already took here."""
        files = (p for p in self.root.rglob("*") if p.is_file() and not p.is_symlink())
        return sum(p.stat().st_blocks * 512 for p in files)

    def __enter__(self) -> Self:
        self.check()
        self.root.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self.root / "owner", flags, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            fix = "Wait for it, or give another output"
            raise ConfigError("another run is working there", where=str(self.root), fix=fix) from None
        os.pwrite(self._lock, _OWNER, 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._lock)

    def claim(self, key: str, parts: dict[str, Any], *, resume: bool) -> bool:
        """Make the folder this run's; return whether there is work of the same run to go on from.

        key: fingerprint of all the bytes depend on; parts: the same, readable. Raises ConfigError when the work there
        is another run's and `resume` forbids throwing it away.
        """
        found = self._key()
        if found is not None and found != key and resume:
            changed = ", ".join(self._changed(parts)) or "origin"
            what = f"holds unfinished work with another {changed}"
            raise ConfigError(what, where=str(self.root), fix="Repeat that run, or give --no-resume to discard it")
        same = resume and key == (found or self._noted())
        if not same:
            self.discard()
        elif found is None:  # nothing vouches for a tensor in place, so the sweep that writes them begins anew
            shutil.rmtree(self.artifact, ignore_errors=True)
            Journal(self.work).forget()
            Journal(self.work / "outcome").forget()
        self.artifact.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        fresh = self.work / "run.new"
        fresh.write_text(json.dumps(parts | {"key": key}, indent=1) + "\n", "utf-8")
        sync(fresh)
        fresh.replace(self.work / "run.json")
        return same

    def discard(self) -> None:
        """Throw away what an earlier run left."""
        (self.work / "run.json").unlink(missing_ok=True)  # first: what is half gone is nobody's work
        for folder in (self.work, self.artifact):
            if folder.exists():
                shutil.rmtree(folder)

    def finished(self) -> None:
        """Remove the folder after its artifact was published."""
        self.discard()
        (self.root / "owner").unlink()
        self.root.rmdir()

    def _key(self) -> str | None:
        """The run the artifact's journal belongs to, or None where there is none."""
        journal = self.artifact / JOURNAL_FILE
        if not journal.is_file() or journal.is_symlink():
            return None
        with journal.open("rb") as file:
            first = file.readline(4096)
        return first.rstrip(b"\n").decode("utf-8", "replace") if first.endswith(b"\n") else None

    def _noted(self) -> str | None:
        """The run that run.json belongs to, or None where there is none."""
        try:
            key = json.loads((self.work / "run.json").read_text("utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return key if isinstance(key, str) else None

    def _changed(self, parts: dict[str, Any]) -> list[str]:
        try:
            before = json.loads((self.work / "run.json").read_text("utf-8"))
            return [name for name in parts if before.get(name) != json.loads(json.dumps(parts[name]))]
        except (OSError, ValueError, AttributeError):
            return []
