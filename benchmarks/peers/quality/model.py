"""What every contender is given: one model, one draw of calibration tokens, and what is measured of what they return."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from lilliput.core.errors import LilliputError as LilliputError
from lilliput.data.documents import read_documents
from lilliput.data.streams import Batches, batches, order, windows
from lilliput.data.tokenizer import Tokenizer
from lilliput.measure.quality import QualityRow, Runner, evaluate
from lilliput.measure.reference import open_original as open_original
from lilliput.models import Checkpoint, load_decoder
from lilliput.numerics.statistics import InputNorm
from peers.quality.names import hf_of_ours

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
MULTIPLE = 256
"""llama.cpp's k-quants need rows of whole blocks of 256, grids of 64 need whole groups."""


def prepare(source: Path, out: Path) -> Path:
    """Copy a Llama with its feed-forward widened to a multiple of 256 by neurons that are all zero.

    The function stays the same: such a neuron gives silu(0) * 0 = 0 and is read with weight 0. Done only where needed,
    and every contender gets this model, so its bits a weight are of the widened matrices.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("special_tokens_map.json", *SIDE_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or not (source / "model.safetensors").exists():
        raise SystemExit(f"{source}: a Llama in one model.safetensors is needed: the GGUF and the names are a Llama's")
    width = config["intermediate_size"]
    config["intermediate_size"] = wide = -(-width // MULTIPLE) * MULTIPLE
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    for name, value in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = torch.nn.functional.pad(value, (0, 0, 0, wide - width))
        elif name.endswith("down_proj.weight"):
            weights[name] = torch.nn.functional.pad(value, (0, wide - width))
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def calibration(model: Path, text: Path, *, length: int, samples: int, seed: int) -> Batches:
    """The draw every contender of that seed learns from; `lilliput.compress` makes the same one."""
    return batches(read_documents(text), Tokenizer.open(model), length=length, samples=samples, seed=seed)


def importance(model: Path, data: Batches) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squared inputs of every linear layer of the blocks, (in,) each, by Hugging Face's module names.

    This is what llama-imatrix counts; the Python package of llama.cpp does not carry that program.
    """
    decoder = load_decoder(Checkpoint.open(model)).eval()
    sums = {}
    for block in decoder.blocks:
        for name, module in block.linears().items():
            sums[name] = InputNorm(module.in_features)
            module.register_forward_pre_hook(lambda _, given, s=sums[name]: s.add(given[0].flatten(0, -2)))
    with torch.inference_mode():
        for rows in data:
            decoder(torch.from_numpy(rows.astype(np.int64)))
    return {hf_of_ours(name): (s.value().square() / data.tokens).numpy() for name, s in sums.items()}


def held_out(model: Path, text: Path, *, length: int, limit: int | None) -> list[npt.NDArray[np.int32]]:
    """Windows of `length` tokens of the text to measure on, `limit` of them drawn over the whole text (None: all)."""
    cut = windows(read_documents(text), Tokenizer.open(model), length=length)
    return [cut[i] for i in sorted(order(len(cut), 0)[:limit])]


class Remembered:
    """A runner whose logits are kept, for the original that many contenders are compared with."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.kept: dict[bytes, npt.NDArray[np.float32]] = {}

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """As `measure.quality.Runner`; each window is computed once."""
        key = tokens.tobytes()
        if key not in self.kept:
            self.kept[key] = self.runner.logits(tokens, bits=bits)
        return self.kept[key]


def assemble(model: Path, weights: Mapping[str, torch.Tensor], out: Path) -> Path:
    """A model folder with a contender's weights in float32, and the original's where it gave none.

    Raises ValueError for a tensor the model does not have, of another shape, or not finite.
    """
    whole = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    for name, value in weights.items():
        if name == "lm_head.weight" and name not in whole:
            if not torch.equal(value.half(), weights.get("model.embed_tokens.weight", value).half()):
                raise ValueError("lm_head.weight differs from the embedding it is tied to")
            continue
        if name not in whole or whole[name].shape != value.shape:
            raise ValueError(f"{name} {tuple(value.shape)} is not a tensor of the model")
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
        whole[name] = value.float().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    return out


def measure(folder: Path, original: Runner, cut: Sequence[npt.NDArray[np.int32]]) -> tuple[QualityRow, list[float]]:
    """Perplexity, KL(original || this) and top-1 agreement of a model folder, by our float32 decoder; KL of every window."""
    runner = _Once(Remembered(open_original(folder)))
    (row,) = evaluate(runner, cut, bits=[0], against=original)
    alone = [evaluate(runner, [window], bits=[0], against=original)[0].kl or 0.0 for window in cut]
    return row, [float(f"{kl:.6g}") for kl in alone]


def perplexity(original: Runner, cut: Sequence[npt.NDArray[np.int32]]) -> float:
    """Of the model the contenders are compared with."""
    return evaluate(original, cut, bits=[None])[0].perplexity


class _Once:
    """A runner that is one width, whatever it is asked for: `evaluate` takes bits=None for the original."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        return self.runner.logits(tokens)


def digest(*paths: Path, **fields: Any) -> str:
    """Twelve hex digits that change with the files' contents or the fields."""
    total = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:12]
