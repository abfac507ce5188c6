"""Lilliput beside llama.cpp, ONNX Runtime and OpenVINO: the same shapes, tokens and threads, turn by turn.

    python benchmarks/vs_llama_cpp.py --env peers --work build/vs --shapes 110m,1.1b --rounds 5
    python benchmarks/vs_llama_cpp.py --again 3f2a9c     print a run's tables from the results, measure nothing

Appends a line for each contender of each round to benchmarks/results/vs_llama_cpp.jsonl. docs/benchmarks.md says what
the figures mean and what they do not.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, emit
from lilliput.engine import native
from lilliput.measure import memory
from lilliput.measure.environment import ForeignLoad, cores
from peers import install, models, table
from peers.turns import turn

NAME = "vs_llama_cpp"
HERE = Path(__file__).parent / "peers"
KINDS = ("q4_0", "q8_0", "q3_k_m", "q2_k")
WORKERS = {"llama.cpp": "run_llama_cpp.py", "onnxruntime": "run_onnxruntime.py", "openvino": "run_openvino.py"}
CONTROL = "native.read_bandwidth, 256 MiB"


def main() -> int:
    a = arguments()
    if a.again:
        print(table.text(recorded(a.again)))
        return 0
    peers = [p for p in a.peers.split(",") if p]
    python, absent = install.prepare(a.env, peers, a.jobs)
    peers = [p for p in peers if p not in absent]
    run = secrets.token_hex(3)
    common = {"run": run, "threads": a.threads, "peer_versions": install.versions(python)}
    records = []
    for shape in a.shapes.split(","):  # one after the other: what is compared is never far apart in time
        contenders, missing = prepare(a, shape, peers, python)
        absent |= missing
        for number in range(-a.warm_up, a.rounds):
            for job in turn(contenders, number):
                record = measured(a, job)
                if "error" in record:
                    absent[f"{shape} {record['contender']}"] = record["error"]
                    contenders = [c for c in contenders if c is not job]
                elif number >= 0:
                    records.append(emit(NAME, round=number, **common, **record))
    print(f"\nrun {run}\n\n{table.text(records, absent)}")
    return 0 if records else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", type=Path, default=Path("build/peers"), help="environment of the peers, made if absent"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/vs"), help="where models are written, kept between runs"
    )
    parser.add_argument("--shapes", default="110m,1.1b", help=f"of {', '.join(models.SHAPES)}")
    parser.add_argument("--peers", default=",".join(install.IMPORTS), help=f"of {', '.join(install.IMPORTS)}")
    parser.add_argument("--kinds", help=f"of {', '.join(KINDS)}; all, or q4_0 where 8 bits are left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that are not recorded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--sym", action="store_true", help="an artifact without zeros; the default recipe has them")
    parser.add_argument("--foreign", type=float, default=0.06, help="share of the cores others may take in a round")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one contender of one round")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once for llama.cpp")
    parser.add_argument("--again", metavar="RUN", help="print this run's tables once more")
    a = parser.parse_args()
    for shape in a.shapes.split(","):
        if shape not in models.SHAPES:
            parser.error(f"there is no shape {shape}; there are {', '.join(models.SHAPES)}")
    for kind in filter(None, (a.kinds or "").split(",")):
        if kind not in KINDS:
            parser.error(f"there is no kind {kind}; there are {', '.join(KINDS)}")
    for peer in filter(None, a.peers.split(",")):
        if peer not in install.IMPORTS:
            parser.error(f"there is no peer {peer}; there are {', '.join(install.IMPORTS)}")
    return a


def prepare(
    a: argparse.Namespace, name: str, peers: Sequence[str], python: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write what is missing of a shape. Returns its contenders, and {contender: why it is not there}."""
    shape = models.SHAPES[name]
    large = models.parameters(shape) > models.LARGE  # at 8 bits it would not fit where these benchmarks are at home
    bits = tuple(b for b in models.LADDER if b <= 4) if large else models.LADDER
    widths = (4,) if large else (8, 4)
    kinds = (a.kinds.split(",") if a.kinds else ["q4_0"] if large else list(KINDS)) if "llama.cpp" in peers else []
    blocked = [peer for peer in peers if peer in models.WRITERS]
    a.work.mkdir(parents=True, exist_ok=True)
    artifact = a.work / f"{name}{'-sym' if a.sym else ''}.lilliput"
    files = [artifact, *(a.work / f"{name}-gguf" / f"{kind}.json" for kind in kinds)]
    files += [a.work / f"{name}-{peer}" / f"int{width}.json" for peer in blocked for width in widths]
    free = None if all(file.exists() for file in files) else shutil.disk_usage(a.work).free
    needed = [*kinds, *(f"{peer} int{width}" for peer in blocked for width in widths)]
    if reason := models.reason_not_to(shape, needed, bits, free, memory.available_bytes()):
        return [], {name: reason}
    if not artifact.exists():
        print(f"writing {artifact}", file=sys.stderr)
        models.write_artifact(artifact, shape, bits, sym=a.sym)
    job = {"shape": name, "vocab": shape["vocab"]}
    ours = {"command": [sys.executable, HERE / "run_lilliput.py"], "path": str(artifact)}
    found = [
        job | ours | {"contender": f"lilliput {b}", "bits": b, "facts": {"head": f"{max(b, 4)} bits", "sym": a.sym}}
        for b in sorted(bits, reverse=True)
    ]
    absent = {f"{name} at 8 bits": f"left out above {models.LARGE / 1e9:g} billion weights"} if large else {}
    theirs = {"llama.cpp": models.write_gguf(python, a.work / f"{name}-gguf", shape, kinds, a.threads)} if kinds else {}
    theirs |= {p: models.write_blocks(python, p, a.work / f"{name}-{p}", shape, widths) for p in blocked}
    for peer, written in theirs.items():
        for kind, facts in written.items():
            contender = f"{peer} {kind}"
            if "error" in facts:
                absent[f"{name} {contender}"] = facts["error"]
                continue
            worker = {"command": [python, HERE / WORKERS[peer]], "path": facts["path"], "contender": contender}
            found.append(job | worker | {"facts": {k: v for k, v in facts.items() if k != "path"}})
    return found, absent


def measured(a: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """One contender in a process of its own, plain reads before and after; {"error"} where it fails."""
    who = {"shape": job["shape"], "contender": job["contender"]}
    options = {k: getattr(a, k) for k in ("threads", "prefill_tokens", "prompt_tokens", "new_tokens")}
    asked = json.dumps(options | {k: job[k] for k in ("path", "vocab", "bits") if k in job})
    load = ForeignLoad()  # over the control too: what disturbs it would bend the share of it
    before, start = native.read_bandwidth(1 << 28, a.threads), time.perf_counter()
    try:
        # every runtime takes the number of threads as an argument; a value left in the environment must not change it
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "GGML_", "ORT_", "OV_"))
        }
        done = subprocess.run([*job["command"], asked], capture_output=True, text=True, timeout=a.timeout, env=clean)
    except subprocess.TimeoutExpired:
        return who | {"error": f"not done after {a.timeout:g} s"}
    seconds = time.perf_counter() - start
    if done.returncode:
        return who | {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    after = native.read_bandwidth(1 << 28, a.threads)
    foreign = load.cores()
    record = {
        **who,
        **{k: options[k] for k in ("prefill_tokens", "prompt_tokens", "new_tokens")},
        **job["facts"],
        **json.loads(done.stdout.splitlines()[-1]),
        "bandwidth_bytes_per_s": (before + after) / 2 * 1e9,
        "bandwidth_control": CONTROL,
        "wall_s": seconds,
        "foreign_cores_in_round": foreign,
        "disturbed": foreign is None or foreign > a.foreign * cores(),
    }
    return record | {"share_of_bandwidth": table.share_of_bandwidth(record)}


def recorded(run: str) -> list[dict[str, Any]]:
    """Lines of a run, by the start of its name; the last run's where that is "last"."""
    lines = [json.loads(line) for line in (RESULTS / f"{NAME}.jsonl").read_text(encoding="utf-8").splitlines()]
    run = lines[-1]["run"] if run == "last" else run
    return [line for line in lines if line["run"].startswith(run)]


if __name__ == "__main__":
    sys.exit(main())
