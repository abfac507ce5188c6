"""Time and peak memory of the quantizers that calibrate, on one layer or on a whole model, with one thread.

    python benchmarks/bench_quantizers.py [--out 2048] [--columns 5632] [--only gptq-nested]
    python benchmarks/bench_quantizers.py --model llama-1.1b --work build/quantizers --only gptq-4

Every run is a process of its own, so its peak resident memory (ru_maxrss) is its own. Of one layer it includes torch,
the layer and its Gram matrix, given as `base_rss_bytes`; weights are normal, inputs correlated with a few loud ones.
A whole model (`make_llama.py` makes random ones) goes through `lilliput.compress`: checkpoint to checked artifact,
calibration included, with the processor seconds of every step; stopped, the same command goes on.
Writes benchmarks/results/quantizers.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import emit

TEXT = Path(__file__).resolve().parents[1] / "assets" / "tales7m" / "calibration.txt"

RUNS = {
    "gptq-4": ("gptq", {"bits": [4]}),
    "gptq-4-outliers": ("gptq", {"bits": [4], "outliers": 0.005}),
    "gptq-nested": ("gptq", {}),
    "leanquant-4": ("leanquant", {"bits": [4]}),
    "leanquant-nested": ("leanquant", {}),
    "leanquant-tables": ("leanquant", {"bits": [2, 3, 4], "nonuniform": True}),
}


def measure(run: str, out: int, columns: int) -> None:
    """Solve one layer and print what it took."""
    import torch

    from lilliput.methods.base import LayerMethod, build
    from lilliput.methods.outliers import solve
    from lilliput.methods.safety import output_errors
    from lilliput.numerics.nested import Quantized

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator) * 0.02
    shared = torch.randn(columns // 16, columns, generator=generator)
    gram = torch.zeros(columns, columns)
    for _ in range(4):
        x = torch.randn(1024, columns // 16, generator=generator) @ shared / (columns // 16) ** 0.5
        x += 0.5 * torch.randn(1024, columns, generator=generator)
        x[:, ::97] *= 8
        gram.addmm_(x.T, x)
    method = build(*RUNS[run])
    assert isinstance(method, LayerMethod)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, start_cpu = time.perf_counter(), time.process_time()
    made = solve(method, weight, gram)
    assert isinstance(made, Quantized)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    errors = {str(b): float(f"{e:.4g}") for b, e in output_errors(weight, made, gram).items()}
    print(
        json.dumps({"seconds": seconds, "cpu_s": cpu, "peak_rss_bytes": peak, "base_rss_bytes": base, "error": errors})
    )


class Steps:
    """A Progress that keeps what every step of the sweep took: the embedding, each block, the head.

    notes: a file of what all processes of one compression took up to their last step, so that one that is stopped can
    go on and nothing is left out but the step that was cut short.
    """

    def __init__(self, notes: Path) -> None:
        self._notes, self._start, self._busy = notes, time.perf_counter(), 0.0
        self.earlier: dict[str, Any] = {"seconds": 0.0, "cpu_s": 0.0, "peak_rss_bytes": 0, "step_cpu_s": [], "stops": 0}
        if notes.exists():
            self.earlier = json.loads(notes.read_text(encoding="utf-8"))
            self.earlier["stops"] += 1
        self.step_cpu_s: list[float] = self.earlier["step_cpu_s"]

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """A phase begins, and what led to it is no step; nor is what was done before a phase that begins anew."""
        if not done:
            self.step_cpu_s.clear()
        self.say(f"{label} begins")
        self._busy = time.process_time()

    def advance(self, units: int) -> None:
        """A step is done."""
        now = time.process_time()
        self.step_cpu_s.append(round(now - self._busy, 1))
        self._busy = now
        self._notes.write_text(json.dumps(self.taken()) + "\n", encoding="utf-8")
        self.say(f"step {len(self.step_cpu_s)}, {units} weights: {self.step_cpu_s[-1]} s of the processor")

    def say(self, text: str) -> None:
        """Tell it with the time since the start."""
        print(f"{time.perf_counter() - self._start:8.1f} s  {text}", file=sys.stderr, flush=True)

    def taken(self) -> dict[str, Any]:
        """What it took up to now, earlier processes of the same compression included."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self.earlier | {
            "seconds": self.earlier["seconds"] + time.perf_counter() - self._start,
            "cpu_s": self.earlier["cpu_s"] + time.process_time(),
            "peak_rss_bytes": max(self.earlier["peak_rss_bytes"], peak),
            "step_cpu_s": self.step_cpu_s,
        }


def measure_model(run: str, model: Path, work: Path, samples: int, length: int) -> None:
    """Compress a whole model and print what it took."""
    import torch

    from lilliput.pipeline import compress

    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    method, options = RUNS[run]
    notes = work / f"{run}-{model.resolve().name}-{samples}x{length}.json"
    out, steps = notes.with_suffix(".lilliput"), Steps(notes)
    report = compress(
        model,
        out,
        recipe=[{method: options}],
        calibration=[TEXT],
        samples=samples,
        length=length,
        resume=notes.exists(),
        overwrite=True,
        gate=False,  # random weights have no quality to keep
        progress=steps,
    )
    sizes = {"artifact_bytes": report.size_bytes, "model_bytes": report.source_bytes}
    print(json.dumps(steps.taken() | {"expected_ram_bytes": report.expected_ram_bytes} | sizes))
    notes.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5632)
    parser.add_argument("--only", choices=RUNS, action="append")
    parser.add_argument("--model", type=Path, help="a checkpoint: all of it, in place of one layer")
    parser.add_argument("--work", type=Path, default=Path("build/quantizers"), help="where artifacts are written")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows for a whole model")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child and a.model:
        measure_model(a.child, a.model, a.work, a.samples, a.length)
        return
    if a.child:
        measure(a.child, a.out, a.columns)
        return
    for run in a.only or RUNS:
        if a.model:
            size = {"model": a.model, "work": a.work, "samples": a.samples, "length": a.length}
            fields: dict[str, Any] = {"model": a.model.resolve().name, "samples": a.samples, "length": a.length}
        else:
            size = fields = {"out": a.out, "columns": a.columns}
        given = [part for name, value in size.items() for part in (f"--{name}", str(value))]
        told = subprocess.check_output([sys.executable, __file__, "--child", run, *given], text=True)
        method, options = RUNS[run]
        fields = fields | json.loads(told.splitlines()[-1])
        emit("quantizers", run=run, method=method, options=options, threads=1, **fields)


if __name__ == "__main__":
    main()
