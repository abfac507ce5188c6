"""Worker of GPTQModel: GPTQ, with its defaults but what is given. options: {"sym": no zero point, then `mse`, the power
of the error its search for ranges sums, 0 for none}.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from worker import calibration, main, stored, tensors

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it asks for one, and then refuses to start with one
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def quantize(job: dict[str, Any]) -> Any:
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], device="cpu", **job["options"])
    model = GPTQModel.load(job["model"], config)
    rows = calibration(job)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    return model


def dump(job: dict[str, Any], model: Any) -> tuple[Mapping[str, Any], dict[str, int]]:
    out = Path(job["out"]) / "gptq"
    model.save(str(out))
    read = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu").model
    weights = {name: value for name, value in tensors(read).items() if name.endswith(".weight")}
    for name, module in read.named_modules():
        if hasattr(module, "dequantize_weight") and ".layers." in name:
            with torch.inference_mode():
                weights[f"{name}.weight"] = module.dequantize_weight().T.float().numpy()
    return weights, stored(out)


if __name__ == "__main__":
    main(quantize, dump, ("GPTQModel",))
