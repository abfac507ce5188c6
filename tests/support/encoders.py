"""Tiny encoders with random weights, written by transformers: BERT and CLIP, and tokenizers to go with them.

    model = write_encoder(folder, "bert", seed=0)
    model = write_encoder(folder, "clip")

As in `support.families`, norms and biases are random too, so that anything left out or mixed up shows.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors

from support.families import VOCAB, tiny_tokenizer

BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "pad_token_id": 2,
}
TEXT: dict[str, Any] = {k: v for k, v in BERT.items() if k != "type_vocab_size"}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 24}
VISION: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 8,
}


def write_encoder(folder: Path, family: str, seed: int = 0) -> Any:
    """Write a tiny checkpoint of "bert" or "clip" into `folder`; return the transformers model, float32, in eval mode."""
    if family == "bert":
        model: Any = transformers.BertModel(transformers.BertConfig(**BERT))
    else:
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=40)
        model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * (0.5 if "embedding" in key else 1.5 * tensor[0].numel() ** -0.5))
            else:
                norm = "norm" in key.lower() and key.endswith("weight")
                tensor.copy_((1.0 if norm else 0.0) + 0.3 * noise)
    model.eval().save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    if family == "clip":
        told = {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 24}, "resample": 3}
        told |= {
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
            "image_processor_type": "CLIPImageProcessor",
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return model


def _tokenizer() -> Tokenizer:
    """Bytes and a few merges, <s> in front of a text and </s> behind it."""
    tokenizer = tiny_tokenizer(bos=False)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer
