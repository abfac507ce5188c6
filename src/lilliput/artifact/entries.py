"""What a manifest's parts say: tensors, files, where a model came from, what was measured of it, how its widths follow.

Compatibility is told in artifact/schema.py.
"""

import re
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
    model_validator,
)

from lilliput.numerics.packing import TABLE_BITS, fields_of, serving_width

OUTLIER_PARTS = ("counts", "columns", "values")
_LARGEST = 1 << 40
_fields_of = cache(fields_of)


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


class Frozen(BaseModel):
    """A part of a manifest: cannot be changed, and knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantEntry(Frozen):
    """How one linear layer is stored: (out, columns) codes of max(bits) bits, groups of `group_size` inputs.

    group_size -1 is one group a row. sym: the grids have no zeros. tables: widths whose levels stand in a table (1.1).
    shared: the grid of the narrowest width serves all, each with a ratio for every row (1.4). grid_bits: of a scale and
    of a zero; scales of 8 bits have a unit for every row, and there are several groups (1.5). outliers: numbers in
    half precision that every width adds (1.6).
    """

    out: Size
    columns: Size
    bits: Annotated[Ladder, Field(min_length=1)]
    group_size: int = Field(le=_LARGEST)
    sym: bool
    tables: Annotated[tuple[int, ...], Field(max_length=TABLE_BITS)] = ()
    shared: bool = False
    grid_bits: Literal[8, 16] = 16
    outliers: Annotated[int, Field(ge=0, le=_LARGEST)] = 0

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
        if 8 * self.outliers > self.out * self.columns or (self.outliers and self.columns >= 1 << 16):
            raise ValueError(f"{self.outliers} outliers do not fit ({self.out}, {self.columns})")
        return self

    def grids(self, width: int) -> tuple[str, ...]:
        """Kinds of tensors, besides fields, that one width of the ladder adds to the narrower ones."""
        own = ("scale",) if self.sym else ("scale", "zero")
        own = (*own, "unit") if self.grid_bits == 8 else own
        if self.shared:
            return (*(own if width == self.bits[0] else ()), "ratio")
        return (*own, "table") if width in self.tables else own

    def parts(self, width: int) -> tuple[str, ...]:
        """Tensors, besides fields, that are read at one width of the ladder, as "kind.width", and "outlier.part"."""
        widths = sorted({self.bits[0], width}) if self.shared else [width]
        kinds = [(kind, own) for own in widths for kind in self.grids(own)]
        beside = tuple(f"outlier.{part}" for part in OUTLIER_PARTS) if self.outliers else ()
        return (*(f"{kind}.{own}" for kind, own in kinds if own == width or kind != "ratio"), *beside)

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


class FloatEntry(Frozen):
    """One tensor that stayed in float."""

    dtype: Literal["F32", "F16", "BF16"]
    shape: Annotated[tuple[Size, ...], Field(max_length=8)]


class FileEntry(Frozen):
    """One file of the folder."""

    sha256: Sha256
    size: Count


class SourceInfo(Frozen):
    """The checkpoint the artifact was made from. sha256: over its config and weight files."""

    name: str
    sha256: Sha256
    architecture: str
    parameters: Count
    dtype: str
    size_bytes: Count


class DataFile(Frozen):
    """One text the data-aware methods read."""

    name: str
    sha256: Sha256


class DataInfo(Frozen):
    """Calibration data. sha256: over the tokens as they were batched; tokens: how many."""

    files: tuple[DataFile, ...]
    sha256: Sha256
    tokens: Count


class QualityEntry(Frozen):
    """What one width does on a held-out text, against the source model: means over `tokens` predicted tokens.

    kl: nats. top1_agreement: share of tokens. nll: of the artifact itself, nats.
    """

    bits: int = Field(ge=1, le=32)
    tokens: Count
    kl: Finite
    top1_agreement: Finite
    nll: Finite | None = None
    text: str


class EmbeddingQuality(Frozen):
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
TAGS = ("decoder", "encoder", "logits", "vectors")
"""What pydantic puts into the path of an error where a union was decided."""


class IntegerInfo(Frozen):
    """That the artifact has an integer graph, `integer.json` with `integer.safetensors`, see docs/integer.md (1.3).

    quality: what the graph itself does, not its weights with float activations; `bits` are those of the blocks. record:
    what the method that made it has to say.
    """

    quality: Quality | None = None
    record: dict[str, JsonValue] = {}


class LayerRecord(Frozen):
    """What a method did to one layer. Keys are widths; error: of the layer's output, relative; sqnr_db: of its weights."""

    name: str
    method: str
    error: dict[int, Finite] = {}
    sqnr_db: dict[int, Finite] = {}
    note: str = ""


class ScheduleEntry(Frozen):
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
