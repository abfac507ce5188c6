"""Memory that `tune` takes beside the decoders and codes it is given, in bytes a coded weight, and what it announces.

    python benchmarks/bench_tune_memory.py
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/bench_tune_memory.py     with a glibc that keeps no freed block

Two steps of one short row on random weights, 26 million of them in matrices of up to 6 MB; each way in a fresh process.
Appends a line for each to benchmarks/results/tune_memory.jsonl.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from harness import emit
from lilliput.core.progress import Silent
from lilliput.core.spec import ModelSpec, Norm
from lilliput.data.streams import Batches
from lilliput.measure.memory import peak_rss_bytes, reset_peak, rss_bytes
from lilliput.methods.quantize.tune import Tune
from lilliput.models import Decoder
from lilliput.numerics.grids import nearest

SPEC = ModelSpec(
    family="llama",
    vocab_size=320,
    hidden_size=768,
    num_layers=4,
    num_heads=12,
    num_kv_heads=6,
    head_dim=64,
    intermediate_size=2048,
    context=64,
    norm=Norm(kind="rms", eps=1e-6),
    activation="silu",
    attn_scale=0.125,
    windows=(0,) * 4,
)
BITS, GROUP = (2, 3, 4, 8), 64


def measure(codes: bool) -> dict[str, float | None]:
    """Figures of one way: what was held at most beyond what was there before, and what was announced."""
    torch.manual_seed(0)
    original = Decoder(SPEC, ())
    coded = {
        name: nearest(linear.weight.detach(), BITS, GROUP, sym=False)
        for block in original.blocks
        for name, linear in block.linears().items()  # type: ignore[operator]
    }
    student = deepcopy(original)
    rows = Batches(np.random.default_rng(0).integers(3, SPEC.vocab_size, (4, 16), dtype=np.int32), 1)
    tune = Tune(steps=2, batch=1, codes=codes, written=False)
    before = rss_bytes()
    known = reset_peak() and before is not None
    with TemporaryDirectory() as folder:
        tune.tune(original, student, coded, rows, Path(folder), Silent(), BITS)
    weights = sum(q.codes.numel() for q in coded.values())
    grids = sum(t.numel() for q in coded.values() for t in (*q.scale.values(), *q.zero.values()))
    announced = tune.held_bytes(weights=weights, grids=grids, row=0, rows=1) / weights
    taken = ((peak_rss_bytes() or 0) - (before or 0)) / weights if known else None
    return {"weights": weights, "announced_bytes_per_weight": announced, "bytes_per_weight": taken}


def main() -> int:
    for codes in (True, False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(measure, codes).result()
        emit("tune_memory", codes=codes, mmap_threshold=os.environ.get("MALLOC_MMAP_THRESHOLD_"), **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
