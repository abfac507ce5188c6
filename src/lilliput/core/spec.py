"""What a model is, as data: enough for any runner to build its graph without asking which family it came from.

`models/` makes a ModelSpec from a checkpoint's config; `artifact/` stores it in the manifest; the engine and the torch
decoder both follow it. Tensors have one set of canonical names, whatever the checkpoint called them:

    embed_tokens  embed_positions  final_norm  lm_head
    layers.N.attn_norm  layers.N.attn_post_norm  layers.N.mlp_norm  layers.N.mlp_post_norm
    layers.N.attn.{q,k,v,o}_proj  layers.N.attn.{q,k}_norm  layers.N.mlp.{gate,up,down}_proj

each with `.weight` and, where the checkpoint has one, `.bias`. Fused matrices (qkv, gate_up) are split on loading.
An encoder has the same names in its blocks; its ends are

    embed_tokens | embed_patches  embed_class  embed_positions  embed_types  embed_norm  final_norm  projection
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
EncoderActivation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
"""quick_gelu: x * sigmoid(1.702 x)."""
PADDING = -1
"""What stands behind the ids of a text that is shorter than its neighbours in a batch."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Norm(_Frozen):
    """y = (x - mean, if layer) / sqrt(var + eps) * (weight + offset) + bias, in float32."""

    kind: Literal["rms", "layer"]
    eps: float = Field(gt=0)
    offset: float = 0.0


class QKNorm(_Frozen):
    """Normalisation of each query and key head before the rotation; never with a bias.

    per_head False: weight is (head_dim,), shared by all heads (Qwen3). True: (heads, head_dim) (StableLM 2).
    """

    norm: Norm
    per_head: bool = False


class Rotary(_Frozen):
    """Rotary embedding of the first `dim` channels of each head, halves rotated against each other (not interleaved).

    angle[position, j] = position * inv_freq[j], j < dim / 2; cos and sin are multiplied by `scale`.
    """

    dim: int = Field(gt=0, multiple_of=2)
    inv_freq: tuple[float, ...]
    scale: float = 1.0


class ModelSpec(_Frozen):
    """A causal decoder. Sizes are counts of elements; `windows` and `context` are counts of tokens."""

    family: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    context: int = Field(gt=0)
    norm: Norm
    activation: Activation
    gated_mlp: bool = True
    """True: down(act(gate x) * up x). False: down(act(up x))."""
    rotary: Rotary | None = None
    position_offset: int | None = None
    """Row of `embed_positions` used for position 0; None where positions are rotary."""
    qk_norm: QKNorm | None = None
    parallel_block: bool = False
    """True: x + attn(attn_norm x) + mlp(mlp_norm x)."""
    shared_block_norm: bool = False
    """With parallel_block: the MLP reads attn_norm's output and there is no mlp_norm."""
    post_norms: bool = False
    """True: x + attn_post_norm(attn(..)), then x + mlp_post_norm(mlp(..)) (Gemma 2)."""
    attn_scale: float = Field(gt=0)
    """Factor on q.k before soft-capping."""
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    """Each cap c maps v to c * tanh(v / c)."""
    embed_scale: float = 1.0
    windows: tuple[int, ...]
    """One a layer: the query at i sees keys j <= i with i - j < window; 0 is no limit."""
    tied_head: bool = False
    """True: the head reuses embed_tokens and no lm_head.weight is stored."""

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Canonical names of one block's linear layers, in order of use, to their (out, in)."""
        q, kv, base = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, f"layers.{layer}"
        hidden, inter = self.hidden_size, self.intermediate_size
        attn = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_proj": (inter, hidden)} if self.gated_mlp else {}
        mlp |= {"up_proj": (inter, hidden), "down_proj": (hidden, inter)}
        return {f"{base}.attn.{k}": v for k, v in attn.items()} | {f"{base}.mlp.{k}": v for k, v in mlp.items()}

    @property
    def entrance(self) -> str:
        """The matrix that turns what comes in into hidden states."""
        return "embed_tokens"

    @property
    def causal(self) -> bool:
        """Always: a position sees itself and those before it."""
        return True

    @property
    def norm_first(self) -> bool:
        """Always: attn_norm and mlp_norm are read by the linear layers behind them and by nothing else."""
        return True

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Canonical names of all matrices a method may treat, in the order they are read, to their (out, in)."""
        ends = (self.vocab_size, self.hidden_size)
        blocks = {name: shape for i in range(self.num_layers) for name, shape in self.linears(i).items()}
        return {"embed_tokens": ends} | blocks | ({} if self.tied_head else {"lm_head": ends})


class TokenInputs(_Frozen):
    """Texts, as rows of token ids. types: rows of `embed_types`, of which row 0 is added to every token; 0 is no table."""

    vocab_size: int = Field(gt=0)
    types: int = Field(ge=0)


class PatchInputs(_Frozen):
    """Pictures of `image_size` x `image_size` pixels, cut into squares of `patch_size`.

    A picture's shorter side is brought to `resize` pixels by `resample`, the middle square cut out, its values divided
    by 255, `mean` taken away and the rest divided by `std`, one number a channel: red, green, blue. The columns of
    `embed_patches` go channel by channel, row by row. In front of the patches stands the vector `embed_class`.
    """

    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    resize: int = Field(gt=0)
    resample: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def columns(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch_size**2


class EncoderSpec(_Frozen):
    """What turns a text or a picture into one vector. Sizes are counts of elements, `context` of positions.

    norm_first True: x + attn(attn_norm x), then x + mlp(mlp_norm x). False: attn_post_norm(x + attn(x)), then
    mlp_post_norm(x + mlp(x)). The MLP is down(act(up x)). causal: a position sees itself and those before it; no
    position ever sees padding. pooling: "mean" over the positions, the "first" or the "last" one, after final_norm
    where there is one. projection: size of the vector after a last matrix without bias; None where there is no matrix.
    """

    kind: Literal["encoder"]
    family: str
    inputs: TokenInputs | PatchInputs
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    context: int = Field(gt=0)
    """Rows of `embed_positions`."""
    norm: Norm
    activation: EncoderActivation
    norm_first: bool
    causal: bool = False
    embed_norm: bool
    final_norm: bool
    pooling: Literal["mean", "first", "last"]
    projection: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide hidden_size {self.hidden_size}")
        inputs = self.inputs
        if isinstance(inputs, PatchInputs):
            if inputs.image_size % inputs.patch_size or inputs.resize < inputs.image_size:
                raise ValueError(f"{inputs.image_size} pixels cannot be cut into patches of {inputs.patch_size}")
            if self.context != inputs.patches + 1:
                raise ValueError(f"{self.context} positions for {inputs.patches} patches and a class vector")
        return self

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    @property
    def entrance(self) -> str:
        """The matrix that turns what comes in into hidden states."""
        return "embed_tokens" if isinstance(self.inputs, TokenInputs) else "embed_patches"

    @property
    def num_kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_heads

    @property
    def gated_mlp(self) -> bool:
        """There is no gate."""
        return False

    @property
    def shared_block_norm(self) -> bool:
        """Each half of a block has its norm."""
        return False

    @property
    def rotary(self) -> None:
        """Positions are learned."""
        return

    @property
    def qk_norm(self) -> None:
        """Queries and keys are taken as they are."""
        return

    @property
    def attn_scale(self) -> float:
        """Factor on q.k."""
        return float(self.head_dim**-0.5)

    @property
    def attn_softcap(self) -> None:
        """Scores are taken as they are."""
        return

    @property
    def windows(self) -> tuple[int, ...]:
        """No layer has one."""
        return (0,) * self.num_layers

    @property
    def parallel_block(self) -> bool:
        """The MLP comes after the attention."""
        return False

    @property
    def post_norms(self) -> bool:
        """No norm is behind a half and in front of the sum; those of norm_first False are behind the sum."""
        return False

    @property
    def embedding_size(self) -> int:
        """Numbers of the vector that comes out."""
        return self.projection or self.hidden_size

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """As `ModelSpec.linears`."""
        hidden, inter, base = self.hidden_size, self.intermediate_size, f"layers.{layer}"
        attn = {f"{base}.attn.{kind}_proj": (hidden, hidden) for kind in "qkvo"}
        return attn | {f"{base}.mlp.up_proj": (inter, hidden), f"{base}.mlp.down_proj": (hidden, inter)}

    def matrices(self) -> dict[str, tuple[int, int]]:
        """As `ModelSpec.matrices`."""
        if isinstance(self.inputs, TokenInputs):
            first = (self.inputs.vocab_size, self.hidden_size)
        else:
            first = (self.hidden_size, self.inputs.columns)
        blocks = {name: shape for i in range(self.num_layers) for name, shape in self.linears(i).items()}
        last = {} if self.projection is None else {"projection": (self.projection, self.hidden_size)}
        return {self.entrance: first} | blocks | last


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "encoder" if kind == "encoder" else "decoder"


AnySpec = Annotated[Annotated[ModelSpec, Tag("decoder")] | Annotated[EncoderSpec, Tag("encoder")], Discriminator(_kind)]
