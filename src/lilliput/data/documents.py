"""Readers of text: files, lists and hub datasets to a list of documents, each one string.

Every fault of a file becomes one line that names the file, the line or byte, and what to do about it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, OutOfResource

FIELDS: Final = (
    "text",
    "content",
    "body",
    "story",
    "prompt",
    "sentence",
    "dialogue",
    "question",
    "document",
    "article",
)
"""Names under which datasets keep their text, the likeliest first."""
MAX_BYTES: Final = 1 << 30
"""Text read from one file at most, counted after decompression."""
ENOUGH_CHARACTERS: Final = 1 << 26
"""A hub dataset's further files are left alone once this much text is there: calibration needs far less."""
FORMATS: Final = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".txt", ".txt.gz")

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<split>[\w./-]+))?")
_PIECE: Final = 1 << 20


def read_documents(*sources: Path | str | Sequence[str], field: str | None = None) -> list[str]:
    """Return the documents of every source, in order; blank ones are left out.

    A source is the path of a .txt file (one document), a .jsonl or .parquet file (one a row; .txt and .jsonl may be
    gzipped), the name of a dataset on the hub, `owner/name` or `owner/name:split`, or a sequence of documents.
    field: the column to read, where the format has columns; without it the text column is guessed from FIELDS, or is
    the only column of strings.
    Raises InputMissing for what is not there or cannot be reached, InputCorrupt for what cannot be read or is empty,
    ConfigError for an unknown format, a column that is not there or cannot be guessed, or a missing extra.
    """
    documents: list[str] = []
    for source in sources:
        if not isinstance(source, str | Path):
            texts, where = [*source], "calibration texts"
            if not all(isinstance(text, str) for text in texts):
                raise ConfigError("not all of them are strings", where=where, fix="Give a list of strings")
        else:
            texts, where = _read(source, field), str(source)
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise InputCorrupt("the file is empty", where=where, fix="Give text to calibrate or measure on")
        documents += texts
    if not documents:
        raise ConfigError("no source was given", where="calibration text", fix="Name a file or a dataset")
    return documents


def _read(source: Path | str, field: str | None) -> list[str]:
    path = Path(source)
    if path.is_dir():
        raise ConfigError("a folder, not a file", where=str(source), fix="Name the files in it")
    if path.exists():
        return _read_file(path, field)
    hub = _HUB.fullmatch(source) if isinstance(source, str) else None
    if hub and _suffix(source) is None:
        return _read_hub(hub["repo"], hub["split"], field)
    raise InputMissing(
        "the file is not there", where=str(source), fix="Check the path, or give a dataset as owner/name"
    )


def _suffix(name: Path | str) -> str | None:
    return next((s for s in FORMATS if str(name).lower().endswith(s)), None)


def _read_file(path: Path, field: str | None) -> list[str]:
    suffix = _suffix(path)
    if suffix is None:
        raise ConfigError(f"{path.suffix or 'no'} suffix", where=str(path), fix=f"Formats are {', '.join(FORMATS)}")
    if suffix == ".parquet":
        return list(_parquet(path, field))
    text = _text(path, unzip=suffix.endswith(".gz"))
    return [text] if suffix.startswith(".txt") else list(_jsonl(text, field, str(path)))


def _text(path: Path, *, unzip: bool) -> str:
    """The whole file as text. Reads by pieces, so that a small file that unpacks to a huge one stops at the cap."""
    data = bytearray()
    try:
        with gzip.open(path, "rb") if unzip else path.open("rb") as file:
            while piece := file.read(_PIECE):
                data += piece
                if len(data) > MAX_BYTES:
                    what = f"more than {MAX_BYTES} bytes of text"
                    raise OutOfResource(what, where=str(path), fix="Split the file, or give a part of it")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputCorrupt(f"broken gzip file ({error})", where=str(path), fix="Fetch the file again") from error
    except OSError as error:
        raise InputMissing(f"cannot be read ({error.strerror or error})", str(path), "Check its permissions") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start}"
        raise InputCorrupt(what, where=str(path), fix="Save the file as UTF-8") from error


def _jsonl(text: str, field: str | None, where: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            fix = "Put one JSON object on each line"
            raise InputCorrupt(f"line {number} is not JSON ({reason})", where=where, fix=fix) from error
        if not isinstance(row, dict):
            what = f"line {number} holds no object"
            raise InputCorrupt(what, where=where, fix='Put one JSON object on each line, {"text": ".."}')
        field = field or _guess({k: isinstance(v, str) for k, v in row.items()}, where)
        if not isinstance(row.get(field), str):
            what = f"line {number} has no string {field!r}, but {_listed(row)}"
            raise InputCorrupt(what, where=where, fix="Repair the line, or name another field")
        yield row[field]


def _guess(strings: Mapping[str, bool], where: str) -> str:
    """The field to read. strings: each field's name, and whether it holds strings."""
    for name in FIELDS:
        if strings.get(name):
            return name
    only = [name for name, is_string in strings.items() if is_string]
    if len(only) == 1:
        return only[0]
    what = f"cannot tell which field holds the text; there is {_listed(strings)}"
    raise ConfigError(what, where=where, fix="Name it with --field")


def _listed(names: Mapping[str, object]) -> str:
    shown = [str(name)[:40] for name in names][:20]
    return ", ".join(shown) or "no field"


def _parquet(path: Path, field: str | None) -> Iterator[str]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        fix = "pip install 'lilliput[compress]'"
        raise ConfigError("reading Parquet needs pyarrow", where=str(path), fix=fix) from error
    size = 0
    try:
        with pq.ParquetFile(path) as file:
            kinds = {f.name: pa.types.is_string(f.type) or pa.types.is_large_string(f.type) for f in file.schema_arrow}
            name = field or _guess(kinds, str(path))
            if not kinds.get(name):
                what = f"there is no column of strings {name!r}, but {_listed(kinds)}"
                raise ConfigError(what, where=str(path), fix="Name one of these with --field")
            for batch in file.iter_batches(batch_size=1024, columns=[name]):
                size += batch.nbytes
                if size > MAX_BYTES:
                    what = f"more than {MAX_BYTES} bytes of text"
                    raise OutOfResource(what, where=str(path), fix="Split the file, or give a part of it")
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputCorrupt(f"broken Parquet file ({reason})", where=str(path), fix="Fetch the file again") from error


def _read_hub(repo: str, split: str | None, field: str | None) -> list[str]:
    """Documents of a dataset's data files, in the order of their names, until there is ENOUGH_CHARACTERS of text."""
    where = f"{repo}:{split}" if split else repo
    try:
        import huggingface_hub as hub
    except ImportError as error:
        what = "not a file here, and reading it from the hub needs huggingface_hub"
        raise ConfigError(what, where=where, fix="pip install 'lilliput[compress]', or check the path") from error

    def reach(call: Callable[..., Any], *args: str) -> Any:
        try:
            return call(*args, repo_type="dataset")
        except Exception as error:  # the hub library lets through what its HTTP library raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            fix = "Check the name and the network, or give a local file"
            raise InputMissing(f"no such file, and no such dataset can be reached ({reason})", where, fix) from error

    files = choose_files(reach(hub.list_repo_files, repo), split)
    if not files:
        fix = f"Formats are {', '.join(FORMATS)}; give the split as owner/name:split"
        raise InputMissing("the dataset has no data files that fit", where=where, fix=fix)
    documents: list[str] = []
    for name in files:
        documents += _read_file(Path(reach(hub.hf_hub_download, repo, name)), field)
        if sum(map(len, documents)) >= ENOUGH_CHARACTERS:
            break
    return documents


def choose_files(names: Sequence[str], split: str | None) -> list[str]:
    """Of a dataset repository's files, those to read: one format, one split, by name.

    split: "test", or with a configuration "wikitext-2-raw-v1/test"; None is "train" where some file is called so, else
    all. A part fits a folder of that name, or a file whose name it begins ("test-00000-of-00001.parquet").
    """

    def fits(name: str, wanted: str) -> bool:
        steps = name.split("/")
        return all(any(re.fullmatch(rf"{re.escape(w)}([-._].*)?", s) for s in steps) for w in wanted.split("/"))

    data = sorted(name for name in names if _suffix(name))
    chosen = [name for name in data if fits(name, split or "train")]
    if not split and not chosen:
        chosen = data
    best = next((s for s in FORMATS if any(_suffix(name) == s for name in chosen)), None)
    return [name for name in chosen if _suffix(name) == best]
