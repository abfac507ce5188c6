"""Artifacts with tables of levels, shared grids or outliers, from the file to the logits: torch, NumPy and the engine read the same weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lilliput.artifact.read import Artifact
from lilliput.core.errors import InputCorrupt
from lilliput.engine import Engine, Sampling, load, native
from lilliput.models.decoder import Decoder
from lilliput.numerics.divergence import divergence
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import Outliers
from support.small_artifact import (
    llama_spec,
    random_linear,
    random_outliers,
    random_ratios,
    random_tables,
    small_plan,
    write_small_artifact,
)

SPEC = llama_spec()
# the embedding is the head too, and has tables at its own widths
PLANS = {
    "groups": small_plan(SPEC, (2, 3, 4, 8), tables=(2, 3, 4), ladders={"embed_tokens": (4, 8)}),
    "rows": small_plan(SPEC, (2, 3, 4, 8), tables=(2, 3, 4), ladders={"embed_tokens": (3, 8)}, group_size=-1),
    "shared": small_plan(SPEC, (2, 3, 4, 8), shared=True, ladders={"embed_tokens": (4, 8)}),
    "bytes": small_plan(SPEC, (2, 3, 4, 8), tables=(2,), ladders={"embed_tokens": (4, 8)}, grid_bits=8),
    "shared bytes": small_plan(SPEC, (2, 3, 4, 8), shared=True, ladders={"embed_tokens": (4, 8)}, grid_bits=8),
    "outliers": small_plan(SPEC, (2, 3, 4, 8), outliers=0.02),
    "outliers, shared bytes": small_plan(SPEC, (2, 3, 4, 8), shared=True, grid_bits=8, outliers=0.02),
    "symmetric, some": small_plan(SPEC, (2, 3, 4, 8), tables=(3,), ladders={"embed_tokens": (3,)}, sym=True),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 261, 41)]


@pytest.fixture(scope="module", params=list(PLANS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "a.lilliput"
    write_small_artifact(path, plan=PLANS[request.param])
    return path


def torch_logits(artifact: Artifact, bits: int) -> np.ndarray:
    """What the decoder in torch answers with the weights that torch reads from the codes."""
    rng = np.random.default_rng(0)  # as `fill` drew them
    state = {}
    for name, entry in artifact.manifest.entries.items():
        codes, scale, zero = random_linear(entry, rng)
        table, ratio = random_tables(entry, rng), random_ratios(entry, rng)
        parts = [{b: torch.from_numpy(v) for b, v in grid.items()} for grid in (scale, zero, table, ratio)]
        beside = random_outliers(entry, rng)
        if beside is not None:
            counts, columns = (torch.from_numpy(a.astype(np.int32)) for a in (beside.counts, beside.columns))
            parts.append(Outliers(counts, columns, torch.from_numpy(beside.values)))
        grid = Quantized(torch.from_numpy(codes), entry.bits, entry.group_size, *parts)
        state[f"{name}.weight"] = grid.dequantize(entry.width_at(bits))
        assert np.array_equal(artifact.dequantize(name, bits), state[f"{name}.weight"].numpy())
    state |= {name: torch.from_numpy(artifact.dequantize(name)) for name in artifact.manifest.floats}
    decoder = Decoder(SPEC, state.keys())
    decoder.load_state_dict(state)
    with torch.no_grad():
        return decoder(torch.tensor([TOKENS]))[0].numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_engine_answers_as_torch_does(folder: Path, bits: int) -> None:
    with Artifact.open(folder) as artifact:
        expected = torch_logits(artifact, bits)
    exact = Engine(folder, activations="float").logits(TOKENS, bits=bits)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    rounded = Engine(folder).logits(TOKENS, bits=bits)
    kl, _ = divergence(exact, rounded)
    assert 0 < kl.mean() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_threads_variants_and_batches_give_the_same_bits(folder: Path, bits: int) -> None:
    with Artifact.open(folder) as artifact:
        manifest = artifact.manifest
        floats = {name: artifact.tensor(name) for name in manifest.floats}
        linears = {name: artifact.linear(name) for name in manifest.entries}

    def model(threads: int, variant: str) -> native.Model:
        return native.Model(SPEC, floats, linears, threads=threads, variant=variant, activations="int8")

    wanted = model(1, "reference").logits(TOKENS, bits)
    for variant in native.variants("matmul_nested"):
        assert np.array_equal(model(2, variant).logits(TOKENS, bits), wanted)
    engine = load(folder, threads=2)
    prompts = [TOKENS[:7], TOKENS[3:30], TOKENS[20:21]]
    options = {"max_new_tokens": 12, "bits": bits, "sampling": Sampling()}
    together = [made.tokens for made in engine.generate_batch(prompts, **options)]
    assert together == [engine.generate(prompt, **options).tokens for prompt in prompts]


def test_tables_count_among_the_bytes_a_token_reads(tmp_path: Path) -> None:
    plans = [small_plan(SPEC, (2, 8), tables=tables) for tables in ((), (2,))]
    for name, plan in zip("ab", plans, strict=True):
        write_small_artifact(tmp_path / name, plan=plan)
    plain, looked = Engine(tmp_path / "a"), Engine(tmp_path / "b")
    tables = sum(entry.out * 4 for entry in plans[0].entries.values())  # every `out` here is a multiple of 16
    weights = sum(entry.out * entry.columns for entry in plans[0].entries.values())
    assert looked.weight_bytes(2) - plain.weight_bytes(2) == tables
    assert looked.weight_bytes(8) == plain.weight_bytes(8)
    assert plans[1].bits_per_weight(2) - plans[0].bits_per_weight(2) == pytest.approx(8 * tables / weights)


def test_a_shared_grid_counts_among_the_bytes_a_token_reads(tmp_path: Path) -> None:
    for name, shared in (("a", False), ("b", True)):
        write_small_artifact(tmp_path / name, plan=small_plan(SPEC, (2, 8), shared=shared))
    own, one = Engine(tmp_path / "a"), Engine(tmp_path / "b")
    rows = sum(entry.out for entry in small_plan(SPEC, (2, 8)).entries.values())
    assert [one.weight_bytes(b) - own.weight_bytes(b) for b in (2, 8)] == [rows, rows]


def test_outliers_count_among_the_bytes_a_token_reads_at_every_width(tmp_path: Path) -> None:
    plans = [small_plan(SPEC, (2, 8), outliers=share) for share in (0, 0.01)]
    for name, plan in zip("ab", plans, strict=True):
        write_small_artifact(tmp_path / name, plan=plan)
    plain, more = Engine(tmp_path / "a"), Engine(tmp_path / "b")
    entries = plans[1].entries.values()
    size = sum(2 * entry.out + 4 * entry.outliers for entry in entries)
    # a byte for the row, two for the column, a float32; and where a tile of 16 rows begins
    held = sum(4 * (entry.out // 16) + 7 * entry.outliers for entry in entries)
    weights = sum(entry.out * entry.columns for entry in entries)
    for bits in (2, 8):
        assert more.weight_bytes(bits) - plain.weight_bytes(bits) == held
        assert plans[1].bits_per_weight(bits) - plans[0].bits_per_weight(bits) == pytest.approx(8 * size / weights)


def test_the_engine_refuses_outliers_that_stand_outside_their_matrix(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", plan=small_plan(SPEC, (2,), outliers=0.01))
    with Artifact.open(tmp_path / "a") as artifact:
        floats = {name: artifact.tensor(name) for name in artifact.manifest.floats}
        linears = {name: artifact.linear(name) for name in artifact.manifest.entries}
    name, m = next(iter(linears.items()))
    assert m.outliers is not None
    far = replace(m.outliers, columns=np.full_like(m.outliers.columns, m.columns))
    with pytest.raises(InputCorrupt, match=f"{name}: an outlier stands in column 64 of 64"):
        native.Model(SPEC, floats, linears | {name: replace(m, outliers=far)}, threads=1)


def test_the_kernels_check_outliers_themselves(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", plan=small_plan(SPEC, (2,)))
    core, name = Engine(tmp_path / "a")._model._core, "layers.0.attn.q_proj"
    first = np.zeros(65, np.uint32)
    first[1:] = 2
    column, value = np.array([3, 63], np.uint16), np.ones(2, np.float32)
    for wrong in (
        (first[:-1], column, value),
        (np.r_[first[:-1], first[-1:] + 1], column, value),
        (np.r_[first[:2], first[:1], first[3:]], column, value),
        (first, column + np.uint16(1), value),
        (first, column[:1], value),
        (first, column, value[:1]),
    ):
        with pytest.raises(ValueError, match=f"{name}: its outliers do not fit it"):
            core.add_outliers(name, *wrong)
    with pytest.raises(ValueError, match="is missing"):
        core.add_outliers("layers.9.attn.q_proj", first, column, value)
    core.add_outliers(name, first, column, value)


def test_a_product_by_itself_refuses_outliers(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", plan=small_plan(SPEC, (2,), outliers=0.01))
    with Artifact.open(tmp_path / "a") as artifact:
        m = artifact.linear("layers.0.attn.q_proj")
    with pytest.raises(ValueError, match="has outliers, which a product by itself does not add"):
        native.matmul_nested(m, 2, np.zeros((1, 64), np.float32))
