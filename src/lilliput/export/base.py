"""What a format is, and how its folder comes to be: complete or not at all."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lilliput.artifact.disk import sync
from lilliput.artifact.integer import IntegerModel
from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.version import VERSION

MANIFEST = "export.json"
"""Says what a folder holds, and that we made it."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Format(ABC):
    """A frozen config that can write an integer model in some foreign form."""

    @abstractmethod
    def write(self, model: IntegerModel, folder: Path) -> dict[str, Any]:
        """Write files into the empty `folder`; return what its manifest should say of them, as plain data.

        Raises Unsupported for what the form has no words for.
        """


def export(artifact: Artifact, out: str | Path, name: str, form: Format, *, force: bool = False) -> dict[str, Any]:
    """Write the integer model of `artifact` to the folder `out` and return the manifest written there.

    name: what the registry calls the format. force: replace `out` when it is an earlier export.
    Raises ConfigError when `out` is there already, Unsupported when the artifact has no integer graph or the format no
    words for it.
    """
    target = Path(os.path.abspath(out))
    check_output(target, force=force)
    model = artifact.integer()
    if model is None:
        what = "it has no integer graph: its activations have no fixed scales"
        raise Unsupported(what, str(artifact.path), "Make one with `lilliput compress --recipe mobilequant-w8a8`")
    with _partial(target) as folder:
        told = form.write(model, folder)
        for file in TOKENIZER:
            if file in artifact.manifest.files:
                shutil.copyfile(artifact.path / file, folder / file)
        manifest = {
            "format": name,
            "lilliput": VERSION,
            "artifact": {"name": artifact.path.name, "source": artifact.manifest.source.name},
            **told,
            "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _publish(folder, target, force=force)
    return manifest


def check_output(out: Path, *, force: bool) -> None:
    """Raise ConfigError when `out` may not be written: it is there, or it is something else than an export."""
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    if not force:
        raise ConfigError("is there already", str(out), "Give another folder, or --force to replace an earlier export")
    try:
        ours = "format" in json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours or out.is_symlink():
        raise ConfigError("is no earlier export, so it is not replaced", str(out), "Give another folder")


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone at the end, unless it was published."""
    if not out.parent.is_dir():
        raise ConfigError("there is no such folder", str(out.parent), "Make it first, or give another place")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path, *, force: bool) -> None:
    check_output(out, force=force)
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    aside = folder.with_suffix(".old")
    if os.path.lexists(out) and any(out.iterdir()):
        os.rename(out, aside)
    try:
        os.rename(folder, out)
    except OSError as error:
        if aside.exists():
            os.rename(aside, out)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # someone else was faster
            check_output(out, force=False)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    sync(out.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
