"""The manifest: what an artifact says about itself.

Compatibility: `schema_version` is MAJOR.MINOR. This reader reads every minor of its own major, and refuses a newer
major by name. A minor only adds optional fields that say more about the artifact; an older reader passes over them.
Whatever changes what the numbers mean goes under `spec`, `entries` or `floats`, where unknown fields are refused, or
raises the major. docs/artifact.md has the promise in full.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from lilliput.artifact import strict_json
from lilliput.core.errors import InputCorrupt, Unsupported
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec, PatchInputs
from lilliput.numerics.packing import TABLE_BITS, fields_of, serving_width

SCHEMA_VERSION = "1.5"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_FILE = "float.safetensors"
GRAPH_FILE = "integer.json"
CONSTANTS_FILE = "integer.safetensors"
MANIFEST_LIMIT = 64 << 20
"""Bytes of the largest manifest we read."""

_FIX = "Copy the artifact again from its source, or make it again"
_LARGEST = 1 << 40


def rung_file(bits: int) -> str:
    """File that holds what width `bits` adds to the next narrower one."""
    return f"bits-{bits}.safetensors"


def plain_name(name: str) -> str:
    """Return `name` if it can only mean a file of the folder itself. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}", name):
        raise ValueError(f"{name[:80]!r} is not a plain file name")
    return name


def _ladder(bits: tuple[int, ...]) -> tuple[int, ...]:
    if bits:
        fields_of(bits)  # raises ValueError for an unordered one
    return bits


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Size = Annotated[int, Field(gt=0, le=_LARGEST)]
FileName = Annotated[str, AfterValidator(plain_name)]
TensorName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=256)]
Ladder = Annotated[tuple[int, ...], Field(max_length=8), AfterValidator(_ladder)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantEntry(_Frozen):
    """How one linear layer is stored: (out, columns) codes of max(bits) bits, groups of `group_size` inputs.

    group_size -1 is one group a row. sym: the grids have no zeros. tables: widths whose levels stand in a table (1.1).
    shared: the grid of the narrowest width serves all, each with a ratio for every row (1.4). grid_bits: of a scale and
    of a zero; scales of 8 bits have a unit for every row, and there are several groups (1.5).
    """

    out: Size
    columns: Size
    bits: Annotated[Ladder, Field(min_length=1)]
    group_size: int = Field(le=_LARGEST)
    sym: bool
    tables: Annotated[tuple[int, ...], Field(max_length=TABLE_BITS)] = ()
    shared: bool = False
    grid_bits: Literal[8, 16] = 16

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} is neither -1 nor positive")
        if self.tables != tuple(b for b in self.bits if b in self.tables and b <= TABLE_BITS):
            raise ValueError(f"tables {list(self.tables)} are not widths of {list(self.bits)} up to {TABLE_BITS} bits")
        if self.shared and (self.tables or len(self.bits) == 1):
            raise ValueError("a shared grid is one of several widths, none of them with a table")
        if self.grid_bits == 8 and self.groups == 1:
            raise ValueError("a scale of 8 bits is one of several in its row")
        return self

    def grids(self, width: int) -> tuple[str, ...]:
        """Kinds of tensors, besides fields, that one width of the ladder adds to the narrower ones."""
        own = ("scale",) if self.sym else ("scale", "zero")
        own = (*own, "unit") if self.grid_bits == 8 else own
        if self.shared:
            return (*(own if width == self.bits[0] else ()), "ratio")
        return (*own, "table") if width in self.tables else own

    def parts(self, width: int) -> tuple[str, ...]:
        """Tensors, besides fields, that are read at one width of the ladder, as "kind.width"."""
        widths = sorted({self.bits[0], width}) if self.shared else [width]
        kinds = [(kind, own) for own in widths for kind in self.grids(own)]
        return tuple(f"{kind}.{own}" for kind, own in kinds if own == width or kind != "ratio")

    @property
    def groups(self) -> int:
        """Groups a row."""
        return 1 if self.group_size == -1 else -(-self.columns // self.group_size)

    @property
    def fields(self) -> tuple[int, ...]:
        """Widths of the packed fields, most significant first."""
        return _fields_of(self.bits)

    def width_at(self, bits: int) -> int:
        """Width this layer runs at when the artifact is asked for `bits`: its narrowest of at least that, else its widest."""
        return serving_width(self.bits, bits)

    def fields_at(self, bits: int) -> int:
        """How many leading fields `width_at(bits)` needs."""
        width, total = self.width_at(bits), 0
        for count, field in enumerate(self.fields, 1):
            total += field
            if total == width:
                return count
        raise AssertionError("every width of a ladder ends at a field")


class FloatEntry(_Frozen):
    """One tensor that stayed in float."""

    dtype: Literal["F32", "F16", "BF16"]
    shape: Annotated[tuple[Size, ...], Field(max_length=8)]


class FileEntry(_Frozen):
    """One file of the folder."""

    sha256: Sha256
    size: Count


class SourceInfo(_Frozen):
    """The checkpoint the artifact was made from. sha256: over its config and weight files."""

    name: str
    sha256: Sha256
    architecture: str
    parameters: Count
    dtype: str
    size_bytes: Count


class DataFile(_Frozen):
    """One text the data-aware methods read."""

    name: str
    sha256: Sha256


class DataInfo(_Frozen):
    """Calibration data. sha256: over the tokens as they were batched; tokens: how many."""

    files: tuple[DataFile, ...]
    sha256: Sha256
    tokens: Count


class QualityEntry(_Frozen):
    """What one width does on a held-out text, against the source model: means over `tokens` predicted tokens.

    kl: nats. top1_agreement: share of tokens. nll: of the artifact itself, nats.
    """

    bits: int = Field(ge=1, le=32)
    tokens: Count
    kl: Finite
    top1_agreement: Finite
    nll: Finite | None = None
    text: str


class EmbeddingQuality(_Frozen):
    """What one width of an encoder does to `inputs` texts or pictures, against the source model (1.2).

    cosine, cosine_min: mean and least cosine between the two embeddings. error: ||e - e_source|| / ||e_source||, the
    mean, which unlike a cosine sees a wrong scale. inputs_are: in words.
    """

    bits: int = Field(ge=1, le=32)
    inputs: Count
    cosine: Finite
    cosine_min: Finite
    error: Finite
    inputs_are: str


def _measured(value: Any) -> str:
    told = value if isinstance(value, dict) else getattr(value, "__dict__", ())
    return "vectors" if "cosine" in told else "logits"


Quality = Annotated[
    Annotated[QualityEntry, Tag("logits")] | Annotated[EmbeddingQuality, Tag("vectors")], Discriminator(_measured)
]
_TAGS = ("decoder", "encoder", "logits", "vectors")
"""What pydantic puts into the path of an error where a union was decided."""


class IntegerInfo(_Frozen):
    """That the artifact has an integer graph, `integer.json` with `integer.safetensors`, see docs/integer.md (1.3).

    quality: what the graph itself does, not its weights with float activations; `bits` are those of the blocks. record:
    what the method that made it has to say.
    """

    quality: Quality | None = None
    record: dict[str, JsonValue] = {}


class LayerRecord(_Frozen):
    """What a method did to one layer. Keys are widths; error: of the layer's output, relative; sqnr_db: of its weights."""

    name: str
    method: str
    error: dict[int, Finite] = {}
    sqnr_db: dict[int, Finite] = {}
    note: str = ""


class ScheduleEntry(_Frozen):
    """How widths follow each other in an answer, unless the caller says otherwise (1.3).

    name: of a registered schedule. prefill_bits: reads the prompt. ladder: widths it decodes at, falling. steps: (from
    decode forward, bits) where they are known beforehand. options: its other settings. horizon: tokens of the answers it
    was made for. file: what it learned, beside the other files; model: `fingerprint` of the artifact it learned that
    from. note: on what it was made.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]
    prefill_bits: int = Field(ge=1, le=8)
    ladder: Annotated[tuple[int, ...], Field(min_length=1, max_length=8)]
    steps: Annotated[tuple[tuple[Count, int], ...], Field(max_length=4096)] = ()
    options: dict[str, JsonValue] = {}
    horizon: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    file: FileName | None = None
    model: Sha256 | None = None
    note: Annotated[str, StringConstraints(max_length=1000)] = ""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if any(a <= b for a, b in pairwise(self.ladder)):
            raise ValueError(f"the ladder {list(self.ladder)} does not fall")
        starts = [start for start, _ in self.steps]
        if starts and (starts[0] != 0 or any(b <= a for a, b in pairwise(starts))):
            raise ValueError(f"the steps {starts} do not ascend from 0")
        if not {bits for _, bits in self.steps} <= set(self.ladder):
            raise ValueError(f"the steps have a width that is not in the ladder {list(self.ladder)}")
        if self.file is not None and (self.model is None or self.horizon is None):
            raise ValueError("what it learned lacks the model or the horizon it was learned for")
        return self

    @property
    def prefill(self) -> int | None:
        """Width that reads the prompt, where it is not the ladder's first."""
        return None if self.prefill_bits == self.ladder[0] else self.prefill_bits


class Manifest(_Frozen):
    """Everything an artifact says about itself. Holds no time of day: the same run twice gives the same bytes."""

    schema_version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = SCHEMA_VERSION
    lilliput_version: str
    bits: Ladder
    """Widths the artifact serves; empty when nothing is quantized."""
    spec: AnySpec
    source: SourceInfo
    recipe: JsonValue
    """The stages as run."""
    seed: int
    data: DataInfo | None = None
    tools: dict[str, str] = {}
    """Versions of what computed the numbers."""
    quality: tuple[Quality, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    schedule: ScheduleEntry | None = None
    entries: dict[TensorName, QuantEntry]
    """Quantized matrices by module, "layers.0.attn.q_proj", "embed_tokens", "lm_head"."""
    floats: dict[TensorName, FloatEntry]
    """Float tensors by full name, "layers.0.attn_norm.weight"."""
    files: dict[FileName, FileEntry]
    """Every other file of the folder."""
    integer: IntegerInfo | None = None
    """There when the artifact has an integer graph."""
    manifest_sha256: str = ""
    """SHA-256 of this file with this field empty."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for problem in inconsistencies(self.spec, self.entries, self.floats, self.bits):
            raise ValueError(problem)
        absent = {FLOAT_FILE, INDEX_FILE, *map(rung_file, self.bits)} - self.files.keys()
        if self.integer is not None:
            absent |= {GRAPH_FILE, CONSTANTS_FILE} - self.files.keys()
            pictures = isinstance(self.spec, EncoderSpec) and isinstance(self.spec.inputs, PatchInputs)
            if pictures or not self.entries:
                raise ValueError("an integer graph belongs to a quantized model of texts")
        if absent or MANIFEST_FILE in self.files:
            raise ValueError(f"`files` lacks {', '.join(sorted(absent))}" if absent else "`files` lists the manifest")
        if self.schedule is not None:
            unknown = {self.schedule.prefill_bits, *self.schedule.ladder} - set(self.bits)
            if unknown:
                raise ValueError(f"the schedule has a width of {min(unknown)} bits, which is not in {list(self.bits)}")
            if self.schedule.file is not None and self.schedule.file not in self.files:
                raise ValueError(f"`files` lacks {self.schedule.file}, which the schedule names")
        return self


def inconsistencies(
    spec: AnySpec, entries: Mapping[str, QuantEntry], floats: Mapping[str, FloatEntry], bits: tuple[int, ...]
) -> Iterator[str]:
    """Yield what keeps these tensors from being the model that `spec` describes, one line each."""
    if isinstance(spec, EncoderSpec):
        if spec.num_layers > len(entries) + len(floats):  # first, as below
            yield f"spec has {spec.num_layers} layers but there are {len(entries) + len(floats)} tensors"
            return
    else:
        if len(spec.windows) != spec.num_layers:  # first: it bounds the loops below by the size of the manifest
            yield f"spec has {spec.num_layers} layers but {len(spec.windows)} windows"
            return
        if spec.rotary is not None and len(spec.rotary.inv_freq) != spec.rotary.dim // 2:
            yield f"spec.rotary has {len(spec.rotary.inv_freq)} frequencies for {spec.rotary.dim} channels"
    if bool(entries) != bool(bits):
        yield f"the widths are {list(bits)} but {len(entries)} matrices are quantized"
    matrices = spec.matrices()
    for name, shape in matrices.items():
        entry, left = entries.get(name), floats.get(f"{name}.weight")
        if (entry is None) == (left is None):
            yield f"{name} is stored {'twice' if entry else 'neither quantized nor in float'}"
            return
        found = (entry.out, entry.columns) if entry else left.shape if left else ()
        if found != shape:
            yield f"{name} is {found} but the spec says {shape}"
    for name in entries.keys() - matrices.keys():
        yield f"{name} is quantized but the spec has no such matrix"
    if isinstance(spec, ModelSpec) and spec.tied_head and "lm_head.weight" in floats:
        yield "lm_head.weight is stored although the head is tied"
    for name, entry in entries.items():
        unused = _unused(entry.bits, bits)
        if bits and unused:
            yield f"{name} has the width {unused[0]}, which no width of {list(bits)} uses"
    misshapen = _misshapen(spec, floats, matrices) if isinstance(spec, ModelSpec) else _unlike(spec, floats, matrices)
    yield from misshapen


def fingerprint(manifest: Manifest) -> str:
    """Return the SHA-256 over the digests of the tensor files: which model at which widths, whatever it is called."""
    names = (FLOAT_FILE, *map(rung_file, manifest.bits))
    return hashlib.sha256("".join(f"{name} {manifest.files[name].sha256}\n" for name in names).encode()).hexdigest()


def schedule_misfit(manifest: Manifest, said: Mapping[str, str]) -> str | None:
    """Say for what else than this artifact its learned schedule was learned, None where it was for this.

    said: metadata of the file of what was learned, empty without one.
    """
    entry = manifest.schedule
    if entry is None or entry.model is None:
        return None
    if {entry.model, said.get("model", entry.model)} != {fingerprint(manifest)}:
        return f"{entry.name} was learned from another model than this"
    if said.get("horizon", str(entry.horizon)) != str(entry.horizon):
        return f"{entry.name} was learned for answers of {said['horizon'][:20]} tokens, not of {entry.horizon}"
    return None


def version_of(
    spec: AnySpec,
    entries: Mapping[str, QuantEntry],
    *,
    schedule: ScheduleEntry | None = None,
    integer: bool = False,
) -> str:
    """Return the oldest schema version that has all these say; `integer`: with a graph."""
    if any(entry.grid_bits != 16 for entry in entries.values()):
        return "1.5"
    if any(entry.shared for entry in entries.values()):
        return "1.4"
    if schedule is not None or integer:
        return "1.3"
    if isinstance(spec, EncoderSpec):
        return "1.2"
    return "1.1" if any(entry.tables for entry in entries.values()) else "1.0"


_fields_of = cache(fields_of)


@cache
def _unused(own: tuple[int, ...], bits: tuple[int, ...]) -> list[int]:
    return sorted(set(own) - {next((width for width in own if width >= b), own[-1]) for b in bits})


def _misshapen(
    spec: ModelSpec, floats: Mapping[str, FloatEntry], matrices: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    per_head = spec.qk_norm is not None and spec.qk_norm.per_head
    heads = {"q_norm": spec.num_heads, "k_norm": spec.num_kv_heads}
    for name, entry in floats.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        expected: tuple[int, ...] | None = None
        if kind == "bias" and module in matrices:
            expected = matrices[module][:1]
        elif last in heads:
            expected = (heads[last], spec.head_dim) if per_head else (spec.head_dim,)
        elif last.endswith("_norm"):
            expected = (spec.hidden_size,)
        elif name == "embed_positions.weight":
            rows = spec.context + (spec.position_offset or 0)
            if len(entry.shape) != 2 or entry.shape[0] < rows or entry.shape[1] != spec.hidden_size:
                yield f"{name} is {entry.shape} but the spec needs at least {(rows, spec.hidden_size)}"
        if expected is not None and entry.shape != expected:
            yield f"{name} is {entry.shape} but the spec says {expected}"


def _unlike(
    spec: EncoderSpec, floats: Mapping[str, FloatEntry], matrices: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Yield what an encoder's float tensors lack, have too much of, or have in another shape."""
    hidden = (spec.hidden_size,)
    wanted: dict[str, tuple[int, ...]] = {"embed_positions.weight": (spec.context, spec.hidden_size)}
    if isinstance(spec.inputs, PatchInputs):
        wanted["embed_class.weight"] = hidden
    elif spec.inputs.types:
        wanted["embed_types.weight"] = (spec.inputs.types, spec.hidden_size)
    own = ("attn_norm", "mlp_norm") if spec.norm_first else ("attn_post_norm", "mlp_post_norm")
    norms = [f"layers.{layer}.{norm}" for layer in range(spec.num_layers) for norm in own]
    norms += ["embed_norm"] * spec.embed_norm + ["final_norm"] * spec.final_norm
    wanted |= {f"{norm}.weight": hidden for norm in norms}
    optional: dict[str, tuple[int, ...]] = {f"{norm}.bias": hidden for norm in norms}
    optional |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    optional |= {f"{name}.weight": shape for name, shape in matrices.items()}
    for name in wanted.keys() - floats.keys():
        yield f"{name} is not stored"
    for name, entry in floats.items():
        shape = wanted.get(name) or optional.get(name)
        if shape is None:
            yield f"{name} is stored but the spec has no such tensor"
        elif entry.shape != shape:
            yield f"{name} is {entry.shape} but the spec says {shape}"


def seal(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json, digest filled in."""
    data = manifest.model_dump(mode="json")
    for field in ("spec", "entries", "floats"):  # an older reader refuses what it does not know here, so say no more
        data |= manifest.model_dump(mode="json", include={field}, exclude_defaults=True)  # than there is to say
    if manifest.schedule is None:
        del data["schedule"]
    if manifest.integer is None:
        del data["integer"]
    return _sealed(data, MANIFEST_FILE)


def _sealed(data: dict[str, Any], where: str) -> bytes:
    data["manifest_sha256"] = ""
    raw = strict_json.canonical(data, where, _FIX)
    # no other key stands two spaces from the margin, and no string holds a line break
    blank = b'\n  "manifest_sha256": "'
    return raw.replace(blank, blank + hashlib.sha256(raw).hexdigest().encode(), 1)


def load_manifest(raw: bytes, where: str) -> Manifest:
    """Return the manifest in `raw`, after checking its version, its digest and that it agrees with itself.

    Raises Unsupported for another major version or for meaning we do not know, InputCorrupt for anything else.
    """
    data = strict_json.parse(raw, where, _FIX)
    version = data.get("schema_version")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        raise InputCorrupt("there is no schema_version, so this is not a Lilliput manifest", where, _FIX)
    major, minor = map(int, version.split("."))
    own_major, own_minor = map(int, SCHEMA_VERSION.split("."))
    if major != own_major:
        fix = "Update lilliput" if major > own_major else "Read it with an older lilliput, or make the artifact again"
        raise Unsupported(f"schema {version}, and this lilliput reads {own_major}.x", where, fix)
    if _sealed(dict(data), where) != raw:
        raise InputCorrupt("the manifest does not match its own digest", where, _FIX)
    newer = minor > own_minor
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        problem = error
    if newer:
        try:
            return Manifest.model_validate(_known(data, problem))
        except ValidationError as error:
            what = f"schema {version} says {_first(error)}"
            raise Unsupported(what, where, f"Update lilliput, this one knows {SCHEMA_VERSION}") from None
    raise InputCorrupt(_first(problem), where, _FIX)


def _known(data: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Copy of `data` without the unknown fields that a newer minor may add."""
    for problem in error.errors():
        path = _path(problem["loc"])
        if problem["type"] == "extra_forbidden" and path[0] not in ("spec", "entries", "floats"):
            parent: Any = data
            for step in path[:-1]:
                parent = parent[step]
            del parent[path[-1]]
    return data


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(str(step)[:80] for step in _path(problem['loc'])) or 'manifest'}: {problem['msg'].removeprefix('Value error, ')}"


def _path(loc: tuple[int | str, ...]) -> list[int | str]:
    tagged = {"spec": 1, "quality": 2}.get(str(loc[0])) if loc else None
    return [step for at, step in enumerate(loc) if at != tagged or step not in _TAGS]
