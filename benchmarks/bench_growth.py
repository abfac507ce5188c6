"""How speed changes with the length of the context and with the size of the batch; JSON lines, and two plots as SVG.

    python benchmarks/bench_growth.py [ARTIFACT] [--contexts 128 ...] [--batches 1 ...] [--plot docs/growth.svg]

Context: a prompt of that many tokens is read, then 16 tokens are decoded; speeds of both. Batch: tokens decoded a
second by all sequences together, 32 each after a short prompt. All caches, float, int8 and int4, or those of --kv; a
context that the memory or the artifact does not allow is left out and said so, and so is one that by the last one's
time would take longer to read than --patience.
"""

import argparse
import sys
from collections.abc import Sequence
from math import log2
from pathlib import Path

import numpy as np

from harness import emit
from lilliput.core.errors import OutOfResource
from lilliput.engine import Engine
from random_artifact import random_artifact

Series = dict[str, list[tuple[float, float]]]
COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2")


def panel(title: str, axis: str, series: Series, left: int) -> list[str]:
    """One plot of 360 x 260 at `left`: x by powers of two, y from 0, a line and dots for each series."""
    width, height, top = 270, 180, 40
    low, high = (pick(log2(x) for line in series.values() for x, _ in line) for pick in (min, max))
    most = max(y for line in series.values() for _, y in line) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + 60 + width * (log2(x) - low) / max(high - low, 1e-9),
            top + height * (1 - y / most),
        )

    out = [f'<text x="{left + 60}" y="24" font-weight="bold">{title}</text>']
    for step in range(5):
        value = most * step / 4
        _, y = at(2**low, value)
        out.append(f'<path d="M{left + 60} {y:.1f}h{width}" stroke="#8884"/>')
        out.append(
            f'<text x="{left + 54}" y="{y + 4:.1f}" text-anchor="end">{value:{".0f" if value >= 100 else ".3g"}}</text>'
        )
    for x in sorted({x for line in series.values() for x, _ in line}):
        out.append(f'<text x="{at(x, 0)[0]:.1f}" y="{top + height + 16}" text-anchor="middle">{_short(x)}</text>')
    out.append(f'<text x="{left + 60 + width / 2}" y="{top + height + 34}" text-anchor="middle">{axis}</text>')
    for n, (name, line) in enumerate(series.items()):
        points = [at(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[n]}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[n]}"/>' for x, y in points]
        out.append(f'<text x="{left + 70 + 130 * n}" y="{top + height + 54}" fill="{COLOURS[n]}">{name}</text>')
    return out


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def plot(path: Path, panels: Sequence[tuple[str, str, Series]]) -> None:
    """Write the panels side by side."""
    body = [line for n, (title, axis, series) in enumerate(panels) for line in panel(title, axis, series, 360 * n)]
    size = f'width="{360 * len(panels)}" height="290"'
    style = 'font-family="sans-serif" font-size="11" fill="#888"'
    path.write_text("\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *body, "</svg>"]) + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, nargs="?", help="by default random weights of 110M")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 512, 2048, 8192, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--kv", nargs="*", default=["float", "int8", "int4"], choices=("float", "int8", "int4"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds a prompt may take")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folder = options.artifact or random_artifact("110m")
    decode, prefill, batch = Series(), Series(), Series()
    for kv in options.kv:
        engine = Engine(folder, threads=options.threads, kv=kv)
        engine.tokenizer.eos_ids = ()  # every answer is as long as asked for
        fields = {"artifact": folder.name, "bits": options.bits, "threads": engine.threads, "kv": kv}
        rng, last, took = np.random.default_rng(0), 1, 0.0
        for context in options.contexts:
            if took * (context / last) ** 2 > options.patience:
                print(f"{context} tokens with a {kv} cache left out: beyond --patience", file=sys.stderr)
                continue
            prompt = rng.integers(0, engine.spec.vocab_size, context - 17)
            try:
                done = engine.generate(prompt, max_new_tokens=17, bits=options.bits)
            except OutOfResource as error:
                print(f"{context} tokens with a {kv} cache left out: {error}", file=sys.stderr)
                continue
            last, took = context, done.prefill_s
            speeds = (len(done.tokens) - 1) / done.decode_s, len(prompt) / done.prefill_s
            size = engine.kv_bytes(context)
            emit("growth", **fields, context=context, kv_bytes=size, decode_per_s=speeds[0], prefill_per_s=speeds[1])
            decode.setdefault(kv, []).append((context, speeds[0]))
            prefill.setdefault(kv, []).append((context, speeds[1]))
        for count in options.batches:
            prompts = [rng.integers(0, engine.spec.vocab_size, 16) for _ in range(count)]
            answers = engine.generate_batch(prompts, max_new_tokens=33, bits=options.bits)
            speed = sum(len(a.tokens) - 1 for a in answers) / max(a.decode_s for a in answers)
            emit("growth", **fields, batch=count, decode_per_s=speed)
            batch.setdefault(kv, []).append((count, speed))
    if options.plot:
        plot(options.plot, [
            ("decode, tokens/s", "tokens of context", decode),
            ("prefill, tokens/s", "tokens of context", prefill),
            ("decode, tokens/s in all", "sequences in the batch", batch),
        ])  # fmt: skip


if __name__ == "__main__":
    main()
