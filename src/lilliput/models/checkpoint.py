"""A checkpoint read lazily by canonical name: shapes from the headers, one tensor at a time from the files.

Opening one reads the config and the headers only and needs no torch; `read` does. What is there is checked against what
the architecture needs when the checkpoint is opened, so a missing or misshapen tensor is found before any work is done.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, Unsupported
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec
from lilliput.models.architecture import Architecture, Key, Source, find_architecture, modules
from lilliput.models.config import read_config, read_modules, read_pooling, read_preprocessor, without_trust
from lilliput.models.encoder_architecture import (
    Beside,
    EncoderArchitecture,
    encoder_architectures,
    encoder_modules,
    find_encoder,
)
from lilliput.models.source import first_line, inside, locate, pooling_file, weight_files

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
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
_AGAIN = "Download the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """dtype as safetensors spells it ("F32", "F16", "BF16"); shape in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.size * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that could be quantized: what it does, its (out, in), its dtype, whether it has a bias."""

    role: Literal["embed", "attn", "mlp", "head"]
    shape: tuple[int, int]
    dtype: str
    bias: bool


@dataclass(frozen=True)
class _Origin:
    """Where a canonical tensor comes from: stored tensors, and the rows of them that are ours.

    Row r of the canonical tensor is row `start + (r // run) * step + r % run` of the stored one.
    """

    stored: tuple[str, ...]
    info: TensorInfo
    start: int = 0
    run: int = 0
    step: int = 0
    flat: bool = False
    """The stored tensor has more axes, of which those behind the first are one here."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    file: str
    info: TensorInfo


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of safetensors under canonical names.

    config holds the keys of config.json that our allow-list lets through. notes are sentences on what the checkpoint
    promises and we do not serve. Made by `open`.
    """

    folder: Path
    spec: AnySpec
    config: dict[str, Any]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _stored: dict[str, Stored] = field(repr=False, default_factory=dict)
    _origins: dict[str, _Origin] = field(repr=False, default_factory=dict)
    _cache: dict[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None, *, tower: str | None = None) -> "Checkpoint":
        """Open a checkpoint folder, or fetch a hub id ("owner/name", at `revision`) and open that.

        tower: which encoder is meant where the checkpoint has several. Reads config.json and the headers of the weight
        files. Raises InputMissing, InputCorrupt, InputUnsafe or Unsupported, each with the file it is about, and
        ConfigError for a tower that is not there or not said.
        """
        folder = locate(source, revision)
        config = read_config(inside(folder, "config.json"))
        files, index = weight_files(folder)
        stored: dict[str, Stored] = {}
        for name in files:
            stored |= _headers(inside(folder, name), None if index is None else {k for k in index if index[k] == name})
        found = cls.of(folder, config, stored, files, tower=tower)
        found._check_tie()
        return found

    @classmethod
    def of(
        cls,
        folder: Path,
        config: dict[str, Any],
        stored: dict[str, Stored],
        files: Iterable[str],
        *,
        tower: str | None = None,
    ) -> "Checkpoint":
        """Return the checkpoint that a filtered config and the headers of its files make. Raises as `open` does."""
        where = str(folder / "config.json")
        encoder = find_encoder(config, tower, where=where)
        arch: Architecture | EncoderArchitecture
        spec: AnySpec
        if encoder is not None:
            beside = _beside(folder)
            arch, spec, notes = encoder, encoder.spec(config, beside, where=where), encoder.notes(config, beside)
        else:
            also = sorted({name for known in encoder_architectures().values() for name in known.classes})
            arch = find_architecture(config, where=where, also=also)
            if tower is not None:
                raise ConfigError(f"has no {tower} tower, being a decoder", where=where, fix="Leave --tower out")
            spec, notes = arch.spec(config, where=where), arch.notes(config)
        origins = _origins(arch, spec, config, stored, str(folder))
        _no_leftovers(arch, spec, origins, stored, str(folder))
        return cls(folder, spec, config, tuple(files), notes, stored, origins)

    def names(self) -> list[str]:
        """Return the canonical names of all tensors, in order of use."""
        return list(self._origins)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor, fused matrices split. Raises KeyError for a name not in `names()`."""
        return self._origins[name].info

    def read(self, name: str) -> "Tensor":
        """Return one tensor in memory of its own, dtype as stored, fused matrices split.

        Raises KeyError for a name not in `names()`; InputCorrupt when a value is not finite or the file has changed.
        """
        import torch

        origin = self._origins[name]
        parts = [self._rows(stored, origin) for stored in origin.stored]
        tensor = parts[0] if len(parts) == 1 else torch.stack(parts)
        if origin.flat:
            tensor = tensor.flatten(1)
        if tuple(tensor.shape) != origin.info.shape:
            raise InputCorrupt(f"{name} has changed since it was opened", where=str(self.folder), fix="Start again")
        if not bool(torch.isfinite(tensor).all()):
            file = self.folder / self._stored[origin.stored[0]].file
            raise InputCorrupt(f"{origin.stored[0]} holds NaN or infinity", where=str(file), fix=_AGAIN)
        return tensor

    def fingerprint(self) -> str:
        """Return the sha256, in hex, over names and contents of config.json, weight files and tokenizer.json.

        Reads every byte once; the result is kept in memory.
        """
        if "fingerprint" not in self._cache:
            digest = hashlib.sha256()
            extra = ["tokenizer.json"] if inside(self.folder, "tokenizer.json").is_file() else []
            for name in sorted(["config.json", *self.files, *extra]):
                with inside(self.folder, name).open("rb") as file:
                    digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
            self._cache["fingerprint"] = digest.hexdigest()
        return self._cache["fingerprint"]

    @property
    def family(self) -> str:
        """The architecture's name, as `spec.family`."""
        return self.spec.family

    @property
    def parameters(self) -> int:
        """Elements of all tensors; a tied head counts once."""
        return sum(o.info.size for o in self._origins.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(o.info.nbytes for o in self._origins.values())

    def linears(self) -> dict[str, Matrix]:
        """Return every weight matrix that could be quantized, by canonical name without `.weight`, in order of use.

        A tied head is the embedding and does not appear a second time.
        """
        found: dict[str, Matrix] = {}
        for name, shape in _modules(self.spec):
            role = _role(name)
            if role and len(shape) == 2:
                dtype = self.info(f"{name}.weight").dtype
                found[name] = Matrix(role, (shape[0], shape[1]), dtype, f"{name}.bias" in self._origins)
        return found

    def tokenizer_files(self) -> list[Path]:
        """Return those of tokenizer.json and its companions that are there."""
        paths = [inside(self.folder, name) for name in TOKENIZER_FILES]
        return [path for path in paths if path.is_file()]

    def export_tokenizer(self, dest: Path) -> list[Path]:
        """Put tokenizer.json and its companions into the folder `dest`; return their paths there.

        Files are copied byte for byte, less any key of the small ones that could grant trust. Where there is only a slow
        tokenizer, transformers converts it, without remote code. Raises InputMissing when there is no tokenizer,
        Unsupported when it cannot be converted, InputCorrupt when a file is not JSON.
        """
        dest.mkdir(parents=True, exist_ok=True)
        files = self.tokenizer_files()
        made: set[str] = set()
        if not any(path.name == "tokenizer.json" for path in files):
            _convert_tokenizer(self.folder, self.config, dest)
            made = {path.name for path in dest.iterdir()}
        for path in files:
            if path.name not in made:
                _copy_side_file(path, dest / path.name)
        return [dest / name for name in TOKENIZER_FILES if (dest / name).is_file()]

    def _rows(self, name: str, origin: _Origin) -> "Tensor":
        """Return our rows of a stored tensor, in memory of their own."""
        import torch

        stored = self._stored[name]
        path = inside(self.folder, stored.file)
        try:
            with safe_open(path, framework="pt") as file:
                if not origin.run:
                    whole: Tensor = file.get_tensor(name).clone()
                    return whole
                rows = file.get_slice(name)
                starts = range(origin.start, stored.info.shape[0], origin.step or stored.info.shape[0])
                return torch.cat([rows[s : s + origin.run] for s in starts])
        except (SafetensorError, OSError) as error:
            raise InputCorrupt(f"{name} cannot be read ({error})", where=str(path), fix=_AGAIN) from None

    def _check_tie(self) -> None:
        """Raise InputCorrupt where the config ties the head and the file has a different one; compares three rows."""
        if not isinstance(self.spec, ModelSpec) or not self.spec.tied_head:
            return
        arch = find_architecture(self.config, where=str(self.folder))
        head = next((n for n in _heads(arch) if n in self._stored), None)
        if head is None:
            return
        embed = self._origins["embed_tokens.weight"].stored[0]
        if self._stored[embed].info != self._stored[head].info or self._peek(embed) != self._peek(head):
            what = f"tie_word_embeddings is true, yet {head} differs from {embed}"
            raise InputCorrupt(what, where=str(self.folder), fix="Set tie_word_embeddings to false to use both")

    def _peek(self, name: str) -> list[bytes]:
        """Return three rows of a stored matrix, as bytes.

        Read past the library, which cannot give bfloat16 without torch; it has checked the header already.
        """
        info, path = self._stored[name].info, inside(self.folder, self._stored[name].file)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(start - 8))[name]["data_offsets"]
            width, rows = (end - begin) // info.shape[0], []
            for row in (0, info.shape[0] // 2, info.shape[0] - 1):
                file.seek(start + begin + row * width)
                rows.append(file.read(width))
        return rows


def _headers(path: Path, wanted: set[str] | None) -> dict[str, Stored]:
    """Return what one weight file holds; `wanted` are the tensors an index expects there.

    The safetensors library checks header, bounds and sizes when it opens the file.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            infos = {n: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputCorrupt(f"is not a whole safetensors file ({error})", where=str(path), fix=_AGAIN) from None
    gone = sorted((wanted or set()) - set(names))
    if gone:
        raise InputMissing(f"lacks {_some(gone)}, which the index places here", where=str(path), fix=_AGAIN)
    return {name: Stored(path.name, info) for name, info in infos.items()}


def _heads(arch: Architecture) -> list[str]:
    """Return all names the head's matrix may have."""
    return [f"{name}.weight" for name in _candidates(arch, arch.modules["lm_head"], 0)]


def _candidates(arch: Architecture | EncoderArchitecture, source: Source, layer: int) -> list[str]:
    """Return all names a source may have in a checkpoint, `{h}` left standing."""
    made = [n.replace("{p}", p).replace("{i}", str(layer)) for p in arch.prefixes for n in source.names]
    return list(dict.fromkeys(made))


def _modules(spec: AnySpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the canonical modules that a spec has and the shape of each one's weight, in order of use."""
    return encoder_modules(spec) if isinstance(spec, EncoderSpec) else modules(spec)


def _beside(folder: Path) -> Beside:
    """Return what the small files beside an encoder's config.json say."""
    found: Beside = {}
    if (pooling := pooling_file(folder)) is not None:
        found["pooling"] = read_pooling(pooling)
    if (listed := inside(folder, "modules.json")).is_file():
        found["modules"] = read_modules(listed)
    if (preprocessor := inside(folder, "preprocessor_config.json")).is_file():
        found["preprocessor"] = read_preprocessor(preprocessor)
    return found


def _origins(
    arch: Architecture | EncoderArchitecture,
    spec: AnySpec,
    config: dict[str, Any],
    stored: dict[str, Stored],
    where: str,
) -> dict[str, _Origin]:
    """Return where each canonical tensor comes from. Raises InputMissing or InputCorrupt for what does not fit."""
    found: dict[str, _Origin] = {}
    missing: list[str] = []
    for name, shape in _modules(spec):
        layer, template = _template(name)
        source = arch.modules[template]
        names = _candidates(arch, source, layer)
        bias = source.bias.of(config) if isinstance(source.bias, Key) else source.bias
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            if kind == "bias" and not bias:
                continue
            heads = range(shape[0]) if "{h}" in names[0] else None
            spelled = [(n,) for n in names] if source.bare else [_spell(n, kind, heads) for n in names]
            there = next((s for s in spelled if all(part in stored for part in s)), None)
            if there is None:
                missing.append(next(part for part in spelled[0] if part not in stored))
            else:
                found[f"{name}.{kind}"] = _origin(there, stored, size, template, source, spec, where)
    if missing:
        fix = "Download the checkpoint again, or check that config.json belongs to it"
        raise InputMissing(f"the weight files lack {_some(missing)}", where=where, fix=fix)
    return found


def _origin(
    there: tuple[str, ...],
    stored: dict[str, Stored],
    shape: tuple[int, ...],
    template: str,
    source: Source,
    spec: AnySpec,
    where: str,
) -> _Origin:
    """Return the origin of one tensor of `shape`, after checking the stored shape and dtype."""
    start = run = step = 0
    expected = shape[1:] if "{h}" in source.names[0] else shape
    if source.fused:
        sizes = {n.rsplit(".", 1)[1]: s[0] for n, s in spec.linears(0).items()}
        own = source.fused.index(template.rsplit(".", 1)[1])
        # "heads" lays out one head of each part in turn, so there a part's run is a head and the step all parts' heads
        runs = [sizes[part] if source.layout == "rows" else spec.head_dim for part in source.fused]
        start, run, step = sum(runs[:own]), runs[own], sum(runs)
        expected = (sum(sizes[part] for part in source.fused), *shape[1:])
    for name in there:
        info, file = stored[name].info, stored[name].file
        if (info.shape[0], prod(info.shape[1:])) != expected if source.flat else info.shape != expected:
            what = f"{name} has shape {info.shape} where config.json implies {expected}"
            raise InputCorrupt(what, where=f"{where}/{file}", fix="Check that config.json belongs to these weights")
        if info.dtype not in DTYPE_BYTES:
            what = f"{name} is stored as {info.dtype}"
            raise Unsupported(what, where=f"{where}/{file}", fix=f"Only {', '.join(DTYPE_BYTES)} weights are served")
    return _Origin(there, TensorInfo(stored[there[0]].info.dtype, shape), start, run, step, source.flat)


def _no_leftovers(
    arch: Architecture | EncoderArchitecture,
    spec: AnySpec,
    origins: dict[str, _Origin],
    stored: dict[str, Stored],
    where: str,
) -> None:
    """Raise Unsupported where the files hold tensors that the architecture does not account for."""
    used = {name for origin in origins.values() for name in origin.stored}
    if isinstance(arch, Architecture) and isinstance(spec, ModelSpec) and spec.tied_head:
        used |= set(_heads(arch))
    left = [name for name in stored if name not in used and not arch.skips(name)]
    if left:
        what = f"the weight files hold {_some(left)}, which {spec.family} as config.json describes it has no place for"
        raise Unsupported(what, where=where, fix="Check that config.json belongs to these weights")


def _template(name: str) -> tuple[int, str]:
    """Split a canonical module name into its layer and the name with `{i}`."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, rest = name.split(".", 2)
    return int(layer), "layers.{i}." + rest


def _spell(name: str, kind: str, heads: range | None) -> tuple[str, ...]:
    full = f"{name}.{kind}"
    return (full,) if heads is None else tuple(full.replace("{h}", str(h)) for h in heads)


def _role(name: str) -> Literal["embed", "attn", "mlp", "head"] | None:
    if name in ("embed_tokens", "embed_patches", "lm_head"):
        return "head" if name == "lm_head" else "embed"
    if name.endswith("_proj"):
        return "attn" if ".attn." in name else "mlp"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
        raise InputCorrupt(f"is not valid JSON ({error})", where=str(path), fix=_AGAIN) from None
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
