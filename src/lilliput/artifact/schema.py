"""The manifest: what an artifact says about itself.

Compatibility: `schema_version` is MAJOR.MINOR. This reader reads every minor of its own major, and refuses a newer
major by name. A minor only adds optional fields that say more about the artifact; an older reader passes over them.
Whatever changes what the numbers mean goes under `spec`, `entries` or `floats`, where unknown fields are refused, or
raises the major. docs/artifact.md has the promise in full.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, StringConstraints, ValidationError, model_validator

from lilliput.artifact import strict_json
from lilliput.artifact.consistency import inconsistencies
from lilliput.artifact.entries import (
    TAGS,
    DataInfo,
    FileEntry,
    FileName,
    FloatEntry,
    Frozen,
    IntegerInfo,
    Ladder,
    LayerRecord,
    Quality,
    QuantEntry,
    ScheduleEntry,
    SourceInfo,
    TensorName,
)
from lilliput.core.errors import InputCorrupt, Unsupported
from lilliput.core.spec import AnySpec, EncoderSpec, PatchInputs

SCHEMA_VERSION = "1.6"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_FILE = "float.safetensors"
GRAPH_FILE = "integer.json"
CONSTANTS_FILE = "integer.safetensors"
MANIFEST_LIMIT = 64 << 20
"""Bytes of the largest manifest we read."""

_FIX = "Copy the artifact again from its source, or make it again"


def rung_file(bits: int) -> str:
    """File that holds what width `bits` adds to the next narrower one."""
    return f"bits-{bits}.safetensors"


class Manifest(Frozen):
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
    tools: dict[str, str] = Field(default_factory=dict)
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
    if any(entry.outliers for entry in entries.values()):
        return "1.6"
    if any(entry.grid_bits != 16 for entry in entries.values()):
        return "1.5"
    if any(entry.shared for entry in entries.values()):
        return "1.4"
    if schedule is not None or integer:
        return "1.3"
    if isinstance(spec, EncoderSpec):
        return "1.2"
    return "1.1" if any(entry.tables for entry in entries.values()) else "1.0"


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
    return [step for at, step in enumerate(loc) if at != tagged or step not in TAGS]
