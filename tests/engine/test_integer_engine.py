"""The C++ runner of integer graphs equals the oracle, code by code."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from lilliput.artifact.integer import IntegerModel
from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError
from lilliput.core.graph import Attend, Node
from lilliput.engine import Engine, Sampling, native
from lilliput.engine.oracle import Oracle
from lilliput.methods import METHODS
from lilliput.numerics.fixed import multiplier
from lilliput.pipeline import compress
from support.families import FAMILIES, VOCAB, write_checkpoint
from support.integers import integer_model, some_tokens, tiny_decoder
from support.small_artifact import write_small_artifact

VARIANTS = sorted({"reference", *native.variants("matmul_integer"), *native.variants("attention_integer")})
WIDE = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.q", "attn.k")
LONG = 90


def made(folder: Path, family: str, bits: int = 8, overrides: dict[str, int] | None = None) -> IntegerModel:
    return integer_model(tiny_decoder(folder, family), some_tokens(LONG), bits, overrides)


def assert_equal_sites(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, codes in wanted.items():
        assert np.array_equal(found[name], codes), (
            f"{name}: {(found[name] != codes).sum()} of {codes.size} codes differ"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_site_of_every_family_is_the_oracles(family: str, bits: int, tmp_path: Path) -> None:
    model, tokens = made(tmp_path, family, bits), some_tokens(LONG, seed=2)
    wanted = Oracle(model).sites(tokens)
    assert_equal_sites(native.IntegerModel(model, threads=1).sites(tokens), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_variants_threads_and_chunks_change_no_code(variant: str, bits: int, tmp_path: Path) -> None:
    model, tokens = made(tmp_path, "mistral", bits), some_tokens(LONG, seed=3)
    wanted = Oracle(model).sites(tokens)
    for threads in (1, 2):
        core = native.IntegerModel(model, threads=threads, variant=variant)
        for chunk in (1, 3, 16, 37, LONG):
            assert_equal_sites(core.sites(tokens, chunk=chunk), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wide", [*[(name,) for name in WIDE], WIDE, ("mlp.act", "mlp.up_proj", "mlp.inner")], ids=str)
def test_edges_of_16_bits_are_exact_too(variant: str, wide: tuple[str, ...], tmp_path: Path) -> None:
    overrides = {f"layers.{n}.{name}": 16 for name in wide for n in range(2)}
    model, tokens = made(tmp_path, "llama", 8, overrides), some_tokens(LONG, seed=4)
    wanted = Oracle(model).sites(tokens)
    core = native.IntegerModel(model, threads=2, variant=variant)
    for chunk in (1, LONG):
        assert_equal_sites(core.sites(tokens, chunk=chunk), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_probabilities_of_8_bits(variant: str, tmp_path: Path) -> None:
    model, tokens = made(tmp_path, "llama"), some_tokens(LONG, seed=5)

    def coarse(node: Node) -> Node:
        if not isinstance(node, Attend):
            return node
        m, s = multiplier(node.out_multiplier / 2**node.out_shift * 65535 / 255)
        return node.model_copy(update={"probability": 255, "out_multiplier": m, "out_shift": s})

    nodes = tuple(coarse(node) for node in model.graph.nodes)
    model = replace(model, graph=model.graph.model_copy(update={"nodes": nodes}))
    assert_equal_sites(
        native.IntegerModel(model, threads=1, variant=variant).sites(tokens), Oracle(model).sites(tokens)
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_logits_are_the_oracles(family: str, tmp_path: Path) -> None:
    model, tokens = made(tmp_path, family), some_tokens(LONG, seed=6)
    assert np.array_equal(native.IntegerModel(model, threads=2).logits(tokens.tolist()), Oracle(model).logits(tokens))


def test_a_soft_cap_of_logits_is_that_of_the_float_path(tmp_path: Path) -> None:
    model, tokens = made(tmp_path, "gemma2"), some_tokens(20, seed=6)
    cap = model.graph.logit_softcap
    assert cap is not None
    grid, codes = model.graph.edges["logits"].grid, Oracle(model).sites(tokens)["logits"].astype(np.int32)
    value = np.float32(grid.scale) * (codes - grid.zero).astype(np.float32)
    wanted = np.stack([native.softcap(row, cap) for row in value])
    assert np.array_equal(native.IntegerModel(model, threads=1).logits(tokens.tolist()), wanted)


@pytest.mark.parametrize("family", ["mistral", "gpt_neox"])
def test_decoding_in_a_batch_gives_the_oracles_tokens(family: str, tmp_path: Path) -> None:
    model = made(tmp_path, family)
    prompts = [some_tokens(n, seed=n).tolist() for n in (1, 7, 40, 66)]
    options = {"max_new_tokens": 12, "context": 120, "eos": (), "sampling": Sampling()}
    together = [tokens for tokens, *_ in native.IntegerModel(model, threads=2).generate(prompts, **options)]
    for prompt, found in zip(prompts, together, strict=True):
        oracle = Oracle(model)
        state, wanted = oracle.start(), []
        codes = oracle.feed(state, prompt)[-1]
        for _ in range(12):
            wanted.append(int(codes.argmax()))
            codes = oracle.feed(state, wanted[-1:])[-1]
        assert found == wanted


def test_the_cache_is_codes(tmp_path: Path) -> None:
    model = made(tmp_path, "llama")
    spec = model.spec
    narrow = native.IntegerModel(model, threads=1).cache_bytes(1)
    assert narrow == spec.num_layers * spec.num_kv_heads * 2 * native.PAGE * spec.head_dim
    wide = made(tmp_path, "llama", 8, {"layers.1.attn.v_proj": 16})
    assert native.IntegerModel(wide, threads=1).cache_bytes(65) == 4 * narrow


def test_tokens_beyond_the_vocabulary_and_the_graph_are_refused(tmp_path: Path) -> None:
    core = native.IntegerModel(made(tmp_path, "llama"), threads=1)
    with pytest.raises(ValueError, match=f"token {VOCAB} is outside the vocabulary"):
        core.logits([VOCAB])
    with pytest.raises(ValueError, match="position 256 is beyond the 256 of the graph"):
        core.logits([5] * 257)


def test_an_engine_runs_the_graph_of_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "min_max", "support.min_max:MinMax")
    write_checkpoint(tmp_path / "model", "llama", 3)
    (tmp_path / "text.txt").write_text("The old man and the child went on and on, and the sea went with them. " * 60)
    compress(
        tmp_path / "model", tmp_path / "out", recipe=[{"min_max": {}}], calibration=[tmp_path / "text.txt"], samples=4,
        length=32, gate=False,
    )  # fmt: skip
    engine, tokens = Engine(tmp_path / "out", activations="integer", threads=2), some_tokens(30, seed=8)
    oracle = Oracle(cast(IntegerModel, Artifact.open(tmp_path / "out").integer()))
    assert np.array_equal(engine.logits(tokens), oracle.logits(tokens))
    answer = engine.generate(tokens, max_new_tokens=1)
    assert answer.tokens == (int(oracle.logits(tokens)[-1].argmax()),) or answer.finish_reason == "stop"
    assert engine.kv_bytes(65) < Engine(tmp_path / "out", kv="int8").kv_bytes(65)
    with pytest.raises(
        ConfigError, match=r"kv: an integer graph keeps keys and values as codes, not as 'int8'\. Leave"
    ):
        Engine(tmp_path / "out", activations="integer", kv="int8")


def test_an_artifact_without_a_graph_is_refused(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "small.lilliput")
    with pytest.raises(ConfigError, match=r"small\.lilliput: it has no integer graph\. Leave activations out"):
        Engine(tmp_path / "small.lilliput", activations="integer")
