"""The contracts methods meet, and how a recipe's options become one.

A LayerMethod answers one question: given a weight and a statistic of its inputs, what should stand there instead? It
sees tensors, never a model; a Quantizer answers with codes. A BlockMethod changes one block in place before its layers
are solved; a BlockQuantizer solves all layers of a block together. A ModelMethod is given the whole model and batches
of tokens; a Tuner the whole model after its layers have codes. All are frozen configurations with one verb; all that
must survive is in what they return.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods import METHODS
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import MOST_COLUMNS
from lilliput.numerics.statistics import Accumulator, Gram, InputNorm

if TYPE_CHECKING:
    from pathlib import Path

    from lilliput.core.graph import Grid
    from lilliput.core.progress import Progress
    from lilliput.core.recipe import Stage
    from lilliput.core.spec import ModelSpec
    from lilliput.data.streams import Batches
    from lilliput.methods.journal import Activations
    from lilliput.models.decoder import Block, Decoder
    from lilliput.models.encoder import Encoder
    from lilliput.models.origins import TensorInfo


ENDS = ("embed_tokens", "embed_patches", "lm_head")
"""The matrices that are no block's."""
MOST_OUTLIERS = 0.1
"""Of the weights: at 32 bits each, as many cost more than a code of 3 bits does."""


class Statistic(Enum):
    """What a LayerMethod wants to know of a layer's inputs over the calibration tokens."""

    NONE = "none"
    """Nothing: `solve` gets None and no calibration text is needed."""
    INPUT_NORM = "input_norm"
    """(in,) float32, L2 norm of every input feature."""
    GRAM = "gram"
    """(in, in) float32, the sum of x x^T."""
    FISHER = "fisher"
    """(out, in) float32, for every weight the sum over rows of text of its squared gradient; see `fisher.py`."""

    @property
    def streamed(self) -> bool:
        """Whether it is gathered from a layer's inputs as they pass; what is not comes from the whole model, before."""
        return self in (Statistic.INPUT_NORM, Statistic.GRAM)

    def accumulator(self, columns: int) -> Accumulator:
        """Return a fresh accumulator for a layer with that many inputs; only for what is `streamed`."""
        makers: dict[Statistic, Callable[[int], Accumulator]] = {
            Statistic.INPUT_NORM: InputNorm,
            Statistic.GRAM: Gram,
        }
        return makers[self](columns)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all kinds share: a name, and options that survive JSON."""

    @property
    def name(self) -> str:
        """The name it is registered under, which is that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def reads_text(self) -> bool:
        """Whether it needs calibration text."""
        return True

    def held_bytes(self, *, weights: int, grids: int, row: int, rows: int) -> int:
        """Memory that training takes beside the block or model it is given and its codes; 0 where nothing is trained.

        weights: numbers in the matrices treated together, of a block or of the model. grids: their scales and zeros of
        all widths. row: bytes of a calibration row on its way through, with what its gradient needs. rows: at a time.
        """
        return 0

    def options(self) -> dict[str, Any]:
        """The configuration as plain data, tuples as lists: `build(name, options)` gives an equal method."""
        return {key: _plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method, ABC):
    """One weight at a time. `exclude` holds patterns of layer names to leave alone, such as "layers.0.*"."""

    needs: ClassVar[Statistic] = Statistic.NONE
    rows_alone: ClassVar[bool] = True
    """True when the answer for a row does not depend on other rows, so a tall matrix may be solved in slices."""
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    """Treat the embedding of tokens (and with it a tied head) or of patches as well."""
    head: bool = False
    """Treat an untied output head as well."""

    @property
    def reads_text(self) -> bool:
        """Whether it needs calibration text: only for a statistic."""
        return self.needs is not Statistic.NONE

    def covers(self, name: str) -> bool:
        """Whether this method is for the layer of that canonical name."""
        ends = {"embed_tokens": self.embeddings, "embed_patches": self.embeddings, "lm_head": self.head}
        wanted = ends.get(name, name.startswith("layers."))
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def at(self, name: str) -> Self:
        """The configuration for the layer of that name: this one, or a variation of it."""
        return self

    def check(self, name: str, out: int, columns: int) -> None:
        """Raise ConfigError when this method cannot serve a layer of that shape; called before any work starts."""

    @abstractmethod
    def solve(self, weight: Tensor, stat: Tensor | None) -> Tensor | Quantized:
        """Return what should stand in the weight's place.

        weight: (out, in) float32, finite; left as it was. stat: what `needs` names, None for Statistic.NONE and, where
        it is streamed, for the embedding, which has no inputs. Returns (out, in) in the weight's dtype, or codes.
        """


@dataclass(frozen=True, kw_only=True)
class Quantizer(LayerMethod):
    """A LayerMethod whose answer is codes. What it stores is known before it runs, so the artifact can be laid out.

    bits: widths the result serves, ascending within 2..8. group_size: inputs that share a scale, -1 for a whole row.
    sym: no zero point. shared: one scale and zero a group for all widths, and a ratio a row for each, in place of a
    scale and zero for each; nothing where there is one width. ragged: let the last group of a row be shorter;
    without it a group size that does not divide is refused. end_bits: the widths of the embedding and the head,
    which lose more than the blocks do; empty for the same as `bits`. layer_bits: ladders of single layers by a
    pattern of their name, the first that matches counts; the artifact still serves `bits`, each layer at its
    narrowest width of at least that, or else its widest. outliers: the share of a block's weights, those that cost the
    narrowest width most, that keep in half precision what their codes do not reach; see `methods/outliers.py`.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 64
    sym: bool = False
    shared: bool = False
    ragged: bool = False
    end_bits: tuple[int, ...] = ()
    layer_bits: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    outliers: float = 0.0
    embeddings: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        own = ((f"layer_bits.{pattern}", ladder) for pattern, ladder in self.layer_bits.items())
        for key, ladder in (("bits", self.bits), ("end_bits", self.end_bits or self.bits), *own):
            if not ladder or list(ladder) != sorted(set(ladder)) or not 2 <= ladder[0] <= ladder[-1] <= 8:
                what = f"{key} is {list(ladder)}, not an ascending list within 2..8"
                raise ConfigError(what, where=f"{self.name}.{key}", fix="Give widths such as [4] or [2, 3, 4, 8]")
        if self.shared and self.tables:
            what = "shared with tables of levels, which have grids of their own at every width"
            raise ConfigError(what, where=f"{self.name}.shared", fix="Leave one of the two out")
        if not 0 <= self.outliers <= MOST_OUTLIERS:
            what, fix = f"outliers is {self.outliers}", f"Give a share from 0 to {MOST_OUTLIERS}, such as 0.005"
            raise ConfigError(what, where=f"{self.name}.outliers", fix=fix)
        if self.group_size != -1 and (self.group_size < 4 or self.group_size % 4):
            what = f"group_size is {self.group_size}"
            fix = "Give -1 for whole rows, or 32, 64 or 128 (any multiple of 4 works, those are fast)"
            raise ConfigError(what, where=f"{self.name}.group_size", fix=fix)

    @property
    def tables(self) -> tuple[int, ...]:
        """Widths of `bits`, up to 4, for which the answer has a table of levels; see `numerics/codebooks.py`."""
        return ()

    def ladder(self, name: str) -> tuple[int, ...]:
        """The widths of the layer of that name: the ends, and layers named, may have their own."""
        at_end = self.end_bits if name in ENDS else ()
        own = next((ladder for pattern, ladder in self.layer_bits.items() if fnmatchcase(name, pattern)), at_end)
        return own or self.bits

    def at(self, name: str) -> Self:
        """The configuration for the layer of that name, with its `ladder`; the ends have no outliers."""
        outliers = 0.0 if name in ENDS else self.outliers
        return replace(self, bits=self.ladder(name), end_bits=(), layer_bits={}, outliers=outliers)

    def kept(self, out: int, columns: int) -> int:
        """How many outliers a matrix of that shape has."""
        return round(self.outliers * out * columns)

    def check(self, name: str, out: int, columns: int) -> None:
        """Refuse a group size that does not divide the inputs, unless the last group may be shorter, and outliers in rows
        whose columns they cannot name.
        """
        if self.outliers and columns > MOST_COLUMNS:
            what, fix = (
                f"{columns} columns are more than outliers can name",
                f"Exclude it, or use at most {MOST_COLUMNS}",
            )
            raise ConfigError(what, where=name, fix=fix)
        if self.group_size != -1 and columns % self.group_size and not self.ragged:
            smaller = [str(g) for g in (128, 64, 32, 16) if g < self.group_size and columns % g == 0]
            use = f"Use group_size {' or '.join(smaller)}" if smaller else "Use group_size -1"
            fix = f"{use}, set ragged: true for a shorter last group, or exclude this layer"
            raise ConfigError(f"group_size {self.group_size} does not divide {columns} columns", where=name, fix=fix)

    @abstractmethod
    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Return the codes and grids that should stand in the weight's place; see `LayerMethod.solve`."""


@dataclass(frozen=True)
class BlockData:
    """The calibration text at one block: what comes in, and what the original puts out.

    inputs: (samples, length, hidden) float32 on disk, made by the compressed blocks before this one. targets: the same
    shape, what this block puts out in the original model, fed by original blocks; None unless a method of the run says
    `original`. batch: rows run at a time.
    """

    inputs: "Activations"
    targets: "Activations | None"
    batch: int


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method, ABC):
    """Changes a block so that its layers lose less when they are quantized after it."""

    original: ClassVar[bool] = False
    """True when `BlockData.targets` is wanted, which costs a second pass over the calibration text."""
    exclude: tuple[str, ...] = ()

    @abstractmethod
    def apply(self, block: "Block", data: BlockData, after: Mapping[str, Quantizer]) -> str:
        """Change `block` in place, its output in float staying what it was; return a note for the record, or "".

        block: float32, the caller's to change. after: the Quantizer that each layer will meet, by canonical name.
        """


@dataclass(frozen=True, kw_only=True)
class BlockQuantizer(Quantizer, ABC):
    """A Quantizer that solves the layers of a block together; `solve` is for the embedding and the head."""

    original: ClassVar[bool] = False
    """As in BlockMethod."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers:
            what, fix = f"{self.name} keeps no outliers", "Leave the option out, or use gptq"
            raise ConfigError(what, where=f"{self.name}.outliers", fix=fix)

    @property
    def reads_text(self) -> bool:
        """Always: what comes into a block is what it solves for."""
        return True

    @abstractmethod
    def solve_block(self, block: "Block", names: Sequence[str], data: BlockData) -> tuple[dict[str, Quantized], str]:
        """Return codes for the layers named, and a note for the record or "".

        May change the block's other tensors, such as norms, in place; and the layers' weights, to what the codes mean.
        """


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method, ABC):
    """The whole model at once."""

    def respec(
        self, spec: "ModelSpec", tensors: "Mapping[str, TensorInfo]"
    ) -> "tuple[ModelSpec, Mapping[str, TensorInfo]]":
        """What `apply` will make of a model so described: its description, and every tensor by canonical name.

        Called before any work starts, so it is also where a model is refused.
        """
        return spec, tensors

    @abstractmethod
    def apply(self, model: "Decoder", batches: "Batches | None") -> "Decoder":
        """Return the changed model, as `respec` announced it.

        model: float32, the method's own to change. batches: (batch, length) int32 token arrays, may be iterated again; None only for a method that reads no text.
        """


@dataclass(frozen=True, kw_only=True)
class Tuner(Method, ABC):
    """Improves the codes and grids of a whole model after its layers are quantized; the last stage of a recipe."""

    exclude: tuple[str, ...] = ()

    @abstractmethod
    def tune(
        self,
        original: "Decoder",
        student: "Decoder",
        coded: Mapping[str, Quantized],
        batches: "Batches",
        folder: "Path",
        progress: "Progress",
        served: Sequence[int],
    ) -> dict[str, Quantized]:
        """Return what should stand in the place of `coded`, with the same widths and group sizes.

        original: the float model, left as it was. student: a decoder with the float tensors the artifact will hold,
        the method's own to change. coded: every quantized matrix by canonical name, "embed_tokens" among them.
        batches: (batch, length) int32 token arrays. folder: where progress may be kept so that a killed run goes on.
        served: widths that the artifact serves, ascending; each layer at its own `Quantized.serving` of them.
        """


@dataclass(frozen=True)
class Integers:
    """A model of whole numbers, ready to be lowered (`models.lowering`).

    model: the model in float: norms and biases as the method left them, every matrix as it was before it was rounded.
    codes: every matrix of the spec by canonical name, one width of 4 or 8 bits, one group a row, zeros that
    are codes or, where a row is symmetric, 0.5.
    grids: one for every edge of `models.sites.sites`. record: plain data on how it went, for the manifest.
    """

    model: "Decoder | Encoder"
    codes: Mapping[str, Quantized]
    grids: "Mapping[str, Grid]"
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class IntegerMethod(Method, ABC):
    """Makes an integer model of a whole decoder, or encoder of texts.

    The last stage of a recipe, and the only one that makes codes.

    bits: of the codes of the blocks' matrices, 4 or 8. end_bits: of the embedding and the head.
    """

    bits: int = 8
    end_bits: int = 8

    def __post_init__(self) -> None:
        for key in ("bits", "end_bits"):
            if getattr(self, key) not in (4, 8):
                what = f"{key} is {getattr(self, key)}"
                raise ConfigError(what, where=f"{self.name}.{key}", fix="Give 4 or 8")

    def width(self, name: str) -> int:
        """Bits of the codes of the matrix of that canonical name."""
        return self.end_bits if name in ENDS else self.bits

    @abstractmethod
    def make(self, model: "Decoder | Encoder", batches: "Batches", folder: "Path", progress: "Progress") -> Integers:
        """Return the integer model, with codes of `width` bits for every matrix.

        model: float32, the method's own to change. batches: (batch, length) int32 token arrays, for an encoder with
        PADDING behind the shorter texts. folder: where progress may be kept so that a killed run goes on.
        """


def build(name: str, options: Mapping[str, Any]) -> Method:
    """Return the method of that name with those options.

    Raises UnknownName for a name nobody registered, ConfigError for an option the method does not have.
    """
    cls = METHODS.load(name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"{METHODS[name]} is not a method", where=name, fix="Correct the plug-in that registers it")
    known, hints = [f.name for f in fields(cls)], get_type_hints(cls)
    given = {}
    for key, value in options.items():
        if key not in known:
            fix = f"It has {', '.join(known)}"
            raise ConfigError(f"there is no option {key!r}", where=name, fix=fix)
        try:
            reader = TypeAdapter(hints[key], config=ConfigDict(strict=True))
            given[key] = reader.validate_python(_frozen(value))
        except ValidationError as error:
            what = f"{key} is {value!r}: {error.errors()[0]['msg'][0].lower()}{error.errors()[0]['msg'][1:]}"
            fix = (
                f"Write it as in {key}: {getattr(cls, key, {})!r}".replace("(", "[")
                .replace(",)", "]")
                .replace(")", "]")
            )
            raise ConfigError(what, where=name, fix=fix) from None
    return cls(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(value) if isinstance(value, list) else value


def build_stage(stage: "Stage") -> Method:
    """Return the method one stage of a recipe asks for. Raises as `build` does."""
    return build(stage.method, stage.options)
