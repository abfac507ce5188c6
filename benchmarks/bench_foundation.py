"""Memory and time of the path from checkpoint to running artifact, on a random Llama of 1.1 billion parameters.

    python benchmarks/bench_foundation.py --work build/foundation [--shape 1.1b] [--max-ram 2GiB]

Each figure comes from a process of its own: its peak resident memory (ru_maxrss, which counts file pages mapped as well
as memory allocated) and its wall time. This process stays small: a child's peak starts from its parent's. Writes benchmarks/results/foundation.jsonl.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import emit


def measured(what: str, *command: str, rounds: int = 1, **fields: object) -> None:
    """Run a command `rounds` times; record median wall time and largest peak of resident memory."""
    seconds, peaks = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        seconds.append(time.perf_counter() - start)
        peaks.append(usage.ru_maxrss * 1024)
    middle = sorted(seconds)[len(seconds) // 2]
    emit("foundation", what=what, seconds=middle, peak_rss_bytes=max(peaks), rounds=rounds, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="1.1b", help="as make_llama.py knows them")
    parser.add_argument("--max-ram", default="2GiB")
    parser.add_argument("--reuse", action="store_true", help="do not compress again, take the artifact that is there")
    arguments = parser.parse_args()
    model, out = arguments.work / f"llama-{arguments.shape}", arguments.work / f"{arguments.shape}.lilliput"
    if not (model / "config.json").exists():
        maker = Path(__file__).with_name("make_llama.py")
        subprocess.run([sys.executable, maker, model, "--shape", arguments.shape], check=True)
    size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    lilliput = ("-m", "lilliput")
    measured("python -c pass", "-c", "pass", rounds=7)
    measured("import lilliput", "-c", "import lilliput", rounds=7)
    measured("lilliput --help", *lilliput, "--help", rounds=7)
    limit = ("--max-ram", arguments.max_ram, "--overwrite", "--no-gate")
    if not arguments.reuse:
        measured("compress", *lilliput, "compress", str(model), "-o", str(out), *limit, model_bytes=size)
    load = "import sys, lilliput; lilliput.load(sys.argv[1])"
    measured("load", "-c", load, str(out), rounds=7, artifact_bytes=sum(p.stat().st_size for p in out.iterdir()))
    inside = (
        "import sys, time; from lilliput.engine.engine import load; t = time.perf_counter(); load(sys.argv[1]); "
        "print(time.perf_counter() - t)"
    )
    spent = [float(subprocess.check_output([sys.executable, "-c", inside, str(out)])) for _ in range(7)]
    emit("foundation", what="load, imports not counted", seconds=sorted(spent)[3], rounds=7)
    measured("verify", *lilliput, "verify", str(out))


if __name__ == "__main__":
    main()
