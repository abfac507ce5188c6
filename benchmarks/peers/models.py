"""The same shape for every engine: an artifact of random codes here, the peers' models through their environment."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from lilliput.artifact.entries import FloatEntry, QuantEntry, SourceInfo
from lilliput.artifact.publish import partial_of, publish
from lilliput.artifact.schema import Manifest
from lilliput.artifact.write import ArtifactWriter, Plan
from lilliput.core.spec import ModelSpec, Norm, Rotary
from lilliput.numerics.packing import zero_step

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {  # those of make_llama.py, which needs torch
    "tiny": {"hidden": 256, "inter": 512, "layers": 2, "heads": 4, "kv": 2, "vocab": 1024},
    "110m": {"hidden": 768, "inter": 2048, "layers": 12, "heads": 12, "kv": 12, "vocab": 32000},
    "1.1b": {"hidden": 2048, "inter": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000},
    "3b": {"hidden": 3072, "inter": 8192, "layers": 28, "heads": 24, "kv": 8, "vocab": 128256},
    "8b": {"hidden": 4096, "inter": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
}
LADDER, GROUP, CONTEXT = (2, 3, 4, 8), 64, 2048
LARGE = 2e9
"""Weights above which there is nothing of 8 bits, Q4_0 gets random codes, and other GGUFs come of q8_0 instead of f16."""
WRITERS = {"onnxruntime": ("onnx_random.py", ".onnx"), "openvino": ("openvino_random.py", ".xml")}
"""The peers whose models have random codes in blocks: the program that writes one, and how its name ends."""
RESERVE = 4 << 30
"""Bytes of disk and memory left to others."""


def parameters(shape: dict[str, int]) -> int:
    """Weights in the matrices."""
    hidden, kv = shape["hidden"], shape["hidden"] // shape["heads"] * shape["kv"]
    block = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * shape["inter"]
    return shape["layers"] * block + 2 * shape["vocab"] * hidden


def spec_of(shape: dict[str, int]) -> ModelSpec:
    """The Llama of that shape."""
    dim = shape["hidden"] // shape["heads"]
    return ModelSpec(
        family="llama",
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv"],
        head_dim=dim,
        intermediate_size=shape["inter"],
        context=CONTEXT,
        norm=Norm(kind="rms", eps=1e-5),
        activation="silu",
        rotary=Rotary(dim=dim, inv_freq=tuple(float(10000.0 ** (-2 * j / dim)) for j in range(dim // 2))),
        attn_scale=dim**-0.5,
        windows=(0,) * shape["layers"],
        tied_head=False,
    )


def plan_of(shape: dict[str, int], bits: tuple[int, ...] = LADDER, *, sym: bool = False) -> Plan:
    """Blocks on the whole ladder, embedding and head at 4 and 8 bits, as the default recipe has them."""
    spec = spec_of(shape)
    ends = tuple(b for b in bits if b in (4, 8)) or bits[-1:]
    sizes = {"embed_tokens": (spec.vocab_size, spec.hidden_size), "lm_head": (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        sizes |= spec.linears(layer)
    entries = {
        name: QuantEntry(
            out=out,
            columns=columns,
            bits=bits if name.startswith("layers.") else ends,
            group_size=GROUP,
            sym=sym,
            grid_bits=8 if columns > GROUP else 16,
        )
        for name, (out, columns) in sizes.items()
    }
    norms = [f"layers.{layer}.{kind}.weight" for layer in range(spec.num_layers) for kind in ("attn_norm", "mlp_norm")]
    floats = {name: FloatEntry(dtype="F32", shape=(spec.hidden_size,)) for name in (*norms, "final_norm.weight")}
    return Plan(spec, entries, floats, bits)


def _short(scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    """Scales with seven significant bits: what a byte can say of those near the largest of a row."""
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.round(mantissa * 128) / 128, exponent).astype(np.float16)


def _whole(zero: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.float16]:
    return (np.round(zero / step) * step).astype(np.float16)


def write_artifact(
    folder: Path, shape: dict[str, int], bits: tuple[int, ...] = LADDER, *, sym: bool = False, seed: int = 0
) -> Manifest:
    """Write random codes, one matrix in memory at a time; scales make a matrix keep the size of what it is given.

    The tokenizer knows single bytes and no end of text, so an answer is as long as it was asked to be.
    """
    plan, begun = plan_of(shape, bits, sym=sym), partial_of(folder)
    shutil.rmtree(begun, ignore_errors=True)
    rng = np.random.default_rng(seed)
    with ArtifactWriter.start(begun, plan) as writer:
        for name, entry in plan.entries.items():
            widest = entry.bits[-1]
            codes = np.frombuffer(rng.bytes(entry.out * entry.columns), dtype=np.uint8) >> np.uint8(8 - widest)
            # codes are uniform: their standard deviation is 2**bits / sqrt(12)
            step = rng.uniform(0.9, 1.1, (entry.out, entry.groups)) * (12 / entry.columns) ** 0.5
            zero = rng.uniform(-0.02, 0.02, (entry.out, entry.groups))
            writer.put_quantized(
                name,
                codes.reshape(entry.out, entry.columns),
                {b: _short(step / (1 << b)) for b in entry.bits},
                {} if sym else {b: _whole(zero * (1 << b), zero_step(b)) for b in entry.bits},
            )
        for name, left in plan.floats.items():
            writer.put_float(name, np.ones(left.shape, dtype=np.float32))
        _tokenizer().save(str(begun / "tokenizer.json"))
        (begun / "config.json").write_text('{"model_type": "llama"}\n')
        source = SourceInfo(
            name="random",
            sha256="0" * 64,
            architecture="LlamaForCausalLM",
            parameters=parameters(shape),
            dtype="float32",
            size_bytes=4 * parameters(shape),
        )
        manifest = writer.finish(source=source, recipe=[{"random": {"bits": list(bits)}}], seed=seed)
    publish(begun, folder)
    return manifest


def reason_not_to(
    shape: dict[str, int], kinds: Sequence[str], bits: Sequence[int], free: int | None, available: int | None
) -> str | None:
    """Why a shape does not fit in `free` bytes of disk and `available` of memory, None for either: do not ask.

    kinds: what the peers run, of `_BYTES`; bits: the artifact's. The GGUF that others are quantized from is counted too.
    """
    count = parameters(shape)
    source = 0.0 if all(_direct(shape, kind) for kind in kinds) else 1.07 if count > LARGE else 2.0
    artifact = bits[-1] / 8 + 4 * len(bits) / GROUP + 0.05
    disk = int(count * (source + sum(_BYTES[kind] for kind in kinds) + artifact))
    if free is not None and disk + RESERVE > free:
        return f"it takes {disk / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free, and 4 GB are to stay free"
    # every peer may keep a repacked copy beside the mapped file
    run = int(count * max([2 * _BYTES[kind] for kind in kinds] + [artifact]))
    if available is not None and run + RESERVE > available:
        return f"it takes up to {run / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free, and 4 GB are to stay"
    return None


_BYTES = {
    "q8_0": 1.07,
    "q4_0": 0.6,
    "q3_k_m": 0.52,
    "q2_k": 0.45,
    "onnxruntime int8": 1.13,
    "onnxruntime int4": 0.63,
    "openvino int8": 1.02,
    "openvino int4": 0.63,
}
"""Bytes of disk a weight takes, ends included."""


def _direct(shape: dict[str, int], kind: str) -> bool:
    return " " in kind or (kind == "q4_0" and parameters(shape) > LARGE)


def write_gguf(python: Path, folder: Path, shape: dict[str, int], kinds: list[str], threads: int) -> dict[str, Any]:
    """Write what is missing of `kinds` into `folder`; {kind: {"path", "weight_bytes_per_token", .. or "error"}}.

    The source is f16, or q8_0 above two billion weights, and is deleted afterwards unless it is asked for itself.
    """
    source_kind = "q8_0" if parameters(shape) > LARGE else "f16"
    source = folder / f"{source_kind}.gguf"
    found: dict[str, Any] = {}

    def fresh(path: Path, kind: str) -> dict[str, Any]:
        program = "gguf_random.py"
        if _direct(shape, kind):
            return _run(python, program, {"path": str(path), "shape": shape, "kind": kind})
        if not source.exists():
            part = source.with_suffix(".part")
            _run(python, program, {"path": str(part), "shape": shape, "kind": source_kind})
            part.rename(source)
        job = {"path": str(path), "source": str(source), "kind": kind, "threads": threads}
        return _run(python, program, job if kind != source_kind else {"path": str(path)})

    for kind in sorted(kinds, key=lambda k: k != source_kind):
        found[kind] = _once(folder / f"{kind}.gguf", partial(fresh, kind=kind))
    if source_kind not in kinds:
        source.unlink(missing_ok=True)
    return found


def write_blocks(python: Path, peer: str, folder: Path, shape: dict[str, int], widths: Sequence[int]) -> dict[str, Any]:
    """Write what is missing of a peer of `WRITERS` into `folder`; {"int4": as `write_gguf` says, ..}."""
    program, ending = WRITERS[peer]

    def fresh(path: Path, bits: int) -> dict[str, Any]:
        return _run(python, program, {"path": str(path), "shape": shape, "bits": bits, "context": CONTEXT})

    return {f"int{bits}": _once(folder / f"int{bits}{ending}", partial(fresh, bits=bits)) for bits in widths}


def _once(path: Path, fresh: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The facts of the model at `path`, which `fresh` writes where no notes beside it say that it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = path.with_suffix(".json")
    if notes.exists() and path.exists():
        return dict(json.loads(notes.read_text()))
    print(f"writing {path}", file=sys.stderr)
    try:
        found = {"path": str(path), **fresh(path)}
    except RuntimeError as error:
        return {"error": str(error)}
    notes.write_text(json.dumps(found) + "\n")
    return found


def _run(python: Path, program: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([python, HERE / program, json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _tokenizer() -> Tokenizer:
    tokens = ["<unk>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
