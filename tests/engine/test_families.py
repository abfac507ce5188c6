"""The engine against transformers in float32, for every family and every flag of ModelSpec."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lilliput.artifact.read import StoredTensor
from lilliput.engine import native
from lilliput.models import Checkpoint
from support.families import CASES, LLAMA3, LONGROPE, VOCAB, Case, each, model_for, write_checkpoint

EVERY: list[Case] = [
    *CASES,
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "head_dim": 24}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"attn_logit_softcapping": None, "tie_word_embeddings": False}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}),
    ("stablelm", {"qk_layernorm": True}),
    ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
]


def native_model(folder: Path, threads: int = 2) -> native.Model:
    checkpoint = Checkpoint.open(folder)
    floats = {}
    for name in checkpoint.names():
        values = checkpoint.read(name).float().numpy()
        floats[name] = StoredTensor("F32", values.shape, values)
    return native.Model(checkpoint.spec, floats, {}, threads=threads)


@each(EVERY)
def test_the_logits_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, 7, **changes)
    tokens = torch.randint(3, VOCAB, (1, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model_for(family, 7, **changes)(tokens).logits[0].numpy()
        wide = model_for(family, 7, **changes).double()(tokens).logits[0].numpy()
    ours = native_model(tmp_path).logits(tokens[0].tolist(), 0)
    # as near to float64 as transformers' float32 is, give or take the order of its sums
    unit = np.abs(wide).max() * 2.0**-24
    assert np.abs(ours - wide).max() <= 4 * np.abs(expected - wide).max() + 64 * unit
    assert np.abs(ours - expected).max() <= 2e-4 * np.abs(expected).max()
