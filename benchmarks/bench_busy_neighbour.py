"""What a foreign process that wants a whole core costs a decoding engine: tokens/s beside it and without it, in turns.

    python benchmarks/bench_busy_neighbour.py [ARTIFACT] [--tokens 64] [--rounds 9] [--threads 2 ...]

The neighbour spins, is pinned nowhere, and is stopped, not ended, while it is not wanted, so both states alternate
within a second. `share` is the median over rounds of the ratio within a round.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import emit
from lilliput.engine import Engine
from random_artifact import random_artifact

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("artifact", type=Path, nargs="?", help="by default random weights of 110M")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
options = parser.parse_args()

folder = options.artifact or random_artifact("110m")
engines = {threads: Engine(folder, threads=threads, context=512) for threads in options.threads}
neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
neighbour.send_signal(signal.SIGSTOP)


def speed(engine: Engine) -> float:
    """Tokens of one answer a second, prefill left out."""
    done = engine.generate([1], max_new_tokens=options.tokens, bits=options.bits)
    return len(done.tokens) / done.decode_s


try:
    found: dict[int, list[tuple[float, float]]] = {threads: [] for threads in engines}
    for round_ in range(options.rounds + 1):
        for threads, engine in engines.items():
            alone = speed(engine)
            neighbour.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            beside = speed(engine)
            neighbour.send_signal(signal.SIGSTOP)
            if round_:  # the first warms up
                found[threads].append((alone, beside))
    for threads, pairs in found.items():
        alone, beside = (statistics.median(column) for column in zip(*pairs, strict=True))
        share = statistics.median(b / a for a, b in pairs)
        fields = {"artifact": folder.name, "bits": options.bits, "threads": threads, "rounds": options.rounds}
        emit("busy_neighbour", **fields, alone_tokens_per_s=alone, beside_tokens_per_s=beside, share=share)
finally:
    neighbour.kill()
    neighbour.wait()
