"""Worker of llm-compressor: RTN, GPTQ or AWQ into compressed-tensors, unpacked again from the file it wrote.

options: {"method": "rtn" | "gptq" | "awq"}. Grids have a zero point, as ours do; all else is its default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from worker import calibration, main, stored


def scheme(job: Mapping[str, Any]) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=False, strategy="group", group_size=job["group_size"]
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def quantize(job: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float16)
    asked = {"config_groups": {"group_0": scheme(job)}, "ignore": ["lm_head"]}
    recipe = {
        "rtn": lambda: [QuantizationModifier(**asked)],
        "gptq": lambda: [GPTQModifier(**asked)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**asked)],
    }[job["options"]["method"]]()
    if job["options"]["method"] == "rtn":
        oneshot(model=model, recipe=recipe)
        return model
    rows = torch.from_numpy(calibration(job))
    data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=len(rows), max_seq_length=rows.shape[1])
    return model


def dump(job: dict[str, Any], model: Any) -> tuple[Mapping[str, Any], dict[str, int]]:
    out = Path(job["out"]) / "compressed"
    model.save_pretrained(out, save_compressed=True)
    kept: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, Any] = {}
    for file in out.glob("*.safetensors"):
        for name, value in load_file(file).items():
            module, _, kind = name.rpartition(".")
            if kind == "weight":
                weights[name] = value.float().numpy()
            else:
                kept.setdefault(module, {})[kind] = value
    for module, state in kept.items():
        found = PackedQuantizationCompressor.decompress(state, scheme(job))
        weights[f"{module}.weight"] = found["weight"].float().numpy()
    return weights, stored(out)


if __name__ == "__main__":
    main(quantize, dump, ("llmcompressor", "compressed-tensors"))
