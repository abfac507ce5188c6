import math
import re
from pathlib import Path

import pytest
import torch

from lilliput.methods.quantize.omniquant import OmniQuant, _Task
from lilliput.numerics.grids import nearest
from support.blocks import calibration, state, tiny_block
from support.memory import kept_bytes


def gains(note: str) -> dict[int, float]:
    """Logarithm of the error after training over that before, by width."""
    found = re.findall(r"(\d+) bits (\S+) for ([^\s,)]+)", note)
    return {int(b): math.log(float(after) / float(before)) for b, after, before in found}


@pytest.mark.parametrize("options", [{}, {"let": True}, {"learn_rounding": True}, {"sym": True}])
def test_training_brings_the_block_nearer(options: dict[str, bool], tmp_path: Path) -> None:
    block = tiny_block()
    method = OmniQuant(bits=(3,), group_size=16, epochs=20, lr=0.1, **options)
    _, note = method.solve_block(block, list(block.linears()), calibration(tmp_path, block))
    assert note.startswith("block error 3 bits ")
    assert gains(note)[3] < -0.1


def test_a_ladder_gains_in_the_mean_and_serves_every_width(tmp_path: Path) -> None:
    block = tiny_block()
    made, note = OmniQuant(group_size=16, epochs=20, lr=0.1).solve_block(
        block, list(block.linears()), calibration(tmp_path, block)
    )
    assert sorted(gains(note)) == [2, 3, 4, 8]
    assert sum(gains(note).values()) < -0.4
    for layer, value in made.items():
        weight = block.linears()[layer].weight.detach()
        errors = [float((value.dequantize(b) - weight).norm()) for b in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)


@torch.no_grad()
def test_learned_scales_are_folded_and_change_nothing_in_float(tmp_path: Path) -> None:
    block = tiny_block()
    data, before, x = calibration(tmp_path, block), state(block), torch.randn(2, 16, 32)
    expected = block(x)
    method = OmniQuant(bits=(3,), group_size=16, epochs=20, lr=0.1, let=True)
    method.solve_block(block, list(block.linears()), data)
    moved = {key for key, value in block.named_parameters() if not torch.equal(value, before[key])}
    assert {"attn_norm.weight", "mlp_norm.weight", "attn.v_proj.weight", "mlp.up_proj.weight"} <= moved
    assert (block(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_training_is_rounding_to_nearest(tmp_path: Path) -> None:
    block = tiny_block()
    made, note = OmniQuant(group_size=16, epochs=5, lr=0.0).solve_block(
        block, list(block.linears()), calibration(tmp_path, block)
    )
    for layer, value in made.items():
        weight = block.linears()[layer].weight.detach()
        plain = nearest(weight, (2, 3, 4, 8), 16, False)
        # the bounds start a quarter of a step inside the range, so it is almost that
        assert (value.dequantize(8) - weight).norm() < 1.2 * (plain.dequantize(8) - weight).norm()
    assert "bits" in note


@pytest.mark.parametrize("options", [{}, {"let": True}, {"sym": True}, {"learn_rounding": True, "let": True}])
def test_the_memory_it_announces_is_what_training_holds(options: dict[str, bool], tmp_path: Path) -> None:
    block, bits = tiny_block(), (2, 4)
    method = OmniQuant(bits=bits, group_size=16, epochs=1, **options)
    task = _Task(method, block, list(block.linears()), calibration(tmp_path, block))
    parameters = [p for grid in task.grids.values() for p in grid.parameters]
    nudges = [grid.nudge for grid in task.grids.values() if grid.nudge is not None]
    weights = sum(layer.weight.numel() for layer in block.linears().values())
    grids = sum(p.numel() for p in parameters) - sum(p.numel() for p in nudges)

    def one_width() -> list[torch.Tensor]:
        now = task._floats()
        for name, key in task.local.items():
            now[key] = task.grids[name].at(now[key], 2)
        return [now[key] for key in task.local.values()] + [task._run(now, torch.zeros(1, 1, 32))]

    graph = kept_bytes(one_width, 1024, [*task.frozen.values(), *parameters])
    held = graph + (4 + 1) * weights + 3 * 4 * sum(p.numel() for p in nudges) + 22 * grids
    announced = method.held_bytes(weights=weights, grids=grids, row=0, rows=3)
    assert held <= announced <= 1.1 * held
    assert method.held_bytes(weights=0, grids=0, row=7, rows=3) == 21
    assert method.held_bytes(weights=0, grids=0, row=7, rows=9) == 28  # four rows a step


def test_a_loss_that_is_not_finite_ends_in_what_was_good(tmp_path: Path) -> None:
    block = tiny_block()
    data, before = calibration(tmp_path, block), state(block)
    assert data.targets is not None
    rows = data.targets.take(range(6))
    rows[4] = torch.inf
    data.targets.write(iter([rows]))
    made, note = OmniQuant(bits=(3,), group_size=16, rows=1).solve_block(block, list(block.linears()), data)
    assert "the loss not finite" in note
    assert note.endswith("rounded to nearest")
    assert all(torch.equal(value, before[key]) for key, value in block.named_parameters())
    for layer, value in made.items():
        plain = nearest(before[f"{layer.split('.', 2)[2]}.weight"], (3,), 16, False)
        assert torch.equal(value.codes, plain.codes)


@pytest.mark.parametrize(("key", "bad"), [("epochs", -1), ("samples", 0), ("rows", 0), ("lr", -0.1), ("let_lr", 1.0)])
def test_options_that_make_no_sense_are_refused(key: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^omniquant\.{key}: {key} is {bad}\. Give "):
        OmniQuant(**{key: bad})  # type: ignore[arg-type]
