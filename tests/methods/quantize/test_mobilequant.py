"""MobileQuant: what it folds is exact, what it trains helps, and a killed run goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.artifact.integer import IntegerModel
from lilliput.artifact.stored import StoredTensor
from lilliput.core.errors import ConfigError, QualityFailed
from lilliput.core.progress import Silent
from lilliput.data.streams import Batches
from lilliput.engine.oracle import Oracle
from lilliput.methods import folding, student, training
from lilliput.methods.base import Integers
from lilliput.methods.quantize import mobilequant
from lilliput.methods.quantize.mobilequant import MobileQuant
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.models.lowering import lower
from lilliput.models.pairs import Pair
from lilliput.models.simulate import Rounding, Simulation
from lilliput.models.sites import WIDE, before_rotation, site_policy, sites
from support.families import VOCAB, write_checkpoint
from support.integers import stored_linear

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("gemma", SMALL | {"num_key_value_heads": 1}),
    ("qwen3", SMALL),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    ("gpt_neox", {}),
    ("opt", {}),
]
EVERY_FAMILY = pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda v: v if isinstance(v, str) else "")


def decoder_of(folder: Path, family: str = "llama", **changes: Any) -> Decoder:
    if not (folder / "config.json").exists():
        write_checkpoint(folder, family, 7, **changes)
    return load_decoder(Checkpoint.open(folder)).eval()


def text(rows: int = 12, length: int = 12, seed: int = 0) -> Batches:
    return Batches(np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32), 4)


def made(decoder: Decoder, folder: Path, rows: Batches | None = None, **options: Any) -> Integers:
    return MobileQuant(**options).make(decoder, rows or text(), folder, Silent())


def tokens() -> Tensor:
    return torch.from_numpy(text(2, 16, seed=5).rows.astype(np.int64))


@torch.no_grad()
def divergence(integers: Integers, folder: Path, rows: Batches | None = None) -> float:
    """Of the simulated integers from the float model, on the calibration text: nats a position."""
    seen = torch.from_numpy((rows or text()).rows.astype(np.int64))
    original = torch.log_softmax(decoder_of(folder)(seen), -1)
    found = torch.log_softmax(Simulation(integers.model, integers.codes, integers.grids).run(seen), -1)
    return float((original.exp() * (original - found)).sum(-1).mean())


@EVERY_FAMILY
def test_all_that_is_folded_leaves_the_float_model_as_it_was(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    decoder = decoder_of(tmp_path, family, **changes)
    with torch.no_grad():
        expected = decoder(tokens())
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    integers = made(decoder, tmp_path / "work", steps=2, let_rate=0.2)
    assert any(not torch.equal(value, before[name]) for name, value in integers.model.state_dict().items())
    with torch.no_grad():
        found = integers.model(tokens())
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()
    assert set(integers.grids) == set(sites(decoder.spec))
    assert list(integers.codes) == list(decoder.spec.matrices())


def test_free_scales_across_a_rotation_would_not_be_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    tied = student.pairs

    def free(block: Any) -> list[Pair]:
        spec, found = block.spec, []
        for pair in tied(block):
            if pair.kind == "query_key":
                every = torch.arange(spec.num_kv_heads * spec.head_dim)
                groups = spec.num_heads // spec.num_kv_heads
                asked = every.view(spec.num_kv_heads, 1, -1).expand(-1, groups, -1).reshape(-1)
                pair = replace(pair, width=len(every), rows=every, columns=asked)
            found.append(pair)
        return found

    monkeypatch.setattr(student, "pairs", free)
    monkeypatch.setattr(folding, "pairs", free)
    decoder = decoder_of(tmp_path, **SMALL)
    with torch.no_grad():
        expected = decoder(tokens())
        found = made(decoder, tmp_path / "work", steps=0).model(tokens())
    assert (found - expected).abs().max() > 1e-2 * expected.abs().max()


def test_without_grids_and_codes_it_is_the_float_model_and_at_16_bits_close_to_it(tmp_path: Path) -> None:
    integers = made(decoder_of(tmp_path, **SMALL), tmp_path / "work", steps=0, sites={"*": 16})
    seen = torch.from_numpy(text().rows.astype(np.int64))  # nothing of it is out of range
    with torch.no_grad():
        expected = integers.model(seen)
    size = expected.abs().max()
    assert (Simulation(integers.model, {}, {}).run(seen) - expected).abs().max() <= 1e-5 * size
    assert (Simulation(integers.model, {}, integers.grids).run(seen) - expected).abs().max() <= 2e-3 * size


@pytest.mark.parametrize(("bits", "loss"), [(8, "hidden"), (4, "logits")])
def test_training_helps_end_to_end_block_by_block_and_both(bits: int, loss: str, tmp_path: Path) -> None:
    rows = Batches(np.tile(text(4).rows, (8, 1)), 4)  # what is held out is like what is trained on
    options: dict[str, Any] = {"bits": bits, "rule": "minmax", "loss": loss, "patience": 10}
    start = made(decoder_of(tmp_path, **SMALL), tmp_path / "a", rows, steps=0, **options)
    whole = made(decoder_of(tmp_path), tmp_path / "b", rows, steps=40, scope="end_to_end", **options)
    block = made(decoder_of(tmp_path), tmp_path / "c", rows, steps=40, scope="block", **options)
    assert all(one["after"] < one["before"] for one in whole.record["training"])
    both = made(decoder_of(tmp_path), tmp_path / "d", rows, steps=40, scope="both", **options)
    assert [one["phase"] for one in whole.record["training"]] == ["all"]
    assert [one["phase"] for one in both.record["training"]] == ["layers.0", "layers.1", "all"]
    assert [one["phase"] for one in block.record["training"]] == ["layers.0", "layers.1"]
    assert all(one["after"] <= one["before"] for one in block.record["training"])
    ends = [divergence(one, tmp_path, rows) for one in (start, whole, both, block)]
    assert max(ends[1:]) < ends[0]


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 3}], ids=["nothing trained", "scales trained"])
def test_swept_roundings_are_closer_than_the_nearest_and_leave_all_else_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = options | {"scope": "end_to_end"}  # both would fit the ranges to the roundings
    nearest = made(decoder_of(tmp_path, **SMALL), tmp_path / "a", bits=4, rounding="nearest", **options)
    swept = made(decoder_of(tmp_path), tmp_path / "b", bits=4, rounding="swept", **options)
    assert divergence(swept, tmp_path) < 0.9 * divergence(nearest, tmp_path)
    assert swept.grids == nearest.grids
    for name, codes in nearest.codes.items():
        assert torch.equal(codes.scale[codes.bits[0]], swept.codes[name].scale[codes.bits[0]])
    same = {name: torch.equal(codes.codes, swept.codes[name].codes) for name, codes in nearest.codes.items()}
    assert same == {name: not name.startswith("layers.") for name in same}


def test_every_edge_of_the_simulation_is_within_a_step_of_the_oracle(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, "qwen2", **SMALL)
    integers = made(decoder, tmp_path / "work", steps=4, bits=4)
    state = integers.model.state_dict()
    graph, constants = lower(decoder.spec, integers.grids, state, integers.codes)
    linears = {name: stored_linear(name, codes) for name, codes in integers.codes.items()}
    floats = {
        name: StoredTensor("F32", tuple(value.shape), value.numpy())
        for name, value in state.items()
        if name.removesuffix(".weight") not in integers.codes
    }
    row = np.random.default_rng(3).integers(3, VOCAB, 40)
    found = Oracle(IntegerModel(decoder.spec, graph, constants, linears, floats)).sites(row, scores=True)
    rounding, gaps = Rounding(integers.grids), {}

    def site(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compares, and goes on with what the oracle has."""
        made = rounding(name, x, seen)
        if name not in found:
            return made
        grid = integers.grids[name]
        theirs = torch.from_numpy(found[name] - float(grid.zero))[None] * grid.scale
        gap = ((made - theirs) / grid.scale).abs()
        gaps[name] = float(gap.max() if seen is None else gap[..., seen].max())
        return theirs.float()

    Simulation(integers.model, integers.codes, integers.grids).run(torch.from_numpy(row)[None], site)
    assert set(gaps) == {name for name in integers.grids if not name.endswith("probabilities")}
    assert {name: gap for name, gap in gaps.items() if gap > 1.01} == {}


@pytest.mark.parametrize("switch", ["let", "lwc", "ranges"])
def test_a_switch_leaves_alone_what_it_names(switch: str, tmp_path: Path) -> None:
    start = made(decoder_of(tmp_path, **SMALL), tmp_path / "a", steps=0, **{switch: False})
    found = made(decoder_of(tmp_path), tmp_path / "b", steps=3, **{switch: False})
    same = {
        "let": all(torch.equal(v, start.model.state_dict()[n]) for n, v in found.model.state_dict().items()),
        "ranges": found.grids == start.grids,
    }
    if switch == "lwc":
        weight = found.model.state_dict()["layers.0.attn.q_proj.weight"]
        reach = torch.maximum(weight.amax(1) / 127, -weight.amin(1) / 128).half()
        same["lwc"] = torch.equal(found.codes["layers.0.attn.q_proj"].scale[8][:, 0], reach)
    assert same == {name: name == switch for name in same}


@pytest.mark.parametrize("scope", ["both", "end_to_end", "block"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 8, "scope": scope, "patience": 8}
    whole = made(decoder_of(tmp_path, **SMALL), tmp_path / "a", **options)
    monkeypatch.setattr(training, "EVERY", 0.0)
    kept, count = training.Saved.save, 0

    def save(self: Any, *args: Any) -> None:
        nonlocal count
        kept(self, *args)
        count += 1
        if count == 5 + 8 * (scope == "block"):
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Saved, "save", save)
    with pytest.raises(KeyboardInterrupt):
        made(decoder_of(tmp_path), tmp_path / "b", **options)
    again = made(decoder_of(tmp_path), tmp_path / "b", **options)
    assert again.grids == whole.grids
    assert again.record == whole.record
    for name, codes in whole.codes.items():
        assert torch.equal(codes.codes, again.codes[name].codes)
        assert all(torch.equal(codes.scale[b], again.codes[name].scale[b]) for b in codes.bits)
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in whole.model.state_dict().items())


def test_a_state_of_other_options_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVERY", 0.0)
    made(decoder_of(tmp_path, **SMALL), tmp_path / "a", steps=2)
    other = made(decoder_of(tmp_path), tmp_path / "a", steps=3)
    fresh = made(decoder_of(tmp_path), tmp_path / "b", steps=3)
    assert other.grids == fresh.grids


def test_a_loss_that_is_not_finite_names_step_and_edge_and_keeps_the_state_before(tmp_path: Path) -> None:
    method = MobileQuant(steps=4, let_rate=0.9, scope="end_to_end")
    run = mobilequant._Run(method, decoder_of(tmp_path, **SMALL), text(), tmp_path, Silent())
    with torch.no_grad():
        run.student = run.begin()
    run.student.ends["embed_tokens.weight"][:, 0] = torch.nan
    with pytest.raises(
        QualityFailed, match=r"^mobilequant: the loss is nan in step 1, first at layers\.0\.input\. Lower"
    ):
        run.train()
    assert run.saved.there


def test_sixteen_bits_go_to_the_edges_that_lose_most(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, **SMALL)
    integers = made(decoder, tmp_path / "a", steps=0, budget16=5, sites={"logits": 16})
    found, chosen = integers.record["sensitivity"], integers.record["sixteen"]
    assert "logits" not in found
    assert chosen == sorted(found, key=lambda name: -found[name])[:5]
    wide = {name for name, grid in integers.grids.items() if grid.bits == 16}
    assert not any(name.endswith(WIDE) for name in found)
    assert wide == {*chosen, "logits", *(f"layers.{i}.attn.scores" for i in range(decoder.spec.num_layers))}
    fewer = made(decoder_of(tmp_path), tmp_path / "b", steps=0, budget16=0)
    assert divergence(integers, tmp_path) < divergence(fewer, tmp_path)


def test_a_budget_may_stand_beside_the_usual_widths(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, **SMALL)
    integers = made(decoder, tmp_path / "a", steps=0, budget16=3, usual16=True)
    usual, chosen = {name for name, bits in sites(decoder.spec).items() if bits == 16}, integers.record["sixteen"]
    assert len(chosen) == 3
    assert set(integers.record["sensitivity"]).isdisjoint(usual)
    assert {name for name, grid in integers.grids.items() if grid.bits == 16} == usual | set(chosen)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_rotary16_widens_what_is_rounded_again_behind_the_rotation(family: str, tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, family)
    between = set(before_rotation(decoder.spec))
    ends = {name.rpartition(".")[2] for name in between}
    assert (
        ends == {"llama": {"q_proj", "k_proj"}, "qwen3": {"q_proj", "k_proj", "q_norm", "k_norm"}, "opt": set()}[family]
    )
    usual = {name: 16 if name in between else bits for name, bits in sites(decoder.spec).items()}
    integers = made(decoder, tmp_path / "a", steps=0, rotary16=True, sites={"layers.1.attn.k_proj": 8})
    assert {name: grid.bits for name, grid in integers.grids.items()} == usual | {"layers.1.attn.k_proj": 8}
    left = made(decoder_of(tmp_path, family), tmp_path / "b", steps=0, rotary16=True, budget16=2, usual16=True).record
    assert between.isdisjoint(left["sensitivity"])


def test_without_a_gate_what_the_activation_reads_is_cut_off_where_it_makes_nothing(tmp_path: Path) -> None:
    def grids(rule: Any) -> Any:
        decoder = decoder_of(tmp_path, "gpt_neox")
        for block in decoder.blocks:
            block.get_parameter("mlp.up_proj.weight").data.mul_(4)
        return made(decoder, tmp_path / f"work-{rule}", steps=0, rule=rule, share=0.0).grids

    seen, cut = grids("minmax"), grids("percentile")
    for name in ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj"):
        least, after = (one[name].scale * (one[name].low - one[name].zero) for one in (seen, cut))
        assert least < -5
        assert after > -3.5
        assert cut[name].scale < 0.8 * seen[name].scale


def test_policy_widths_reach_the_grids(tmp_path: Path) -> None:
    decoder, wanted = decoder_of(tmp_path, **SMALL), {"*.mlp.inner": 16, "*.probabilities": 8}
    integers = made(decoder, tmp_path / "a", steps=1, sites=wanted)
    assert {name: grid.bits for name, grid in integers.grids.items()} == site_policy(decoder.spec, wanted)
    assert integers.grids["layers.0.attn.probabilities"].scale == 1 / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^mobilequant\.bits: bits is 5\. Give"),
        ({"steps": -1}, r"^mobilequant\.steps: steps is -1\. Give at least 0\.$"),
        ({"let_rate": 1.0}, r"^mobilequant\.let_rate: let_rate is 1\.0\. Give a rate"),
        ({"budget16": 1.5}, r"^mobilequant\.budget16: budget16 is 1\.5\. Give a number of edges"),
        ({"held": 0.9}, r"^mobilequant\.held: held is 0\.9\. Give a share"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MobileQuant(**options)


def test_one_row_of_text_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^mobilequant\.held: 1 rows of text leave none"):
        made(decoder_of(tmp_path, **SMALL), tmp_path / "a", text(1))
