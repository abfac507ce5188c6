"""Time and peak memory of the quantizers that calibrate, on one layer of a 7B-like shape with one thread.

    python benchmarks/bench_quantizers.py [--out 2048] [--columns 5632] [--only gptq-nested]

Every run is a process of its own, so its peak resident memory (ru_maxrss) is its own; it includes torch, the layer and
its Gram matrix, given as `base_rss_bytes`. Weights are normal, inputs correlated with a few loud ones.
Writes benchmarks/results/quantizers.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from harness import emit

RUNS = {
    "gptq-4": ("gptq", {"bits": [4]}),
    "gptq-nested": ("gptq", {}),
    "leanquant-4": ("leanquant", {"bits": [4]}),
    "leanquant-nested": ("leanquant", {}),
    "leanquant-tables": ("leanquant", {"bits": [2, 3, 4], "nonuniform": True}),
}


def measure(run: str, out: int, columns: int) -> None:
    """Solve one layer and print what it took."""
    import torch

    from lilliput.methods.base import LayerMethod, build
    from lilliput.methods.safety import output_errors

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
    made = method.solve(weight, gram)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    errors = {str(b): float(f"{e:.4g}") for b, e in output_errors(weight, made, gram).items()}
    print(
        json.dumps({"seconds": seconds, "cpu_s": cpu, "peak_rss_bytes": peak, "base_rss_bytes": base, "error": errors})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5632)
    parser.add_argument("--only", choices=RUNS, action="append")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child, arguments.out, arguments.columns)
        return
    for run in arguments.only or RUNS:
        size = ("--out", str(arguments.out), "--columns", str(arguments.columns))
        told = subprocess.check_output([sys.executable, __file__, "--child", run, *size], text=True)
        method, options = RUNS[run]
        fields = {"out": arguments.out, "columns": arguments.columns} | json.loads(told)
        emit("quantizers", run=run, method=method, options=options, threads=1, **fields)


if __name__ == "__main__":
    main()
