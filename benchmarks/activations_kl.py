"""What rounding activations to int8 costs: KL(float activations || int8 activations) at each width of an artifact.

    python benchmarks/activations_kl.py model.lilliput --text held-out.txt --limit 40

With --kv int8 or --kv int4, what rounding keys and values costs instead, activations being float on both sides. Prints
a Markdown table and appends a line a width to results/activations_kl.jsonl, or kv_kl.jsonl.
"""

import argparse
from pathlib import Path

import numpy as np

from harness import emit
from lilliput.data.documents import read_documents
from lilliput.data.streams import windows
from lilliput.engine import Engine
from lilliput.numerics.divergence import divergence, log_softmax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=40, help="windows")
    parser.add_argument("--bits", type=int, nargs="*", help="by default all")
    parser.add_argument("--documents", type=int, help="only the first ones")
    parser.add_argument("--kv", choices=["int8", "int4"], help="round keys and values, not activations")
    asked = parser.parse_args()
    exact = Engine(asked.artifact, activations="float")
    if asked.kv:
        name, kind, rounded = "kv_kl", asked.kv, Engine(asked.artifact, activations="float", kv=asked.kv)
    else:
        name, kind, rounded = "activations_kl", "int8", Engine(asked.artifact, activations="int8")
    documents = read_documents(asked.text)[: asked.documents]
    cut = windows(documents, exact.tokenizer, length=asked.length, limit=asked.limit)
    print(f"| bits | tokens | KL, nats | top-1 agreement | nll float | nll {kind} |\n|---|---|---|---|---|---|")
    rows = []
    for bits in asked.bits or exact.bits:
        kls, sames, nlls = [], [], []
        for window in cut:
            ids = np.asarray(window)
            pair = [engine.logits(ids, bits=bits)[:-1] for engine in (exact, rounded)]
            kl, same = divergence(*pair)
            kls.append(kl)
            sames.append(same)
            nlls.append([-log_softmax(said)[np.arange(len(ids) - 1), ids[1:]] for said in pair])
        kl, same = np.concatenate(kls), np.concatenate(sames)
        before, after = (float(np.concatenate([pair[n] for pair in nlls]).mean()) for n in (0, 1))
        print(f"| {bits} | {len(kl)} | {kl.mean():.2g} | {same.mean():.4f} | {before:.4f} | {after:.4f} |", flush=True)
        rows.append({"bits": bits, "tokens": len(kl), "kl": kl.mean(), "top1": same.mean(), "nll": [before, after]})
    for row in rows:
        emit(name, kind=kind, artifact=asked.artifact.name, text=asked.text.name, windows=len(cut), **row)


if __name__ == "__main__":
    main()
