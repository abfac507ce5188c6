"""Every family against transformers' own eager attention in float32, on sequences longer than any window."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.core.errors import OutOfResource
from lilliput.models import Checkpoint, load_decoder
from support.families import CASES, FAMILIES, LLAMA3, LONGROPE, VOCAB, Case, each, model_for, write_checkpoint

SLIDES = ["full_attention", "sliding_attention"]
EVERY: list[Case] = [
    *CASES,
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, "head_dim": 24}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDES, "tie_word_embeddings": False}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", {"attention_bias": True, "hidden_act": "gelu"}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"layer_types": SLIDES, "num_hidden_layers": 2, "tie_word_embeddings": False}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}),
    ("stablelm", {"qk_layernorm": True}),
    ("stablelm", {"use_parallel_residual": True, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    ("opt", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
]


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@each(EVERY)
def test_the_logits_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, seed=7, **changes)
    batch = tokens(2, 33)
    with torch.no_grad():
        expected = model_for(family, seed=7, **changes)(batch).logits
        found = load_decoder(Checkpoint.open(tmp_path)).eval()(batch)
    assert expected.abs().max() > 1  # large enough for an error to show
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_queries_in_chunks_give_the_same_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES[family](tmp_path, 7)
    decoder, batch = load_decoder(Checkpoint.open(tmp_path)).eval(), tokens(1, 33)
    with torch.no_grad():
        whole = decoder(batch)
        monkeypatch.setattr("lilliput.models.decoder.SCORES", 600)
        assert (decoder(batch) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_learned_positions_end(tmp_path: Path) -> None:
    FAMILIES["opt"](tmp_path, 7)
    decoder = load_decoder(Checkpoint.open(tmp_path))
    with pytest.raises(OutOfResource, match=r"opt: a sequence of 257 tokens, and positions are learned for 256\. "):
        decoder(tokens(1, 257))
