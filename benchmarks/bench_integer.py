"""The integer graph against int8 and float activations on one and the same matrices, and against its oracle.

    python benchmarks/bench_integer.py --shape 110m --bits 8
    python benchmarks/bench_integer.py --exact 10000 --shape 7m
    python benchmarks/bench_integer.py --artifact tales7m.lilliput

Speed: each round answers one prompt with each kind of activations in turn, so that a ratio sees one state of the machine;
tokens a second of the prefill and of the tokens after it, medians over the rounds. Weights are random and ranges those
of a short text, which changes no time. Exactness: windows of tokens through every instruction set of this machine, whole
and token by token, every code of every edge held to the oracle's. `--artifact` takes one with an integer graph instead.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from harness import emit
from lilliput.artifact.integer import IntegerModel
from lilliput.artifact.read import Artifact
from lilliput.engine import Sampling, native
from lilliput.engine.oracle import Oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

WINDOW = 250
SHAPES: dict[str, dict[str, int]] = {
    "7m": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
           "num_key_value_heads": 6, "vocab_size": 4096},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32000},
    "1b-quarter": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 32,
                   "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip


def random_model(shape: str, bits: int) -> IntegerModel:
    """A Llama of random weights with the ranges that a few random tokens have."""
    from support.integers import integer_model, some_tokens, tiny_decoder

    with tempfile.TemporaryDirectory() as folder:
        decoder = tiny_decoder(Path(folder), "llama", max_position_embeddings=2048, **SHAPES[shape])
        return integer_model(decoder, some_tokens(48, vocab=SHAPES[shape]["vocab_size"]), bits)


def stored_model(path: Path) -> IntegerModel:
    """The integer graph of an artifact."""
    model = Artifact.open(path).integer()
    if model is None:
        raise SystemExit(f"{path} has no integer graph")
    return model


def speed(model: IntegerModel, name: str, threads: int, rounds: int, prompt: int, answer: int) -> None:
    """Emit tokens a second of each kind of activations, interleaved."""
    runners: dict[str, native.Model | native.IntegerModel] = {
        "integer": native.IntegerModel(model, threads=threads),
        "int8": native.Model(model.spec, model.floats, model.linears, threads=threads, activations="int8"),
        "float": native.Model(model.spec, model.floats, model.linears, threads=threads, activations="float"),
    }
    tokens = np.random.default_rng(0).integers(3, model.spec.vocab_size, prompt).tolist()
    seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in runners}
    for index in range(rounds + 1):
        for kind, runner in runners.items():
            _, _, prefill_s, decode_s = runner.generate(
                [tokens],
                bits=model.bits,
                max_new_tokens=answer,
                context=prompt + answer,
                eos=(),
                sampling=Sampling(),
            )[0]
            if index:  # the first round warms up
                seen[kind].append((prompt / prefill_s, (answer - 1) / decode_s))
    row = {"model": name, "bits": model.bits, "threads": threads, "rounds": rounds, "prompt": prompt, "answer": answer}
    for kind, speeds in seen.items():
        row |= {f"{kind}_prefill_tps": median(p for p, _ in speeds), f"{kind}_decode_tps": median(d for _, d in speeds)}
    for phase in (0, 1):
        over = [a[phase] / b[phase] for a, b in zip(seen["integer"], seen["int8"], strict=True)]
        row[f"{('prefill', 'decode')[phase]}_over_int8"] = median(over)
    emit("integer", what="speed", **row)


def windows(model: IntegerModel, count: int) -> Iterator[np.ndarray]:
    """Random tokens, `count` in all."""
    rng = np.random.default_rng(1)
    length = min(WINDOW, model.graph.positions)
    for done in range(0, count, length):
        yield rng.integers(0, model.spec.vocab_size, min(length, count - done))


def exactness(model: IntegerModel, name: str, count: int) -> None:
    """Emit how many codes differ from the oracle's, by variant and phase."""
    variants = native.variants("matmul_integer")[1:]  # without the reference, which is slow and has tests of its own
    cores = {variant: native.IntegerModel(model, threads=2, variant=variant) for variant in variants}
    differ = {variant: [0, 0] for variant in variants}
    oracle, codes = Oracle(model), 0
    for tokens in windows(model, count):
        wanted = oracle.sites(tokens)
        codes += sum(edge.size for edge in wanted.values())
        for variant, core in cores.items():
            for phase, chunk in enumerate((len(tokens), 1)):
                found = core.sites(tokens.tolist(), chunk=chunk)
                differ[variant][phase] += sum(int((found[edge] != wanted[edge]).sum()) for edge in wanted)
    for variant, (prefill, decode) in differ.items():
        emit(
            "integer", what="exactness", model=name, bits=model.bits, variant=variant, tokens=count,
            codes=codes, differing_in_prefill=prefill, differing_in_decode=decode,
        )  # fmt: skip
    if any(sum(pair) for pair in differ.values()):
        raise SystemExit("not exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="110m")
    parser.add_argument("--artifact", type=Path, help="run the integer graph of this artifact instead")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=33)
    parser.add_argument("--exact", type=int, default=0, help="hold the codes of so many tokens to the oracle's instead")
    given = parser.parse_args()
    model = stored_model(given.artifact) if given.artifact else random_model(given.shape, given.bits)
    name = given.artifact.name if given.artifact else f"random-{given.shape}"
    if given.exact:
        exactness(model, name, given.exact)
    else:
        speed(model, name, given.threads, given.rounds, given.prompt, given.answer)


if __name__ == "__main__":
    main()
