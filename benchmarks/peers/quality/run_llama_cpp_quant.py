"""Worker of llama.cpp's quantizer, through its C functions: a GGUF of the model written here, then quantized by it.

options: {"ftype": "Q4_K_M", "importance": whether it is given the mean squared inputs that llama-imatrix would count}.
The embedding, a tied head with it, stays float16. Rows of q and k are not reordered for llama.cpp's rotation: the file
is read back, never run, and the quantizer works on one row at a time.
"""

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as c
import numpy as np
from gguf.quants import dequantize
from names import gguf_of_hf
from safetensors.numpy import load_file
from worker import main


def write(model: Path, path: Path) -> dict[str, str]:
    """Write a Llama in float16, vectors in float32. Returns {name in the GGUF: Hugging Face's name}."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    heads, dim = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_tokenizer_model("no_vocab")
    names = {}
    for name, value in load_file(model / "model.safetensors").items():
        names[gguf_of_hf(name)] = name
        writer.add_tensor(gguf_of_hf(name), value.astype(np.float16 if value.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


def importance(file: str, names: Mapping[str, str]) -> tuple[Any, list[Any]]:
    """The array of llama_model_imatrix_data that ends with an empty one, and what must outlive the call."""
    given, alive = np.load(file), []
    entries = []
    for ours, theirs in names.items():
        if theirs.removesuffix(".weight") in given:
            values = np.ascontiguousarray(given[theirs.removesuffix(".weight")], dtype=np.float32)
            entry = c.llama_model_imatrix_data()
            entry.name = ours.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
            entries.append(entry)
            alive.append(values)
    return (c.llama_model_imatrix_data * (len(entries) + 1))(*entries), alive


def quantize(job: dict[str, Any]) -> tuple[Path, dict[str, str]]:
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    source, path = out / "f16.gguf", out / "quantized.gguf"
    names = write(Path(job["model"]), source)
    quiet = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    c.llama_backend_init()
    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{job['options']['ftype']}")
    params.nthread = job["threads"]
    params.token_embedding_type = params.output_tensor_type = int(gguf.GGMLQuantizationType.F16)
    alive: Any = None
    if job["options"]["importance"]:
        params.imatrix, alive = importance(job["importance"], names)
    if c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp does not quantize to {job['options']['ftype']}")
    del alive
    return path, names


def dump(job: dict[str, Any], state: tuple[Path, dict[str, str]]) -> tuple[Mapping[str, Any], dict[str, int]]:
    path, names = state
    weights, sizes = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        weights[names[tensor.name]] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        sizes[f"{names[tensor.name]}.{tensor.tensor_type.name}"] = int(tensor.n_bytes)
    return weights, sizes


if __name__ == "__main__":
    main(quantize, dump, ("llama-cpp-python", "gguf"))
