"""What every worker does around its quantizer: read the job, time it, write the weights it stands for.

Imported where Lilliput is not installed: the standard library, NumPy and safetensors only; torch where a model is torch.
A job is {"model", "calibration", "importance", "bits", "group_size", "seed", "threads", "options", "keep", "out"}:
folder of the model, files of token ids and of mean squared inputs, what is asked, a folder that stays, one for answers.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PACKAGES = ("torch", "transformers", "numpy")


def calibration(job: Mapping[str, Any]) -> np.ndarray:
    """The rows of token ids every contender learns from, (samples, length) int64."""
    return np.load(job["calibration"]).astype(np.int64)


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of every linear layer inside the blocks of a transformers model, in order."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            yield name, module


def tensors(model: Any) -> dict[str, Any]:
    """Every parameter of a torch model as float32, by its name."""
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def stored(folder: Path | str) -> dict[str, int]:
    """Bytes of every tensor in the safetensors files of a folder, from their headers."""
    found: dict[str, int] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    return found


def peak_rss_bytes(status: str = "/proc/self/status") -> int | None:
    """Largest resident size of this process so far, None where the system does not say."""
    try:
        text = Path(status).read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def main(
    quantize: Callable[[dict[str, Any]], Any],
    dump: Callable[[dict[str, Any], Any], tuple[Mapping[str, Any], Mapping[str, int]]],
    packages: tuple[str, ...],
) -> None:
    """Run the job in argv[1]; `quantize` is timed, `dump` gives (weights by Hugging Face names, stored bytes by tensor).

    Writes OUT/weights.safetensors, float32; the last line of stdout is the record: seconds, cpu_seconds (of all
    threads; other processes do not lengthen it), peak_rss_bytes, stored, peer_versions (`versions` of a recorded line
    are of what measures). A quantizer that did its work in an earlier job puts the figures of then into the job, by the
    same names.
    """
    job = json.loads(sys.argv[1])
    os.environ.setdefault("OMP_NUM_THREADS", str(job["threads"]))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job["threads"])
        sys.modules["torch"].manual_seed(job["seed"])
    start, busy = time.perf_counter(), time.process_time()
    state = quantize(job)
    facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    facts["peak_rss_bytes"] = peak_rss_bytes()
    weights, sizes = dump(job, state)
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: np.array(v, dtype=np.float32, order="C") for k, v in weights.items()}, out / "weights.safetensors")
    record: dict[str, Any] = {key: job.get(key, value) for key, value in facts.items()}
    record |= {"stored": {k: int(v) for k, v in sizes.items()}, "peer_versions": versions(*packages, *PACKAGES)}
    print("\n" + json.dumps(record))


def versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution, those that are not there left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
