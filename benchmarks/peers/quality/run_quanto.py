"""Worker of optimum-quanto: round to nearest with a shift, no text. Its groups are of 128 where those divide."""

from collections.abc import Mapping
from typing import Any

import torch
from optimum.quanto import freeze, qint2, qint4
from optimum.quanto import quantize as quantize_modules
from transformers import AutoModelForCausalLM
from worker import linears, main, tensors


def quantize(job: dict[str, Any]) -> tuple[Any, list[str], dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float16)
    names, before = [name for name, _ in linears(model)], tensors(model)
    quantize_modules(model, weights={4: qint4, 2: qint2}[job["bits"]], exclude="lm_head")
    freeze(model)
    return model, names, before


def dump(job: dict[str, Any], state: tuple[Any, list[str], dict[str, Any]]) -> tuple[Mapping[str, Any], dict[str, int]]:
    model, names, weights = state
    inside = tuple(f"{name}." for name in names)
    sizes = {
        name: value.nbytes
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" and isinstance(value, torch.Tensor)
    }
    for name in names:
        weight = model.get_submodule(name).weight
        weights[f"{name}.weight"] = weight.detach().dequantize().float().numpy()
    if not any(name.startswith(inside) for name in sizes):
        raise SystemExit("its state holds no packed weights")
    return weights, sizes


if __name__ == "__main__":
    main(quantize, dump, ("optimum-quanto",))
