"""A checkpoint's tokenizer, file by file, as an artifact keeps it."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lilliput.core.errors import InputCorrupt, InputMissing, Unsupported
from lilliput.models.config import without_trust
from lilliput.models.source import AGAIN, first_line, inside

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """Return those of tokenizer.json and its companions that are there."""
    paths = [inside(folder, name) for name in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]


def export_tokenizer(folder: Path, config: dict[str, Any], dest: Path) -> list[Path]:
    """Put tokenizer.json and its companions of a checkpoint into the folder `dest`; return their paths there.

    Files are copied byte for byte, less any key of the small ones that could grant trust. Where there is only a slow
    tokenizer, transformers converts it, without remote code. Raises InputMissing when there is no tokenizer,
    Unsupported when it cannot be converted, InputCorrupt when a file is not JSON.
    """
    dest.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(folder)
    made: set[str] = set()
    if not any(path.name == "tokenizer.json" for path in files):
        _convert_tokenizer(folder, config, dest)
        made = {path.name for path in dest.iterdir()}
    for path in files:
        if path.name not in made:
            _copy_side_file(path, dest / path.name)
    return [dest / name for name in TOKENIZER_FILES if (dest / name).is_file()]


def _copy_side_file(path: Path, dest: Path) -> None:
    """Copy a tokenizer's file; of the JSON files that libraries take settings from, without what could grant trust."""
    if path.name not in _SETTINGS:
        shutil.copyfile(path, dest)
        return
    data = path.read_bytes()
    try:
        raw = json.loads(data)
        kept = without_trust(raw)
    except (ValueError, RecursionError) as error:
        raise InputCorrupt(f"is not valid JSON ({error})", where=str(path), fix=AGAIN) from None
    dest.write_bytes(data if kept == raw else json.dumps(kept, indent=2, ensure_ascii=False).encode())


def _convert_tokenizer(folder: Path, config: dict[str, Any], dest: Path) -> None:
    """Make dest/tokenizer.json from a slow tokenizer's files; transformers sees copies of those and nothing else."""
    there = [path for path in (inside(folder, n) for n in _SLOW_TOKENIZERS) if path.is_file()]
    if not there:
        raise InputMissing("holds no tokenizer.json", where=str(folder), fix="Put the model's tokenizer.json there")
    there += [path for path in (inside(folder, n) for n in (*_SETTINGS, "added_tokens.json")) if path.is_file()]
    fix = "Convert it to tokenizer.json yourself and put that into the folder"
    with TemporaryDirectory() as scratch:
        for path in there:
            _copy_side_file(path, Path(scratch) / path.name)
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(scratch, use_fast=True, trust_remote_code=False)
            tokenizer.save_pretrained(str(dest))
        except Exception as error:  # transformers raises whatever the file made it trip over
            what = f"its tokenizer cannot be converted ({first_line(error)})"
            raise Unsupported(what, where=str(folder), fix=fix) from None
    if not (dest / "tokenizer.json").is_file():
        raise Unsupported("its tokenizer has no fast form", where=str(folder), fix=fix)
