"""Worker of auto-round: SignRound, with its defaults but what is given. options: {"sym": no zero point, then `iters` and
`enable_alg_ext` by its own names}.

In float32 without mixed precision: in half precision, its default, it did not come to an end on our processors, which have
no arithmetic of that kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import calibration, main, stored, tensors


def quantize(job: dict[str, Any]) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = torch.from_numpy(calibration(job))
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        dataset=list(rows.split(8)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        seed=job["seed"],
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        **job["options"],
    )
    quantized, _ = tuner.quantize()
    return tuner, quantized


def dump(job: dict[str, Any], state: tuple[Any, Any]) -> tuple[Mapping[str, Any], dict[str, int]]:
    tuner, model = state
    weights = tensors(model)  # quantized and dequantized where they stand, before they are packed
    out = Path(job["out"]) / "auto_round"
    # its default packs 4 bits with zeros by a class of its own that this version calls wrongly
    tuner.save_quantized(str(out), format="auto_round:auto_gptq", inplace=True)
    packed = next(path.parent for path in sorted(out.rglob("*.safetensors")))
    names = {name for name in weights if name.endswith(".weight")}
    sizes = stored(packed)
    halves = {name: 2 * weights[name].size for name in sizes if name in names}  # float16 with all others, float32 here
    return {name: weights[name] for name in names}, sizes | halves


if __name__ == "__main__":
    main(quantize, dump, ("auto-round",))
