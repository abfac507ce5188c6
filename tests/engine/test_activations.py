"""Activations in int8: close to the float path, and the same for any threads and neighbours."""

from pathlib import Path

import numpy as np
import pytest

from lilliput.core.errors import ConfigError
from lilliput.engine import Engine, Sampling, native
from lilliput.engine.native import Activations
from lilliput.numerics.divergence import divergence
from support.small_artifact import llama_spec, write_small_artifact
from support.stored import random_linear, stored

SPEC = llama_spec()
TOKENS = list(range(40, 80))


def model(activations: Activations, *, threads: int = 1, variant: str = "", group_size: int = 32) -> native.Model:
    rng = np.random.default_rng(0)
    floats = {"final_norm.weight": stored(np.ones(SPEC.hidden_size))}
    linears = {"embed_tokens": random_linear(rng, SPEC.vocab_size, SPEC.hidden_size, (4, 8), group_size)}
    for layer in range(SPEC.num_layers):
        for kind in ("attn_norm", "mlp_norm"):
            floats[f"layers.{layer}.{kind}.weight"] = stored(np.ones(SPEC.hidden_size))
        for name, (out, columns) in SPEC.linears(layer).items():
            linears[name] = random_linear(rng, out, columns, (2, 3, 4, 8), group_size, spread=4 / columns**0.5)
    return native.Model(SPEC, floats, linears, threads=threads, variant=variant, activations=activations)


@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int8_is_close_to_float_and_not_the_same(bits: int, group_size: int) -> None:
    exact, rounded = (model(kind, group_size=group_size).logits(TOKENS, bits) for kind in ("float", "int8"))
    kl, _ = divergence(exact, rounded)
    # inputs have some 40 dB over a group, fewer where one large input stands in a whole row; KL is quadratic in that
    assert 0 < kl.mean() < 0.02
    assert np.linalg.norm(exact - rounded) < 0.06 * np.linalg.norm(exact)


def test_groups_across_tiles_run_in_float() -> None:
    pair = [model(kind, group_size=16).logits(TOKENS, 4) for kind in ("float", "int8")]
    assert np.array_equal(*pair)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_threads_variants_and_batches_give_the_same_bits(bits: int) -> None:
    wanted = model("int8").logits(TOKENS, bits)
    assert np.array_equal(model("int8", threads=3).logits(TOKENS, bits), wanted)
    for variant in native.variants("matmul_nested"):  # what else there is of that name runs too
        assert np.array_equal(model("int8", variant=variant).logits(TOKENS, bits), wanted)
    options = {"bits": bits, "max_new_tokens": 12, "context": 100, "eos": (), "sampling": Sampling()}
    prompts = [TOKENS[:7], TOKENS[3:30], TOKENS[20:21]]
    together = [tokens for tokens, *_ in model("int8", threads=2).generate(prompts, **options)]
    assert together == [model("int8").generate([prompt], **options)[0][0] for prompt in prompts]


def test_an_engine_rounds_unless_told_otherwise(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "small.lilliput")
    assert Engine(tmp_path / "small.lilliput").activations == "int8"
    assert Engine(tmp_path / "small.lilliput", activations="float").activations == "float"
    with pytest.raises(ConfigError, match=r"activations: .* Give int8 or float or integer"):
        Engine(tmp_path / "small.lilliput", activations="int4")  # type: ignore[arg-type]
