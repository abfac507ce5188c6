from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput.methods.quantize.awq import AWQ
from lilliput.methods.quantize.rtn import RTN
from support.blocks import calibration, followed_by, output_error, state, tiny_block


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_and_clips_each_make_the_rounded_block_nearer(bits: int, tmp_path: Path) -> None:
    rtn, errors = RTN(bits=(bits,), group_size=16), []
    for seed in range(4):  # matrices are searched one by one, so a single block may come out behind
        block = tiny_block(seed)
        data, after = calibration(tmp_path, block), dict.fromkeys(block.linears(), rtn)
        found = [output_error(block, data, rtn, bits)]
        AWQ(clip=False).apply(block, data, after)
        found.append(output_error(block, data, rtn, bits))
        AWQ(ratios=1).apply(block, data, after)  # the clip search alone
        errors.append([*found, output_error(block, data, rtn, bits)])
    plain, scaled, clipped = (sum(column) for column in zip(*errors, strict=True))
    assert scaled < 0.8 * plain
    assert clipped < scaled


def test_without_candidates_but_zero_nothing_is_scaled(tmp_path: Path) -> None:
    block = tiny_block()
    before = state(block)
    note = AWQ(ratios=1, clip=False).apply(block, calibration(tmp_path, block), followed_by(block))
    assert note == "ratio: attn_norm 0, attn.v_proj 0, mlp_norm 0, mlp.up_proj 0"
    assert all(torch.equal(value, before[key]) for key, value in block.named_parameters())


def test_queries_and_keys_are_not_clipped_and_no_weight_grows(tmp_path: Path) -> None:
    block = tiny_block()
    before = state(block)
    assert AWQ(ratios=1).apply(block, calibration(tmp_path, block), followed_by(block, bits=(2,))).endswith("clipped")
    moved = {key for key, value in block.named_parameters() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= {f"{n}_proj.weight" for n in ("attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    for key in moved:
        value, old = block.get_parameter(key), before[key]
        assert (value.abs() <= old.abs()).all()
        assert (value.abs() >= 0.54 * old.abs()).all()  # the smallest share tried is 0.55


def test_a_ladder_is_judged_by_all_its_widths_or_by_the_one_asked_for(tmp_path: Path) -> None:
    errors = {at: dict.fromkeys((2, 8), 0.0) for at in (0, 2)}
    for seed in range(4):
        for at, found in errors.items():
            block, rtn = tiny_block(seed), RTN(bits=(2, 8), group_size=16)
            data = calibration(tmp_path, block)
            AWQ(at_bits=at).apply(block, data, dict.fromkeys(block.linears(), rtn))
            for b in rtn.bits:
                found[b] += output_error(block, data, rtn, b)
    assert errors[2][2] < errors[0][2]  # it does best what it was asked for,
    assert errors[0][8] < errors[2][8]  # at the cost of the other


def test_what_will_keep_outliers_is_not_clipped(tmp_path: Path) -> None:
    block = tiny_block()
    after = {n: replace(q, outliers=0.01) for n, q in followed_by(block, bits=(2,)).items()}
    before = state(block)
    assert "clipped" not in AWQ(ratios=1).apply(block, calibration(tmp_path, block), after)
    assert all(torch.equal(value, before[name]) for name, value in state(block).items())


def test_a_layer_that_stays_float_is_neither_rounded_nor_clipped(tmp_path: Path) -> None:
    block = tiny_block()
    after = {name: grid for name, grid in followed_by(block, bits=(2,)).items() if "down" in name}
    before = state(block)
    AWQ().apply(block, calibration(tmp_path, block), after)
    moved = {key for key, value in block.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {"mlp.up_proj.weight", "mlp.down_proj.weight"}


@pytest.mark.parametrize("key", ["ratios", "samples", "length"])
def test_none_of_something_needed_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^awq\.{key}: {key} is 0\. Give at least 1\.$"):
        AWQ(**{key: 0})
