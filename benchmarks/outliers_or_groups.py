"""What to buy with more bits a weight around 2: outliers in half precision, smaller groups, or wider layers?

    python benchmarks/outliers_or_groups.py MODEL --text calibration.txt [--every 5]

Every linear layer of the blocks, or every so many, is coded by `gptq`: in groups of a size, with a share of the weights
as outliers; alone at 2 bits, or nested in 4 with a shared grid. Bits a weight are of all that is stored for 2 bits.
Error of a layer: tr(E H E^T) / tr(W H W^T), H the Gram matrix of its inputs in the float model. The last two columns say what
as many bits buy without outliers: in smaller groups, between the sizes measured here by the line through logarithms of
their errors, and in wider layers, a share of layers at 3 bits in groups of 128, the mean that a random choice of them has; a choice
by measured loss does better. Prints a table and appends it to results/outliers_or_groups.jsonl.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from harness import emit
from lilliput.artifact.plan import stored_bytes
from lilliput.core.spec import PADDING, EncoderSpec
from lilliput.data.documents import read_documents
from lilliput.data.streams import batches, sentences
from lilliput.data.tokenizer import Tokenizer
from lilliput.methods.outliers import solve
from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.safety import output_errors
from lilliput.methods.sweep import watching
from lilliput.models import Checkpoint, load_decoder, load_encoder
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Gram
from lilliput.pipeline.plan import entry_of

LADDERS = {"alone": (2,), "nested in 4": (2, 3, 4)}
SIZES = (-1, 256, 128, 64, 32)
SHARES = (0.0, 0.0025, 0.005, 0.0125)
WIDER = 128
"""Group size where some layers are wider."""

Layers = dict[str, tuple[Tensor, Tensor]]
Found = dict[tuple[int, float], tuple[float, float]]
"""Bits a weight and mean error, by group size and share."""


def layers_of(model: Path, text: Path, samples: int, every: int) -> tuple[Layers, int]:
    """Weight and Gram matrix of some layers by name, and how many tokens the latter are of."""
    checkpoint = Checkpoint.open(model)
    with TemporaryDirectory() as folder:
        checkpoint.export_tokenizer(Path(folder))
        tokenizer = Tokenizer.open(Path(folder))
    encodes = isinstance(checkpoint.spec, EncoderSpec)
    draw = sentences if encodes else batches
    rows = draw(read_documents(text), tokenizer, length=256, samples=samples, batch_size=4)
    whole = (load_encoder if encodes else load_decoder)(checkpoint)
    named = [pair for block in whole.blocks for pair in block.linears().items()]  # type: ignore[operator,union-attr]
    linears = dict(named[::every])
    grams = {name: Gram(linear.in_features) for name, linear in linears.items()}
    with torch.no_grad(), watching(linears, grams):
        for batch in rows:
            whole(torch.tensor(batch, dtype=torch.int64))
    found = {name: (linear.weight.detach().float(), grams[name].value()) for name, linear in linears.items()}
    return found, sum(int((batch != PADDING).sum()) for batch in rows)


def measure(layers: Layers, method: GPTQ) -> tuple[float, float]:
    """Bits a weight at the narrowest width, and the mean error there."""
    bits, stored, weights, errors = method.bits[0], 0, 0, []
    for weight, gram in layers.values():
        made = solve(method, weight, gram)
        assert isinstance(made, Quantized)
        out, columns = weight.shape
        stored += stored_bytes(entry_of((out, columns), method), bits)
        weights += weight.numel()
        errors.append(output_errors(weight, made, gram)[bits])
    return 8 * stored / weights, sum(errors) / len(errors)


def by_groups(found: Found, bits: float) -> float:
    """The error that so many bits a weight come to in smaller groups, without outliers; NaN beyond those measured."""
    plain = sorted(value for (_, share), value in found.items() if not share)
    for (low, more), (high, less) in pairwise(plain):
        if low <= bits <= high:
            part = (bits - low) / (high - low)
            return math.exp((1 - part) * math.log(more) + part * math.log(less))
    return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=24, help="rows of 256 tokens; lines, for a sentence encoder")
    parser.add_argument("--every", type=int, default=1, help="take one layer of so many")
    asked = parser.parse_args()
    layers, tokens = layers_of(asked.model, asked.text, asked.samples, asked.every)
    print("| codes | groups of | outliers | bits | error | smaller groups | wider layers |")
    print("|---|---|---|---|---|---|---|")
    for codes, ladder in LADDERS.items():
        found: Found = {}
        for size in SIZES:
            for share in SHARES:
                method = GPTQ(bits=ladder, group_size=size, ragged=True, shared=True, outliers=share)
                found[size, share] = measure(layers, method)
        low, more = found[WIDER, 0.0]
        high, less = measure(layers, GPTQ(bits=(3,), group_size=WIDER, ragged=True))
        for (size, share), (bits, error) in found.items():
            rivals = by_groups(found, bits), more + (bits - low) / (high - low) * (less - more)
            print(f"| {codes} | {size} | {share:.2%} | {bits:.3f} | {error:.4f} | {rivals[0]:.4f} | {rivals[1]:.4f} |")
            told = {"model": asked.model.name, "tokens": tokens, "layers": len(layers), "codes": codes}
            values = {"bits": bits, "error": error, "smaller_groups": rivals[0], "wider_layers": rivals[1]}
            emit("outliers_or_groups", **told, group_size=size, outliers=share, **values)


if __name__ == "__main__":
    main()
