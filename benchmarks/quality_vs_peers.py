"""Quality beside other quantizers: one model, one draw of calibration text, one group size, one evaluator for all.

    python benchmarks/quality_vs_peers.py --env build/quality-env --work build/quality --methods all --seeds 0,1,2
    python benchmarks/quality_vs_peers.py --again        the table and the plot once more, from the recorded lines
    python benchmarks/quality_vs_peers.py --again --beside auto-round    and every KL in parts of that contender's

Appends a line for each contender, width and seed to benchmarks/results/quality_vs_peers.jsonl. docs/benchmarks.md says
what the figures mean and what they do not.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from harness import RESULTS, emit
from peers.quality import environments, model, report
from peers.quality.accounting import bits_per_weight
from peers.quality.contenders import CONTENDERS, OURS, Contender

NAME = "quality_vs_peers"
ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent / "peers" / "quality"
TALES = ROOT / "assets" / "tales7m"


@dataclass(frozen=True)
class Task:
    """One line of the results to come. seed: None where nothing is drawn. steps: of training, where it trains."""

    name: str
    contender: Contender
    bits: int
    seed: int | None
    steps: int = 60

    @property
    def key(self) -> dict[str, Any]:
        return {"contender": self.name, "bits": self.bits, "seed": self.seed}

    @property
    def options(self) -> dict[str, Any]:
        given = {**self.contender.options, **self.contender.widths.get(self.bits, {})}
        return dict(json.loads(json.dumps(given).replace('"$steps"', str(self.steps))))

    def gave(self, line: Mapping[str, Any]) -> bool:
        """Whether a recorded line is of this task; the oldest lines do not say their options."""
        return self.key == {k: line[k] for k in self.key} and line.get("options", self.options) == self.options


def main() -> int:
    a = arguments()
    a.work.mkdir(parents=True, exist_ok=True)
    folder = model.prepare(a.model, a.work / "model")
    asked = {k: getattr(a, k) for k in ("length", "samples", "group_size", "window", "limit")}
    setup = model.digest(folder / "model.safetensors", a.calibration, a.text, **asked)
    if not a.again:
        finished = done(setup) if a.resume else []
        todo = [t for t in tasks(a) if not any(map(t.gave, finished))]
        run(a, folder, todo, {"setup": setup, "model": a.model.resolve().name, **asked})
    lines = [line for line in recorded(setup) if meant(line)]
    print("\n" + report.table(lines))
    if a.beside:
        print("\n" + "\n".join(report.beside(report.rows(lines), a.beside)))
    if a.plot and report.rows(lines):
        report.plot(a.plot, lines)
    return 0 if report.rows(lines) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path("build/quality-env"), help="environments of the peers")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where models are written")
    parser.add_argument("--model", type=Path, default=TALES, help="a Llama in one safetensors file")
    parser.add_argument("--calibration", type=Path, default=TALES / "calibration.txt")
    parser.add_argument("--text", type=Path, default=TALES / "valid.txt", help="held-out text, never calibrated on")
    parser.add_argument("--methods", default="all", help="contenders or peers, with commas: " + ", ".join(CONTENDERS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--seeds", default="0,1,2", help="of the draw of calibration text")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="of training, for contenders of ours that train")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration row")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window that is measured")
    parser.add_argument("--limit", type=int, help="windows at most, drawn over the whole text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one contender at one width")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what is recorded for this setup, options alike"
    )
    parser.add_argument("--no-install", action="store_true", help="peers that are not there are reported as such")
    parser.add_argument("--again", action="store_true", help="only print and plot what is recorded for this setup")
    parser.add_argument("--beside", choices=list(CONTENDERS), metavar="CONTENDER", help="compare all with this one")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quality.svg")
    a = parser.parse_args()
    names = list(CONTENDERS) if a.methods == "all" else [n.strip() for n in a.methods.split(",")]
    unknown = [n for n in names if n not in CONTENDERS and n not in {c.peer for c in CONTENDERS.values()}]
    if unknown:
        parser.error(f"there is no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    a.methods = [n for n, c in CONTENDERS.items() if n in names or c.peer in names]
    a.bits = [int(b) for b in a.bits.split(",")]
    a.seeds = [int(s) for s in a.seeds.split(",")]
    return a


def tasks(a: argparse.Namespace) -> Iterator[Task]:
    """All that was asked for, every contender of the first seed before any of the second."""
    for n, seed in enumerate(a.seeds):
        for name in a.methods:
            contender = CONTENDERS[name]
            if contender.learns or n == 0:
                for bits in a.bits:
                    yield Task(name, contender, bits, seed if contender.learns else None, a.steps)


def run(a: argparse.Namespace, folder: Path, todo: list[Task], common: dict[str, Any]) -> None:
    """Do the tasks, one after the other, a line for each."""
    if not todo:
        return
    cut = model.held_out(folder, a.text, length=a.window, limit=a.limit)
    original = model.Remembered(model.open_original(folder))
    perplexity = model.perplexity(original, cut)
    weights = {name: value.numel() for name, value in load_file(folder / "model.safetensors").items()}
    shutil.rmtree(a.work / "shared", ignore_errors=True)
    pythons: dict[str, tuple[Path, str | None]] = {OURS: (Path(sys.executable), None)}
    for task in todo:
        peer = task.contender.peer
        if peer not in pythons:
            print(f"the environment of {peer}", file=sys.stderr)
            pythons[peer] = environments.prepare(a.env, peer, install=not a.no_install)
        python, problem = pythons[peer]
        if task.bits not in task.contender.widths:
            problem = "the peer has no such width"
        out = a.work / "answers" / f"{task.name.replace(' ', '-')}-{task.bits}-{task.seed}"
        record: dict[str, Any] = {"error": problem} if problem else quantized(a, folder, task, python, out)
        if "error" not in record:
            try:
                bits = bits_per_weight(record.pop("stored"), weights)
                given = load_file(out / "weights.safetensors")
                row, alone = model.measure(model.assemble(folder, given, out / "model"), original, cut)
                record |= {"linear_bits": bits.linears, "model_bits": bits.model, "original_perplexity": perplexity}
                record |= row.model_dump(exclude={"bits"}, exclude_none=True) | {"kl_windows": alone}
            except (ValueError, model.LilliputError) as error:
                record = {"error": str(error)}
        shutil.rmtree(out, ignore_errors=True)
        emit(NAME, **common, **task.key, peer=peer, options=task.options, threads=a.threads, **record)


def quantized(a: argparse.Namespace, folder: Path, task: Task, python: Path, out: Path) -> dict[str, Any]:
    """One contender in a process of its own; {"error"} where it fails, with the line that says why."""
    seed = task.seed or 0
    out.mkdir(parents=True, exist_ok=True)
    tokens = out / "calibration.npy"
    data = model.calibration(folder, a.calibration, length=a.length, samples=a.samples, seed=seed)
    np.save(tokens, data.rows)
    squares = a.work / f"importance-{model.digest(folder / 'model.safetensors', tokens=data.sha256)}.npz"
    if task.options.get("importance") and not squares.exists():
        np.savez(squares, **model.importance(folder, data))
    keep = out if not task.options.get("shared") else a.work / "shared" / f"{task.name.replace(' ', '-')}-{seed}"
    keep.mkdir(parents=True, exist_ok=True)
    draw = {"text": str(a.calibration.resolve()), "length": a.length, "samples": a.samples, "sha256": data.sha256}
    job = {
        "model": str(folder.resolve()),
        "calibration": str(tokens.resolve()),
        "importance": str(squares.resolve()),
        "draw": draw,
        "bits": task.bits,
        "group_size": a.group_size,
        "seed": seed,
        "threads": a.threads,
        "options": task.options,
        "keep": str(keep.resolve()),
        "out": str(out.resolve()),
    }
    # peers look at the hub and at GPUs when they start; neither is to decide what comes out
    env = os.environ | {"OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = a.work / "logs" / f"{out.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        try:
            command = [str(python), str(HERE / task.contender.worker), json.dumps(job)]
            ended = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=said, text=True, timeout=a.timeout, env=env, cwd=out
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {a.timeout:g} s"}
    if ended.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        return {"error": environments.last_error(text) if text.strip() else f"ended with {ended.returncode}"}
    return {"calibration_sha256": data.sha256, **json.loads(ended.stdout.splitlines()[-1])}


def recorded(setup: str) -> list[dict[str, Any]]:
    """Lines of this setup: the same model, texts and sizes."""
    path = RESULTS / f"{NAME}.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return [line for line in lines if line["setup"] == setup]


def meant(line: Mapping[str, Any]) -> bool:
    """Whether a line is of what its contender's name means today, whatever its steps; the oldest do not say."""
    contender = CONTENDERS.get(line["contender"])
    if contender is None or "options" not in line:
        return contender is not None
    task = Task(line["contender"], contender, line["bits"], line["seed"])
    said, means = (re.sub(r'"steps": [^,}]*', "", json.dumps(each)) for each in (line["options"], task.options))
    return said == means


def done(setup: str) -> list[dict[str, Any]]:
    """What is finished for this setup; what failed is tried again."""
    return [line for line in report.newest(recorded(setup)) if "error" not in line]


if __name__ == "__main__":
    sys.exit(main())
