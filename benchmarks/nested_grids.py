"""What a grid that all widths share costs: KL to the original at every width, beside grids of their own.

    python benchmarks/nested_grids.py --model assets/tales7m --text valid.jsonl.gz --bits 2,3,4 --steps 60

Matrices of the blocks are solved one by one under the Gram matrix that their inputs have in the original model, so
nothing but the grids differs; with --steps each answer is also trained by `tune`.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call

from harness import emit
from lilliput.core.progress import Silent
from lilliput.data.documents import read_documents
from lilliput.data.streams import Batches, batches, order, windows
from lilliput.data.tokenizer import Tokenizer
from lilliput.measure.quality import evaluate
from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.quantize.rtn import RTN
from lilliput.methods.quantize.tune import Tune
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Gram

TALES = Path(__file__).resolve().parents[1] / "assets" / "tales7m"


class Runner:
    """The decoder with some of its matrices in the place of others."""

    def __init__(self, decoder: Decoder, weights: Mapping[str, Tensor]) -> None:
        self.decoder, self.weights = decoder, weights

    @torch.no_grad()
    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """As `measure.quality.Runner`; the width is that of the weights."""
        rows = torch.from_numpy(tokens.astype(np.int64))[None]
        found: npt.NDArray[np.float32] = functional_call(self.decoder, dict(self.weights), (rows,))[0].numpy()
        return found


def grams(decoder: Decoder, data: Batches) -> dict[str, Tensor]:
    """Sums of x x^T of the inputs of every matrix of the blocks."""
    sums, hooks = {}, []
    for block in decoder.blocks:
        for name, linear in block.linears().items():  # type: ignore[operator]
            sums[name] = Gram(linear.in_features)
            hooks.append(
                linear.register_forward_pre_hook(lambda _, given, s=sums[name]: s.add(given[0].flatten(0, -2)))
            )
    with torch.inference_mode():
        for rows in data:
            decoder(torch.from_numpy(rows.astype(np.int64)))
    for hook in hooks:
        hook.remove()
    return {name: one.value().clone() for name, one in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TALES)
    parser.add_argument("--calibration", type=Path, default=TALES / "calibration.txt")
    parser.add_argument("--text", type=Path, default=TALES / "valid.txt", help="held-out text")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="of gptq")
    parser.add_argument("--balance", type=float, default=0.6, help="of gptq: 0 for the narrowest, 1 for each alike")
    parser.add_argument("--steps", type=int, default=0, help="of tune; 0 for none")
    parser.add_argument("--limit", type=int, default=48, help="windows of 256 tokens")
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--grids", default="own,shared")
    a = parser.parse_args()
    bits = tuple(map(int, a.bits.split(",")))
    decoder = load_decoder(Checkpoint.open(a.model)).eval().requires_grad_(False)
    tokenizer = Tokenizer.open(a.model)
    data = batches(read_documents(a.calibration), tokenizer, length=256, samples=128)
    cut = windows(read_documents(a.text), tokenizer, length=256)
    cut = [cut[i] for i in sorted(order(len(cut), 0)[: a.limit])]
    inputs, weights = grams(decoder, data), decoder.state_dict()
    for name in a.methods.split(","):
        for grids in a.grids.split(","):
            common = {"bits": bits, "group_size": a.group_size, "ragged": True, "shared": grids == "shared"}
            method = GPTQ(**common, rounds=a.rounds, balance=a.balance) if name == "gptq" else RTN(**common)
            made = {n: method.solve(weights[f"{n}.weight"].float(), gram) for n, gram in inputs.items()}
            told = {"model": a.model.resolve().name, "method": name, "grids": grids, "group_size": a.group_size}
            told |= {"rounds": a.rounds, "balance": a.balance}
            report(decoder, made, cut, told | {"steps": 0})
            if a.steps:
                with tempfile.TemporaryDirectory() as folder:
                    torch.manual_seed(0)
                    tuner = Tune(steps=a.steps, written=False)
                    made = tuner.tune(decoder, decoder, made, data, Path(folder), Silent(), bits)
                report(decoder, made, cut, told | {"steps": a.steps})


def report(
    decoder: Decoder, made: Mapping[str, Quantized], cut: list[npt.NDArray[np.int32]], told: Mapping[str, object]
) -> None:
    """A line for every width."""
    original = Runner(decoder, {})
    for b in next(iter(made.values())).bits:
        runner = Runner(decoder, {f"{n}.weight": q.dequantize(b) for n, q in made.items()})
        (row,) = evaluate(runner, cut, bits=[b], against=original)
        emit("nested_grids", **told, bits=b, ladder=list(next(iter(made.values())).bits), kl=row.kl)


if __name__ == "__main__":
    main()
