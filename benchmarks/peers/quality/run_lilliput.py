"""Worker of Lilliput: one recipe to one artifact, read back by `Artifact.dequantize`.

options: {"recipe": stages with "$bits" and "$group_size" in place of numbers, "shared": one artifact serves all widths,
"target_bits": where given, layers get widths of their own for so many bits a weight; a list of them, one artifact that
serves as many widths}.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from names import hf_of_ours
from worker import main, peak_rss_bytes

from lilliput.artifact.read import Artifact
from lilliput.pipeline import compress


def filled(recipe: Any, values: Mapping[str, Any]) -> Any:
    """The recipe with every "$name" replaced by the value of that name."""
    if isinstance(recipe, Mapping):
        return {key: filled(value, values) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [filled(value, values) for value in recipe]
    return values[recipe[1:]] if isinstance(recipe, str) and recipe.startswith("$") else recipe


def quantize(job: dict[str, Any]) -> Artifact:
    options, out = job["options"], Path(job["keep"]) / "model.lilliput"
    notes = out.with_suffix(".json")
    if not notes.exists():
        recipe = filled(options["recipe"], {"bits": job["bits"], "group_size": job["group_size"]})
        draw = {k: job["draw"][k] for k in ("length", "samples")}
        start, busy = time.perf_counter(), time.process_time()
        compress(
            job["model"],
            out,
            recipe=recipe,
            calibration=[job["draw"]["text"]],
            seed=job["seed"],
            target_bits=options.get("target_bits"),
            gate=False,
            overwrite=True,
            resume=False,  # what an earlier attempt had done would be missing from the time
            **draw,
        )
        facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
        facts["peak_rss_bytes"] = peak_rss_bytes()
        notes.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    job |= json.loads(notes.read_text(encoding="utf-8"))
    return Artifact.open(out)


def dump(job: dict[str, Any], artifact: Artifact) -> tuple[Mapping[str, Any], dict[str, int]]:
    data = artifact.manifest.data
    if data is not None and data.sha256 != job["draw"]["sha256"]:
        raise SystemExit("the calibration tokens are not those the peers were given")
    targets = job["options"].get("target_bits")
    bits = job["bits"] if targets is None or isinstance(targets, list) else artifact.bits[0]
    weights = {hf_of_ours(f"{name}.weight"): artifact.dequantize(name, bits) for name in artifact.quantized}
    weights |= {hf_of_ours(name): artifact.dequantize(name) for name in artifact.manifest.floats}
    return weights, stored(artifact, bits)


def stored(artifact: Artifact, bits: int) -> dict[str, int]:
    """Bytes of every tensor that a copy serving `bits` holds, narrower widths' scales too; alignment counts as part of
    the tensor it stands before or, at the end of a file, after."""
    sizes: dict[str, int] = {}
    for file in artifact.plan.files_at(bits):
        padding, last = 0, ""
        slots = artifact.plan.files[file].slots
        for name, slot in sorted(slots.items(), key=lambda item: item[1].begin):
            if slot.padding:
                padding += slot.end - slot.begin
                continue
            last = hf_of_ours(name)
            sizes[last] = slot.end - slot.begin + padding
            padding = 0
        if last:
            sizes[last] += padding
    return sizes


if __name__ == "__main__":
    main(quantize, dump, ("lilliput",))
