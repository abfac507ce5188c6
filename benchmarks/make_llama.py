"""Write a Llama checkpoint of random weights, of any size, without holding it in memory.

    python benchmarks/make_llama.py OUT --shape 1.1b

Shapes: 110m, 1.1b (TinyLlama's), 3b and 8b (Llama 3's, the head not shared). bfloat16, shards of one block, a tokenizer of single bytes.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

SHAPES: dict[str, dict[str, int]] = {
    "110m": {"hidden": 768, "inter": 2048, "layers": 12, "heads": 12, "kv": 12, "vocab": 32000},
    "1.1b": {"hidden": 2048, "inter": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000},
    "3b": {"hidden": 3072, "inter": 8192, "layers": 28, "heads": 24, "kv": 8, "vocab": 128256},
    "8b": {"hidden": 4096, "inter": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
}


def write(out: Path, shape: dict[str, int], seed: int = 0) -> None:
    """Write the folder `out`: config.json, tokenizer.json, one safetensors shard a block and one for the ends."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inter = shape["hidden"], shape["inter"]
    head_dim = hidden // shape["heads"]
    kv = shape["kv"] * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    count = shape["layers"] + 1
    weight_map: dict[str, str] = {}

    def shard(index: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{index:05}-of-{count:05}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(shape["layers"]):
        base = f"model.layers.{layer}"
        sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
        block = {f"{base}.self_attn.{k}.weight": matrix(*v) for k, v in sizes.items()}
        sizes = {"gate_proj": (inter, hidden), "up_proj": (inter, hidden), "down_proj": (hidden, inter)}
        block |= {f"{base}.mlp.{k}.weight": matrix(*v) for k, v in sizes.items()}
        block |= {f"{base}.{n}.weight": ones.clone() for n in ("input_layernorm", "post_attention_layernorm")}
        shard(layer + 1, block)
    ends = {f"{n}.weight": matrix(shape["vocab"], hidden) for n in ("model.embed_tokens", "lm_head")}
    shard(count, ends | {"model.norm.weight": ones})
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab"],
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer().save(str(out / "tokenizer.json"))


def _tokenizer() -> Tokenizer:
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    arguments = parser.parse_args()
    write(arguments.out, SHAPES[arguments.shape])
