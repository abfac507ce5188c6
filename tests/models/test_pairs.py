"""Folding any legal pair leaves the float output as it was, in every family; a free factor across a rotation does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.models import Block, Checkpoint, load_block, load_encoder_block
from lilliput.models.pairs import pairs
from support.encoders import write_encoder
from support.families import CASES, Case, each, write_checkpoint

EVERY: list[Case] = [
    *CASES,
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("opt", {"activation_function": "gelu"}),
    ("gpt_neox", {"use_parallel_residual": False}),
]
X = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(3))


def load(folder: Path, family: str, **changes: Any) -> Block:
    write_checkpoint(folder, family, seed=5, **changes)
    return load_block(Checkpoint.open(folder), 1)


def factors(width: int, seed: int = 0) -> torch.Tensor:
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))


@each(EVERY)
@torch.no_grad()
def test_a_fold_moves_the_weights_and_not_the_output(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    block = load(tmp_path, family, **changes)
    expected = block(X)
    for pair in pairs(block):
        before = {name: value.clone() for name, value in block.named_parameters()}
        pair.fold(block, factors(pair.width))
        moved = {name for name, value in block.named_parameters() if not torch.equal(value, before[name])}
        assert moved == set(pair.tensors) & set(before) - {
            f"{m}.bias" for m in pair.multiplied if pair.kind != "query_key"
        }
        assert (block(X) - expected).abs().max() <= 1e-5 * expected.abs().max(), pair.divided


def test_the_pairs_there_are_follow_from_the_spec(tmp_path: Path) -> None:
    def told(family: str, **changes: Any) -> list[tuple[str, str, int]]:
        folder = tmp_path / "-".join([family, *changes])
        return [(p.kind, p.divided, len(p.multiplied)) for p in pairs(load(folder, family, **changes))]

    assert told("llama") == [
        ("norm", "attn_norm", 3),
        ("query_key", "attn.k_proj", 1),
        ("value", "attn.v_proj", 1),
        ("norm", "mlp_norm", 2),
        ("inner", "mlp.up_proj", 1),
    ]
    assert ("inner", "mlp.up_proj", 1) in told("opt")
    assert ("inner", "mlp.up_proj", 1) not in told("opt", activation_function="gelu")
    assert ("query_key", "attn.k_norm", 1) in told("qwen3")
    assert ("norm", "attn_norm", 5) in told("stablelm", use_parallel_residual=True)


@torch.no_grad()
def test_factors_that_differ_within_a_rotation_change_the_output(tmp_path: Path) -> None:
    block = load(tmp_path, "llama")
    expected = block(X)
    pair = next(p for p in pairs(block) if p.kind == "query_key")
    free = torch.arange(len(pair.rows))
    groups = block.spec.num_heads // block.spec.num_kv_heads
    columns = free.view(block.spec.num_kv_heads, 1, -1).expand(-1, groups, -1).reshape(-1)
    replace(pair, width=len(free), rows=free, columns=columns).fold(block, factors(len(free)))
    assert (block(X) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_scales_are_shared_as_the_heads_are(tmp_path: Path) -> None:
    block = load(tmp_path, "llama")
    value = next(p for p in pairs(block) if p.kind == "value")
    seen = torch.arange(64.0)  # 4 query heads of 16 channels, two to a kv head
    assert value.mean(seen)[:2].tolist() == [8.0, 9.0]  # channels 0 and 16, 1 and 17
    assert value.most(seen)[16:18].tolist() == [48.0, 49.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(bad: float, tmp_path: Path) -> None:
    block = load(tmp_path, "llama")
    (pair, *_) = pairs(block)
    before = block.attn_norm.weight.detach().clone()
    scale = torch.ones(pair.width)
    scale[3] = bad
    with pytest.raises(ValueError, match=r"^scale \(64,\) is not 64 positive numbers$"):
        pair.fold(block, scale)
    assert torch.equal(block.attn_norm.weight, before)


@pytest.mark.parametrize(
    ("family", "tower", "kinds"),
    [("bert", None, ["query_key", "value"]), ("clip", "text", ["norm", "query_key", "value", "norm"])],
)
@torch.no_grad()
def test_norms_of_an_encoder_are_folded_only_where_they_come_first(
    family: str, tower: str | None, kinds: list[str], tmp_path: Path
) -> None:
    write_encoder(tmp_path, family)
    block = load_encoder_block(Checkpoint.open(tmp_path, tower=tower), 1)
    hidden = X * (torch.arange(19) < 11)[:, None]  # the rest is padding
    expected = block(hidden)
    assert [pair.kind for pair in pairs(block)] == kinds
    for pair in pairs(block):
        pair.fold(block, factors(pair.width))
        assert (block(hidden) - expected).abs().max() <= 1e-5 * expected.abs().max(), pair.divided
