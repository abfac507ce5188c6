"""What to buy with more bits a weight around 2 bits: outliers in half precision, smaller groups, or wider layers?

    python benchmarks/outliers_or_groups.py MODEL --text calibration.txt

Every linear layer of the blocks is coded in ways that cost the same bits a weight: groups of a size; a share of the
weights, those with the largest error, kept as a float16 and a 16-bit column (row pointers are not counted); or a share
of the layers at 3 bits in groups of 128. Two ways to make the codes: `nested`, the top bits of an 8-bit code with a
refitted grid, and `alone`, a grid of its own fitted by turns with its codes, squared errors weighted by the inputs'
second moments. With `nested`, outliers serve the 2-bit width only (`2`) or all widths, so that the 8-bit grid need not
reach them (`all`).

Error of a layer: tr(E H E^T) / tr(W H W^T), H the Gram matrix of its inputs in the float model. Prints the mean over
all layers and appends it to results/outliers_or_groups.jsonl. For wider layers it is the mean that a random choice of
them has; a choice by measured loss does better.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from harness import emit
from lilliput.data.documents import read_documents
from lilliput.data.streams import batches
from lilliput.data.tokenizer import Tokenizer
from lilliput.methods.sweep import watching
from lilliput.models import Checkpoint, load_decoder
from lilliput.numerics.grids import Refit, encode, minmax_grid, nearest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Gram

GRID_BITS = 32
"""Scale and zero of a group."""
OUTLIER_BITS = 32
"""Value and column of an outlier."""
ROUNDS = 8
BUDGETS = {2.25: (128, 256), 2.5: (64, 128), 2.67: (48, 64, 128), 3.0: (32, 64, 128)}
"""Bits a weight to the group sizes that leave something of them for outliers, or just nothing."""
WIDER = 128
"""Group size where some layers are wider."""


def nested(weight: Tensor, bits: int, group_size: int, moment: Tensor) -> Tensor:
    """A narrow width of codes of 8 bits."""
    return nearest(weight, (bits, 8), group_size, sym=False).dequantize(bits)


def alone(weight: Tensor, bits: int, group_size: int, moment: Tensor) -> Tensor:
    """A grid and its codes, improved by turns."""
    scale, zero = minmax_grid(weight, bits, group_size, sym=False)
    fit = Refit(weight, group_size, moment)
    for _ in range(ROUNDS):
        codes = encode(weight, scale, zero, bits, group_size)
        scale, zero = fit.grid(codes, bits, sym=False)
    codes = encode(weight, scale, zero, bits, group_size)
    return Quantized(codes, (bits,), group_size, {bits: scale}, {} if zero is None else {bits: zero}).dequantize(bits)


CODERS: dict[str, Callable[[Tensor, int, int, Tensor], Tensor]] = {"nested": nested, "alone": alone}


def at_width(coder: Callable[[Tensor, int, int, Tensor], Tensor], bits: int, weight: Tensor, gram: Tensor) -> Tensor:
    """The matrix at one width in groups of WIDER."""
    return coder(weight, bits, WIDER, gram.diagonal())


def with_outliers(weight: Tensor, group_size: int, gram: Tensor, count: int, codes: str, reach: bool) -> Tensor:
    """The matrix at 2 bits with `count` weights exact: those of the largest squared error times the input's moment.

    reach: the codes reach the outliers as well, because a wider width needs them.
    """
    moment, exact, coder = gram.diagonal(), weight.flatten().half().float(), CODERS[codes]
    made = coder(weight, 2, group_size, moment)
    if not count:
        return made
    chosen = ((weight - made).square() * moment).flatten().topk(count).indices
    for _ in range(0 if reach else 3):  # a weight that is exact may have the code of whatever stands there now
        eased = weight.flatten().scatter(0, chosen, made.flatten()[chosen]).view_as(weight)
        made = coder(eased, 2, group_size, moment)
        chosen = ((weight - made).square() * moment).flatten().topk(count).indices
    return made.flatten().scatter(0, chosen, exact[chosen]).view_as(weight)


def error(weight: Tensor, made: Tensor, gram: Tensor) -> float:
    """Relative squared error of the layer's output."""
    lost = weight - made
    return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=24, help="rows of 256 tokens")
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    with TemporaryDirectory() as folder:
        checkpoint.export_tokenizer(Path(folder))
        tokenizer = Tokenizer.open(Path(folder))
    rows = batches(read_documents(asked.text), tokenizer, length=256, samples=asked.samples, batch_size=4)
    decoder = load_decoder(checkpoint)
    linears = {n: m for block in decoder.blocks for n, m in block.linears().items()}  # type: ignore[operator,union-attr]
    grams = {name: Gram(linear.in_features) for name, linear in linears.items()}
    with torch.no_grad(), watching(linears, grams):
        for batch in rows:
            decoder(torch.tensor(batch, dtype=torch.int64))
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    print("| bits | codes | bought | error |\n|---|---|---|---|")

    def tell(budget: float, codes: str, bought: str, found: float) -> None:
        print(f"| {budget} | {codes} | {bought} | {found:.4f} |", flush=True)
        told = {"model": asked.model.name, "tokens": asked.samples * 256, "bits": budget, "codes": codes}
        emit("outliers_or_groups", **told, bought=bought, error=found)

    def mean(make: Callable[[Tensor, Tensor], Tensor]) -> float:
        found = [error(w, make(w, grams[n].value()), grams[n].value()) for n, w in weights.items()]
        return sum(found) / len(found)

    for codes, coder in CODERS.items():
        two, three = (mean(partial(at_width, coder, b)) for b in (2, 3))
        for budget, sizes in BUDGETS.items():
            for size in sizes:
                share = max(0.0, budget - 2 - GRID_BITS / size) / OUTLIER_BITS
                for reach in (True, False) if share > 1e-3 and codes == "nested" else (False,):
                    count = share if share > 1e-3 else 0
                    found = mean(lambda w, h: with_outliers(w, size, h, int(count * w.numel()), codes, reach))  # noqa: B023
                    bought = f"{share:.2%} outliers{' at 2 bits only' if reach else ''}, " if count else ""
                    tell(budget, codes, f"{bought}groups of {size}", found)
            share = budget - 2 - GRID_BITS / WIDER
            if share > 0:
                mixed = share * three + (1 - share) * two
                tell(budget, codes, f"{share:.0%} of layers at 3 bits, groups of {WIDER}", mixed)


if __name__ == "__main__":
    main()
