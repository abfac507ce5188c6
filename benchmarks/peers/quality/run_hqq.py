"""Worker of HQQ: half-quadratic grids, no text. options: {"axis": 1 groups along inputs, 0 along outputs}."""

from collections.abc import Mapping
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM
from worker import linears, main, tensors


def quantize(job: dict[str, Any]) -> tuple[Any, dict[str, HQQLinear]]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float16)
    config = BaseQuantizeConfig(nbits=job["bits"], group_size=job["group_size"], **job["options"])
    layers = {
        name: HQQLinear(module, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        for name, module in linears(model)
    }
    return model, layers


def dump(job: dict[str, Any], state: tuple[Any, dict[str, HQQLinear]]) -> tuple[Mapping[str, Any], dict[str, int]]:
    model, layers = state
    weights = tensors(model)
    sizes = {name: value.nbytes for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, layer in layers.items():
        weights[f"{name}.weight"] = layer.dequantize().float().numpy()
        del sizes[f"{name}.weight"]
        sizes[f"{name}.W_q"] = layer.W_q.nbytes
        sizes |= {f"{name}.{kind}": layer.meta[kind].nbytes for kind in ("scale", "zero")}
    return weights, sizes


if __name__ == "__main__":
    main(quantize, dump, ("hqq",))
