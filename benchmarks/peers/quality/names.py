"""One matrix, three names: Hugging Face's for a Llama, which all weights are handed over by, ours, and a GGUF's."""

import re

HF_OF_OURS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
GGUF_OF_HF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def hf_of_ours(name: str) -> str:
    """Hugging Face's name of one of our tensors or modules: `layers.0.attn.q_proj.weight`, `final_norm.weight`."""
    if name.startswith("final_norm"):
        return name.replace("final_norm", "model.norm", 1)
    if not (match := re.match(r"layers\.(\d+)\.(attn\.\w+|mlp\.\w+|attn_norm|mlp_norm)(.*)", name)):
        return name if name.startswith("lm_head") else f"model.{name}"
    return f"model.layers.{match[1]}.{HF_OF_OURS[match[2]]}{match[3]}"


def gguf_of_hf(name: str) -> str:
    """A GGUF's name of a `.weight` of a Llama."""
    module = name.removesuffix(".weight")
    if module in ENDS:
        return f"{ENDS[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_OF_HF[rest]}.weight"
