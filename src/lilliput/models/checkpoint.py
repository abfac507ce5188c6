"""A checkpoint read lazily by canonical name: shapes from the headers, one tensor at a time from the files.

Opening one reads the config and the headers only and needs no torch; `read` does. What is there is checked against what
the architecture needs when the checkpoint is opened, so a missing or misshapen tensor is found before any work is done.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing
from lilliput.core.spec import AnySpec, ModelSpec
from lilliput.models.architecture import Architecture, find_architecture
from lilliput.models.config import read_config, read_modules, read_pooling, read_preprocessor
from lilliput.models.encoder_architecture import Beside, EncoderArchitecture, encoder_architectures, find_encoder
from lilliput.models.origins import Origin, Stored, TensorInfo, heads_of, modules_of, no_leftovers, origins_of, some
from lilliput.models.source import AGAIN, inside, locate, pooling_file, weight_files
from lilliput.models.tokenizer_files import export_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that could be quantized: what it does, its (out, in), its dtype, whether it has a bias."""

    role: Literal["embed", "attn", "mlp", "head"]
    shape: tuple[int, int]
    dtype: str
    bias: bool


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
    _origins: dict[str, Origin] = field(repr=False, default_factory=dict)
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
        origins = origins_of(arch, spec, config, stored, str(folder))
        no_leftovers(arch, spec, origins, stored, str(folder))
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
            raise InputCorrupt(f"{origin.stored[0]} holds NaN or infinity", where=str(file), fix=AGAIN)
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
        for name, shape in modules_of(self.spec):
            role = _role(name)
            if role and len(shape) == 2:
                dtype = self.info(f"{name}.weight").dtype
                found[name] = Matrix(role, (shape[0], shape[1]), dtype, f"{name}.bias" in self._origins)
        return found

    def tokenizer_files(self) -> list[Path]:
        """Return those of tokenizer.json and its companions that are there."""
        return tokenizer_files(self.folder)

    def export_tokenizer(self, dest: Path) -> list[Path]:
        """Put tokenizer.json and its companions into the folder `dest`; return their paths there.

        See `tokenizer_files.export_tokenizer`, which also says what is raised.
        """
        return export_tokenizer(self.folder, self.config, dest)

    def _rows(self, name: str, origin: Origin) -> "Tensor":
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
            raise InputCorrupt(f"{name} cannot be read ({error})", where=str(path), fix=AGAIN) from None

    def _check_tie(self) -> None:
        """Raise InputCorrupt where the config ties the head and the file has a different one; compares three rows."""
        if not isinstance(self.spec, ModelSpec) or not self.spec.tied_head:
            return
        arch = find_architecture(self.config, where=str(self.folder))
        head = next((n for n in heads_of(arch) if n in self._stored), None)
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
        raise InputCorrupt(f"is not a whole safetensors file ({error})", where=str(path), fix=AGAIN) from None
    gone = sorted((wanted or set()) - set(names))
    if gone:
        raise InputMissing(f"lacks {some(gone)}, which the index places here", where=str(path), fix=AGAIN)
    return {name: Stored(path.name, info) for name, info in infos.items()}


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


def _role(name: str) -> Literal["embed", "attn", "mlp", "head"] | None:
    if name in ("embed_tokens", "embed_patches", "lm_head"):
        return "head" if name == "lm_head" else "embed"
    if name.endswith("_proj"):
        return "attn" if ".attn." in name else "mlp"
    return None
