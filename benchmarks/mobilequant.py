"""Whole numbers learned, beside whole numbers read off: one model, one draw of text a seed, the integer graph measured.

    python benchmarks/mobilequant.py --model assets/tales7m --seeds 0,1,2
    python benchmarks/mobilequant.py --model stories260K/hf --calibration stories.jsonl --split 0.33 --contenders main
    python benchmarks/mobilequant.py --again        the table once more, from the recorded lines

Appends a line for each contender, width and seed to benchmarks/results/mobilequant.jsonl. docs/benchmarks.md says what
the figures mean and what they do not.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import RESULTS, emit
from lilliput.core.errors import LilliputError, QualityFailed
from lilliput.data.documents import read_documents
from lilliput.data.streams import order, windows
from lilliput.data.tokenizer import Tokenizer
from lilliput.engine import Engine
from lilliput.engine.oracle import Oracle
from lilliput.measure.memory import peak_rss_bytes
from lilliput.measure.quality import evaluate
from lilliput.measure.reference import open_original
from lilliput.pipeline import compress

NAME = "mobilequant"
TALES = Path(__file__).resolve().parents[1] / "assets" / "tales7m"
NOTHING = {"let": False, "lwc": False, "ranges": False, "rounding": "nearest"}
BOTH = {"scope": "both"}
"""The default, spelled out: what a line says of its options must not change with it."""
MAIN: dict[str, dict[str, Any]] = {
    "RTN-static": {**NOTHING, "steps": 0, "alpha": None, "rule": "minmax"},
    "SmoothQuant-static": {**NOTHING, "steps": 0, "rule": "minmax"},
    "OmniQuant-static": {"scope": "block", "ranges": False, "rounding": "nearest"},
    "MobileQuant": BOTH,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no let": {**BOTH, "let": False},
    "no lwc": {**BOTH, "lwc": False},
    "no ranges": {**BOTH, "ranges": False},
    "no roundings": {**BOTH, "rounding": "nearest"},
    "roundings swept": {**BOTH, "rounding": "swept"},
    "symmetric rows": {**BOTH, "sym": True},
    "block by block": {"scope": "block"},
    "end to end": {"scope": "end_to_end"},
    "before training": {"steps": 0},
    "end to end, no roundings": {"scope": "end_to_end", "rounding": "nearest"},
}
APART: dict[str, dict[str, Any]] = {
    "MobileQuant, 16 bits before the rotation": {**BOTH, "sites": {"*.attn.q_proj": 16, "*.attn.k_proj": 16}},
    "MobileQuant, keys of 16 bits": {**BOTH, "sites": {"*.attn.k_proj": 16, "*.attn.k": 16}},
    "MobileQuant, 5 more edges of 16 bits": {**BOTH, "budget16": 5, "usual16": True},
}
"""Not held to the constraint of the others, so never in a group. Before the rotation: `rotary16` of the recipes, in the words
of the lines that are recorded."""
CONTENDERS = MAIN | ABLATIONS | APART
GROUPS = {"main": list(MAIN), "ablations": list(ABLATIONS), "all": [*MAIN, *ABLATIONS]}
FIGURES = ("perplexity", "kl", "nll_increase", "cpu_seconds", "peak_rss_bytes")


@dataclass(frozen=True)
class Task:
    """One line of the results to come. steps: of training, where it trains; block by block, for each block."""

    contender: str
    bits: int
    seed: int
    steps: int = 300

    @property
    def options(self) -> dict[str, Any]:
        """Of `mobilequant` in the recipe."""
        rows = {"sym": False} if self.bits == 4 else {}
        return {"bits": self.bits, "seed": self.seed, "steps": self.steps, **rows, **CONTENDERS[self.contender]}

    def gave(self, line: Mapping[str, Any]) -> bool:
        """Whether a recorded line is of this task, options alike."""
        key = {"contender": self.contender, "bits": self.bits, "seed": self.seed, "options": self.options}
        return "error" not in line and key == {k: line[k] for k in key}


@dataclass(frozen=True)
class Texts:
    """Documents to calibrate on, in a file, and windows to measure on that hold nothing of them."""

    calibration: Path
    cut: list[npt.NDArray[np.int32]]


def main() -> int:
    a = arguments()
    a.work.mkdir(parents=True, exist_ok=True)
    asked = {k: getattr(a, k) for k in ("samples", "length", "window", "limit", "split", "tuning")}
    setup = digest(a.model / "model.safetensors", a.calibration, a.text, **asked)
    if not a.again:
        finished = recorded(setup) if a.resume else []
        todo = [task for task in tasks(a) if not any(map(task.gave, finished))]
        name = a.model.resolve().name if a.model.name != "hf" else a.model.resolve().parent.name
        run(a, todo, {"setup": setup, "model": name, **asked})
    lines = recorded(setup)
    print("\n" + table(lines))
    return 0 if rows(lines) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TALES, help="a folder with one model.safetensors")
    parser.add_argument("--calibration", type=Path, default=TALES / "calibration.txt")
    parser.add_argument("--text", type=Path, help="held-out text, never calibrated on; by default tales7m's")
    parser.add_argument("--split", type=float, help="measure on this last part of the calibration documents instead")
    parser.add_argument("--work", type=Path, default=Path("build/mobilequant"), help="where artifacts are written")
    parser.add_argument("--contenders", default="all", help=", ".join([*GROUPS, *CONTENDERS]) + ", with semicolons")
    parser.add_argument("--bits", default="8,4", help="of the weights; activations have 8")
    parser.add_argument("--seeds", default="0,1,2", help="of the draw of calibration rows and of their order")
    parser.add_argument("--steps", type=int, default=300, help="of training, for contenders that train")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration row")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window that is measured")
    parser.add_argument("--limit", type=int, default=160, help="windows at most, drawn over the whole text")
    parser.add_argument("--tuning", action="store_true", help="measure on as many other windows, to tune by")
    parser.add_argument("--check", type=int, default=48, help="tokens whose logits are held to the oracle's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="leave out what is recorded, options alike")
    parser.add_argument("--again", action="store_true", help="only print what is recorded for this setup")
    a = parser.parse_args()
    if (a.text is None) == (a.split is None):
        if a.text:
            parser.error("give --text or --split, not both")
        a.text = TALES / "valid.txt"
    names = [name for given in a.contenders.split(";") for name in GROUPS.get(given.strip(), [given.strip()])]
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"there is no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    a.contenders = names
    a.bits = [int(b) for b in a.bits.split(",")]
    a.seeds = [int(s) for s in a.seeds.split(",")]
    return a


def digest(*paths: Path | None, **fields: Any) -> str:
    """Twelve hex digits that change with the files' contents or the fields."""
    total = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path in paths:
        total.update(path.read_bytes() if path else b"")
    return total.hexdigest()[:12]


def tasks(a: argparse.Namespace) -> Iterator[Task]:
    """All that was asked for, every contender of the first seed before any of the second."""
    for seed in a.seeds:
        for bits in a.bits:
            for name in a.contenders:
                yield Task(name, bits, seed, a.steps)


def texts(a: argparse.Namespace) -> Texts:
    """The documents, split where asked, and windows drawn over all of what is measured on."""
    calibration, held = a.calibration, read_documents(a.text) if a.text else []
    if a.split:
        documents = read_documents(a.calibration)
        kept = len(documents) - max(1, round(a.split * len(documents)))
        calibration, held = a.work / f"calibration-{a.split:g}.jsonl", documents[kept:]
        calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:kept]), "utf-8")
    cut = windows(held, Tokenizer.open(a.model), length=a.window)
    first = a.limit if a.tuning else 0
    chosen = [cut[i] for i in sorted(order(len(cut), 0)[first : first + a.limit])]
    if not chosen:
        raise SystemExit(f"{len(cut)} windows leave none to tune by: lower --limit")
    return Texts(calibration, chosen)


def run(a: argparse.Namespace, todo: Sequence[Task], common: Mapping[str, Any]) -> None:
    """Do the tasks, one after the other, a line for each."""
    if not todo:
        return
    given = texts(a)
    original = Remembered(a.model)
    float_perplexity = evaluate(original, given.cut, bits=[None])[0].perplexity
    for task in todo:
        name = f"{task.contender}-{task.bits}-{task.seed}-{task.steps}".replace(" ", "-").replace(",", "")
        out = a.work / f"{common['setup']}-{name}"
        job = {"model": str(a.model), "out": str(out), "options": task.options, "calibration": str(given.calibration)}
        job |= {"samples": a.samples, "length": a.length, "seed": task.seed, "threads": a.threads}
        record: dict[str, Any]
        try:
            # a process of its own, whose peak is of this contender alone
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                record = pool.submit(compressed, job).result()
            row = measured(out, original, given.cut, a.check, a.threads)
            record |= row | {"original_perplexity": float_perplexity}
        except LilliputError as error:
            record = {"error": str(error)}
        shutil.rmtree(out, ignore_errors=True)
        told = {"contender": task.contender, "bits": task.bits, "seed": task.seed, "options": task.options}
        emit(NAME, **common, **told, threads=a.threads, **record)


def compressed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Make the artifact as users do; seconds, those of all threads of this process, its peak and what training said."""
    import torch

    torch.set_num_threads(job["threads"])
    out = Path(job["out"])
    for left in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)  # a run that goes on would tell only what was left to do
    start, busy = time.perf_counter(), time.process_time()
    compress(
        job["model"], out, recipe=[{"mobilequant": job["options"]}], calibration=[job["calibration"]],
        samples=job["samples"], length=job["length"], seed=job["seed"], gate=False,
    )  # fmt: skip
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    return spent | {"peak_rss_bytes": peak_rss_bytes()}


def measured(
    out: Path, original: "Remembered", cut: Sequence[npt.NDArray[np.int32]], check: int, threads: int
) -> dict[str, Any]:
    """Perplexity and KL of the artifact's integer graph. Raises QualityFailed where the oracle says other logits."""
    engine = Engine(out, activations="integer", threads=threads)
    graph = engine.artifact.integer()
    assert graph is not None, "the engine runs it"
    tokens = cut[0][:check]
    differ = int((engine.logits(tokens) != Oracle(graph).logits(tokens)).sum())
    if differ:
        what = f"{differ} logits of {len(tokens)} tokens differ from the oracle's"
        raise QualityFailed(what, where=str(out), fix="Run bench_integer.py --exact to see where")
    (row,) = evaluate(Fixed(engine), cut, bits=[0], against=original)
    return row.model_dump(exclude={"bits"}) | {"checked_tokens": len(tokens)}


class Fixed:
    """An engine of one width, whatever it is asked for: `evaluate` takes bits=None for the original."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """As `measure.quality.Runner`."""
        return self.engine.logits(tokens)


class Remembered:
    """The float model; logits of each window are computed once."""

    def __init__(self, model: Path) -> None:
        self.runner, self.kept = open_original(model), dict[bytes, npt.NDArray[np.float32]]()

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """As `measure.quality.Runner`."""
        key = tokens.tobytes()
        if key not in self.kept:
            self.kept[key] = self.runner.logits(tokens)
        return self.kept[key]


def recorded(setup: str) -> list[dict[str, Any]]:
    """Lines of this setup, the same model, texts and sizes, whose options are those that the contender has today."""
    path = RESULTS / f"{NAME}.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return [line for line in lines if line["setup"] == setup and _today(line)]


def _today(line: Mapping[str, Any]) -> bool:
    if line["contender"] not in CONTENDERS:
        return False
    now = Task(line["contender"], line["bits"], line["seed"], line["options"]["steps"])
    return bool(line["options"] == now.options)


def rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for a width, contender and number of steps: means over its seeds, the newest line of each; the least KL
    and the largest. Lines that failed are left out. Widest first, then by KL."""
    groups: dict[tuple[int, str, int], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if "error" not in line:
            key = line["bits"], line["contender"], line["options"]["steps"]
            groups.setdefault(key, {})[line["seed"]] = line
    found = []
    for (bits, contender, steps), group in groups.items():
        row: dict[str, Any] = {"bits": bits, "contender": contender, "steps": steps, "seeds": len(group)}
        for key in FIGURES:
            known = [line[key] for line in group.values() if line.get(key) is not None]
            row[key] = sum(known) / len(known) if known else None
        row["original"] = next(iter(group.values()))["original_perplexity"]
        row |= {
            f"{word}_kl": end(line["kl"] for line in group.values()) for word, end in (("least", min), ("most", max))
        }
        found.append(row)
    return sorted(found, key=lambda row: (-row["bits"], row["kl"]))


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table; the float model's perplexity stands above, what failed below."""
    found = rows(lines)
    out = [f"float model: perplexity {found[0]['original']:.3f}", ""] if found else []
    out += [
        "| | contender | steps | perplexity | above float | nll increase | KL, nats | over seeds | CPU min | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        spread = f"{row['least_kl']:.4f} .. {row['most_kl']:.4f} ({row['seeds']})" if row["seeds"] > 1 else "-"
        peak = f"{row['peak_rss_bytes'] / 2**20:.0f}" if row["peak_rss_bytes"] else "?"
        out.append(
            f"| W{row['bits']}A8 | {row['contender']} | {row['steps']} | {row['perplexity']:.3f} "
            f"| {row['perplexity'] / row['original'] - 1:+.2%} | {row['nll_increase']:.4f} | {row['kl']:.4f} | {spread} "
            f"| {row['cpu_seconds'] / 60:.2f} | {peak} |"
        )
    failed = {(x["contender"], x["bits"], x["seed"]): x["error"] for x in lines if "error" in x}
    failed = {key: why for key, why in failed.items() if not any(_same(key, x) for x in lines if "error" not in x)}
    if failed:
        out += ["", "Not run:", "", *(f"- {who}, W{b}A8, seed {s}: `{why}`" for (who, b, s), why in failed.items())]
    return "\n".join(out)


def _same(key: tuple[str, int, int], line: Mapping[str, Any]) -> bool:
    return key == (line["contender"], line["bits"], line["seed"])


if __name__ == "__main__":
    sys.exit(main())
