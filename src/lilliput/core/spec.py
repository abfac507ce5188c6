"""What a decoder is, as data: enough for any runner to build its graph without asking which family it came from.

`models/` makes a ModelSpec from a checkpoint's config; `artifact/` stores it in the manifest; the engine and the torch
decoder both follow it. Tensors have one set of canonical names, whatever the checkpoint called them:

    embed_tokens  embed_positions  final_norm  lm_head
    layers.N.attn_norm  layers.N.attn_post_norm  layers.N.mlp_norm  layers.N.mlp_post_norm
    layers.N.attn.{q,k,v,o}_proj  layers.N.attn.{q,k}_norm  layers.N.mlp.{gate,up,down}_proj

each with `.weight` and, where the checkpoint has one, `.bias`. Fused matrices (qkv, gate_up) are split on loading.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
