"""Integer graphs: edges with fixed grids and the nodes between them. docs/integer.md defines the arithmetic.

A graph is data. Who runs it (the oracle, the C++ engine, an exporter) walks `nodes` in order and knows nothing of model
families; who makes it is `models`' business. Numbers too many for a description stand in named constants beside it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(_Frozen):
    """value = scale * (code - zero), code in -2**(bits - 1) .. 2**(bits - 1) - 1."""

    bits: Literal[8, 16]
    scale: float = Field(gt=0, allow_inf_nan=False)
    zero: int

    @model_validator(mode="after")
    def _holds_zero(self) -> "Grid":
        if not self.low <= self.zero <= self.high:
            raise ValueError(f"zero {self.zero} is no code of {self.bits} bits")
        return self

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1


class Edge(_Frozen):
    """A tensor of codes, (positions, width)."""

    width: int = Field(gt=0)
    grid: Grid


class Embed(_Frozen):
    """Rows of `matrix`, times `factor`, plus learned positions from row `offset` on where there are any, plus row 0 of
    `types` where there is one; then rounded."""

    op: Literal["embed"] = "embed"
    y: str
    matrix: str
    factor: float = 1.0
    positions: str | None = None
    offset: int = 0
    types: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Linear(_Frozen):
    """Constants: `NAME.bias` (out,) int64, `NAME.multiplier` (out,) int32, `NAME.shift` (out,) int8, NAME being `y`."""

    op: Literal["linear"] = "linear"
    x: str
    y: str
    matrix: str


class Norm(_Frozen):
    """Constants: `NAME.gain` int32 and, where there is one, `NAME.offset` int64, both (width,). heads: runs of channels."""

    op: Literal["norm"] = "norm"
    x: str
    y: str
    kind: Literal["rms", "layer"]
    heads: int = 1
    eps: int = Field(ge=0, le=1 << 61)
    shift: int = Field(ge=1, le=60)
    biased: bool = False


class Rotate(_Frozen):
    """Constants, shared by all nodes: `rotary.cos`, `rotary.sin`, (positions, dim / 2) int16."""

    op: Literal["rotate"] = "rotate"
    x: str
    y: str
    head_dim: int
    dim: int
    multiplier: int
    shift: int
    plain_multiplier: int
    """For the channels behind `dim`."""
    plain_shift: int


class Attend(_Frozen):
    """Constants: `NAME.hi`, `NAME.lo` (256,) int32; with a soft-cap `NAME.cap` (65536,) int16. NAME is `y`."""

    op: Literal["attend"] = "attend"
    q: str
    k: str
    v: str
    y: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    """0 is no limit."""
    causal: bool = True
    scores: Grid
    multiplier: int
    shift: int
    capped: Grid | None = None
    """Grid of the scores behind the soft-cap, which is then the one `hi` and `lo` belong to."""
    softcap: float | None = None
    scale: float
    """attn_scale: for exporters, the factor already has it."""
    probability: Literal[255, 65535] = 65535
    out_multiplier: int
    out_shift: int


class Table(_Frozen):
    """Constant: `NAME.table`, (2**bits of x,) int16. function: what it tabulates, for exporters."""

    op: Literal["table"] = "table"
    x: str
    y: str
    function: Literal["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"]


class Multiply(_Frozen):
    op: Literal["multiply"] = "multiply"
    a: str
    b: str
    y: str
    multiplier: int
    shift: int


class Sum(_Frozen):
    op: Literal["sum"] = "sum"
    x: tuple[str, ...] = Field(min_length=1)
    y: str
    multipliers: tuple[int, ...]
    shift: int


Node = Annotated[Embed | Linear | Norm | Rotate | Attend | Table | Multiply | Sum, Field(discriminator="op")]


class Graph(_Frozen):
    """nodes: in an order in which every edge is written, once, before it is read. positions: longest sequence."""

    edges: dict[str, Edge]
    nodes: tuple[Node, ...]
    output: str = "logits"
    logit_softcap: float | None = None
    positions: int = Field(gt=0)
