"""Tiny checkpoints of every family, written by transformers with random weights, and a tokenizer to go with them.

    from support.families import FAMILIES, write_checkpoint
    FAMILIES["llama"](folder, seed)
    write_checkpoint(folder, "mistral", seed, sliding_window=5)
    @each([*CASES, ("opt", {"enable_bias": False})])

Weights are larger than an initialisation would make them, and norms and biases are random too, so that anything left
out or mixed up shows in the logits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

VOCAB = 320
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [4.0] * 8,
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2", {"bos_token_id": None, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"bos_token_id": None, "head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": 9, "original_max_position_embeddings": 256}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "relu"}),
    "gpt_neox": ("GPTNeoX", {"bos_token_id": None}),
}


def write_checkpoint(folder: Path, family: str, seed: int = 0, **changes: Any) -> None:
    """Write a tiny checkpoint of `family` into `folder`, with the config keys in `changes` on top of ours."""
    model_for(family, seed, **changes).save_pretrained(folder)
    tokenizer = tiny_tokenizer(bos=_keys(family, changes)["bos_token_id"] is not None)
    tokenizer.save(str(folder / "tokenizer.json"))


def model_for(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return the transformers model that `write_checkpoint` saves: float32, in eval mode, attention "eager"."""
    name = _OWN[family][0]
    config = getattr(transformers, f"{name}Config")(**_keys(family, changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 2:
                tensor.copy_(noise * (0.5 if "embed" in key else 1.5 * tensor.shape[1] ** -0.5))
            else:
                around = 1.0 if "norm" in key and key.endswith("weight") and "gemma" not in family else 0.0
                tensor.copy_(around + 0.3 * noise)
    return model


def tiny_tokenizer(*, bos: bool = True) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most VOCAB tokens: <s> 0, </s> 1, <pad> 2, the bytes, a few merges."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("i", "n"), ("n", "d"), ("Ġa", "nd"), ("o", "n")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _keys(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    return _SIZES | _OWN[family][1] | changes


def _write(family: str, folder: Path, seed: int) -> None:
    write_checkpoint(folder, family, seed)


FAMILIES: dict[str, Callable[[Path, int], None]] = {name: partial(_write, name) for name in _OWN}
"""Name to a function of (folder, seed) that writes a checkpoint."""

Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    *((family, {}) for family in FAMILIES),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
]
"""Every family as it comes, and StableLM 2, which has a norm for every head: family and changes of its config."""


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Run a test for every one of the cases, as `family` and `changes`."""
    return pytest.mark.parametrize(
        ("family", "changes"), cases, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
    )
