"""From what a user typed to the files of a checkpoint: a folder, or a hub id fetched into the hub's cache.

Only safetensors, JSON, tokenizer and template files are ever opened, and only inside the folder. Nothing here imports
torch; huggingface_hub is imported when a hub id is given.
"""

import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lilliput.core.errors import InputCorrupt, InputMissing, InputUnsafe

SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
WEIGHT_FILES = ("*.safetensors",)
POOLING = "1_Pooling"
"""The one folder of a checkpoint we look into: in sentence encoders its config.json says how tokens become one vector."""
UNWANTED = ("[!1]*/*", "1[!_]*/*", "1_[!P]*/*", "*/*.safetensors", "consolidated*")
"""Other copies of the same weights, which some repositories carry; a pattern's * runs over separators."""
AGAIN = "Download the checkpoint again"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_INDEX_BYTES = 64 << 20
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,199}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_id(source: str | Path) -> bool:
    """Say whether `source` can only be a hub id: owner/name, and no such folder here."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None and not os.path.exists(source)


def locate(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, fetching it from the hub where `source` is an id.

    weights False fetches only the small files. HF_HUB_OFFLINE is honoured by the hub's library.
    Raises InputMissing when there is no such folder, or the hub cannot be reached and the cache has no copy.
    """
    if is_hub_id(source):
        return _fetch(str(source), revision, SIDE_FILES + WEIGHT_FILES if weights else SIDE_FILES)
    if not os.path.isdir(source):  # unlike Path's, these say False to any string
        what = "is not a folder" if os.path.exists(source) else "there is no such folder"
        raise InputMissing(what, where=str(source), fix="Give a checkpoint folder, or a hub id such as owner/name")
    return Path(source)


def inside(folder: Path, name: str) -> Path:
    """Return folder/name where that is a plain name whose target lies in the folder, or in the hub cache's own store.

    Raises InputUnsafe for anything else: separators, "..", a link that leads out.
    """
    if not _PLAIN.fullmatch(name):
        raise InputUnsafe(f"names the file {name!r}, which is not a plain name", where=str(folder), fix=_FRESH)
    return _kept(folder, folder / name)


def pooling_file(folder: Path) -> Path | None:
    """Return 1_Pooling/config.json where it is there. Raises InputUnsafe as `inside` does."""
    path = inside(folder, POOLING) / "config.json"
    return _kept(folder, path) if path.is_file() else None


def _kept(folder: Path, path: Path) -> Path:
    """Return `path` unless it is a link that leads out of `folder`."""
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # in the hub's cache the files are links to ../../blobs
        homes.append(homes[0].parent.parent / "blobs")
    if path.is_symlink() and path.resolve().parent not in homes:
        raise InputUnsafe(f"{path.name} is a link that leads out of the folder", where=str(folder), fix=_FRESH)
    return path


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the weight files, and the index (tensor to file) where there is one.

    Raises InputMissing when there are none, InputUnsafe when there are only pickles or the index leads elsewhere,
    InputCorrupt when the index makes no sense.
    """
    if inside(folder, _SINGLE).is_file():
        return [_SINGLE], None
    if inside(folder, _INDEX).is_file():
        index = _read_index(inside(folder, _INDEX))
        names = sorted(set(index.values()))
        for name in names:
            if not inside(folder, name).is_file():
                what = f"{name}, which {_INDEX} names, is not there"
                raise InputMissing(what, where=str(folder), fix="Download the checkpoint again, all shards of it")
        return names, index
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        what = f"{pickles[0]} is a pickle, and opening a pickle can run code"
        raise InputUnsafe(what, where=str(folder), fix=_convert(folder, pickles))
    fix = "Give a checkpoint whose weights are safetensors"
    raise InputMissing(f"holds no {_SINGLE}", where=str(folder), fix=fix)


def _read_index(path: Path) -> dict[str, str]:
    """Return the weight map of an index file."""
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise InputCorrupt(f"is larger than {_MAX_INDEX_BYTES} bytes", where=str(path), fix="Download it again")
    try:
        index: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputCorrupt(f"is not valid JSON ({error})", where=str(path), fix="Download it again") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise InputCorrupt("has no weight_map of tensors to files", where=str(path), fix="Download it again")
    for name in set(found.values()):
        inside(path.parent, name)
        if not name.endswith(".safetensors"):
            raise InputUnsafe(f"names {name!r}, which is not a safetensors file", where=str(path), fix=_FRESH)
    return found


def _fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        what = "is not a folder, and fetching from the hub needs huggingface_hub"
        raise InputMissing(what, where=name, fix='Run pip install "lilliput[compress]"') from None
    try:
        wanted, unwanted = list(patterns), list(UNWANTED)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's library raises a dozen kinds, of three other libraries
        what = f"is not a folder here and could not be fetched from the hub ({first_line(error)})"
        raise InputMissing(what, where=name, fix="Check the name and the connection, or give a folder") from None


def first_line(error: Exception) -> str:
    """Return the first line of what an error of another library says, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _convert(folder: Path, pickles: list[str]) -> str:
    """Return the command that turns pickles into safetensors, as a step of its own that the user decides on."""
    pattern = "pytorch_model*.bin" if any(fnmatch(p, "pytorch_model*.bin") for p in pickles) else pickles[0]
    code = (
        "import sys, pathlib, torch; from safetensors.torch import save_file; d = pathlib.Path(sys.argv[1]); "
        "save_file({k: v.clone().contiguous() for f in sorted(d.glob(sys.argv[2])) "
        "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, d / 'model.safetensors')"
    )
    arguments = f"{shlex.quote(str(folder))} {shlex.quote(pattern)}"
    return f'Run python -c "{code}" {arguments} once, if you trust where it came from'


_FRESH = "Do not use this checkpoint unless you know why, and download it again from its author"
