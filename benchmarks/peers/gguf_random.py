"""Write a GGUF of random weights and quantize it with llama.cpp's own quantizer. Runs in the peers' environment.

    python gguf_random.py '{"path": .., "shape": {..}, "kind": "f16" | "q8_0"}'         the source
    python gguf_random.py '{"path": .., "shape": {..}, "kind": "q4_0"}'                 random codes, no source
    python gguf_random.py '{"path": .., "source": .., "kind": "q4_0", "threads": 2}'    one quantized from it
    python gguf_random.py '{"path": ..}'                                                nothing written

Prints {"weight_bytes_per_token": .., "types": {tensor type: count}} of the file.
"""

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from weights import BASE, EPS

CONTEXT = 2048


def matrices(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (out, in) of every matrix of a Llama of that shape, in the order of the file."""
    hidden, inter, vocab = shape["hidden"], shape["inter"], shape["vocab"]
    kv = shape["kv"] * (hidden // shape["heads"])
    yield "token_embd", (vocab, hidden)
    for layer in range(shape["layers"]):
        sizes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (inter, hidden), "ffn_up": (inter, hidden)}
        sizes |= {"ffn_down": (hidden, inter)}
        yield from ((f"blk.{layer}.{name}", size) for name, size in sizes.items())
    yield "output", (vocab, hidden)


def norms(shape: dict[str, int]) -> list[str]:
    """Names of the vectors of a Llama of that shape."""
    names = [f"blk.{layer}.{name}" for layer in range(shape["layers"]) for name in ("attn_norm", "ffn_norm")]
    return [*names, "output_norm"]


def vocabulary(count: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary that loads: control tokens, the bytes, names."""
    kinds = gguf.TokenType
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    tokens += [f"t{index}".encode() for index in range(len(tokens), count)]
    types += [kinds.NORMAL] * (count - len(types))
    return tokens, [0.0] * count, [int(kind) for kind in types]


def write(path: Path, shape: dict[str, int], kind: str, seed: int = 0) -> None:
    """Stream a random Llama into `path`: one matrix in memory at a time.

    q4_0 has random codes in the types that llama.cpp's quantizer picks at Q4_0, in no more time than the disk takes.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["inter"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv"])
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(shape["vocab"])
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]))
    tokens, scores, types = vocabulary(shape["vocab"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, (out, columns) in matrices(shape):
        form = type_of(name, kind)
        if form == gguf.GGMLQuantizationType.F16:
            size = 2 * out * columns
            writer.add_tensor_info(f"{name}.weight", (out, columns), np.dtype(np.float16), size)
        else:  # the writer wants the shape in bytes and finds the weights by the type
            each, size = gguf.GGML_QUANT_SIZES[form]
            width = columns // each * size
            writer.add_tensor_info(f"{name}.weight", (out, width), np.dtype(np.uint8), out * width, raw_dtype=form)
    for name in norms(shape):
        size = 4 * shape["hidden"]
        writer.add_tensor_info(f"{name}.weight", (shape["hidden"],), np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for name, size in matrices(shape):
        writer.write_tensor_data(stored(rng, *size, type_of(name, kind)))
    for _ in norms(shape):
        writer.write_tensor_data(np.ones(shape["hidden"], dtype=np.float32))
    writer.close()


def type_of(name: str, kind: str) -> gguf.GGMLQuantizationType:
    """What a matrix is stored as in a file of `kind` that this program writes."""
    return gguf.GGMLQuantizationType["Q6_K" if (name, kind) == ("output", "q4_0") else kind.upper()]


def stored(rng: np.random.Generator, out: int, columns: int, form: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix as the file holds it; it keeps the size of what it is given."""
    if form in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0):
        values = rng.standard_normal((out, columns), dtype=np.float32) * np.float32(columns**-0.5)
        return values.astype(np.float16) if form == gguf.GGMLQuantizationType.F16 else quantize(values, form)
    each, size = gguf.GGML_QUANT_SIZES[form]
    count = out * columns // each
    found = np.frombuffer(rng.bytes(count * size), dtype=np.uint8).reshape(count, size).copy()
    # a code is uniform, so its standard deviation is 2**bits / sqrt(12)
    if form == gguf.GGMLQuantizationType.Q4_0:  # half the scale, then 32 codes
        found[:, :2] = _halves(rng, count, (12 / columns) ** 0.5 / 16)
    else:  # Q6_K: 192 bytes of codes, 16 scales of 8 bits, and the scale of those
        found[:, 192:208] = rng.integers(24, 41, (count, 16), dtype=np.uint8)
        found[:, 208:] = _halves(rng, count, (12 / columns) ** 0.5 / 64 / 32)
    return found.reshape(out, -1)


def _halves(rng: np.random.Generator, count: int, scale: float) -> np.ndarray:
    """(count, 2) bytes of float16 scales, within a tenth of `scale`."""
    scales = (rng.random(count, dtype=np.float32) * np.float32(0.2) + np.float32(0.9)) * np.float32(scale)
    return scales.astype("<f2").view(np.uint8).reshape(count, 2)


def convert(source: Path, path: Path, kind: str, threads: int) -> None:
    """Quantize as `llama-quantize KIND` would, its choice of type for each tensor included."""
    import llama_cpp as c

    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = threads
    params.allow_requantize = True
    quiet = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    if c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp does not quantize to {kind}")


def facts(path: Path) -> dict[str, Any]:
    """Bytes of weights a token reads: every tensor but the embedding table, of which it reads one row."""
    tensors = gguf.GGUFReader(path).tensors
    read = [t for t in tensors if t.name != "token_embd.weight"]
    return {
        "weight_bytes_per_token": int(sum(t.n_bytes for t in read)),
        "types": dict(Counter(t.tensor_type.name for t in read)),
        "head": next(t.tensor_type.name for t in read if t.name == "output.weight"),
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    path = Path(job["path"])
    if "source" in job:
        convert(Path(job["source"]), path, job["kind"], job["threads"])
    elif "shape" in job:
        write(path, job["shape"], job["kind"])
    print("\n" + json.dumps(facts(path)))


if __name__ == "__main__":
    main()
