from pathlib import Path

import torch

from lilliput.methods.calibration import evenly, inputs_of, peaks_of, sample
from support.blocks import calibration, tiny_block


def test_numbers_are_spread_evenly() -> None:
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(2, 5) == [0, 1]


@torch.no_grad()
def test_inputs_are_what_the_layers_read_and_peaks_their_largest(tmp_path: Path) -> None:
    block = tiny_block()
    data = calibration(tmp_path, block)
    rows = sample(data, 3, 10)
    assert rows.shape == (3, 10, 32)
    assert torch.equal(rows, data.inputs.take([0, 2, 4])[:, :10])
    found = inputs_of(block, ["attn.k_proj", "mlp.down_proj"], rows)
    assert torch.equal(found["attn.k_proj"], block.attn_norm(rows))
    assert found["mlp.down_proj"].shape == (3, 10, 48)
    peaks = peaks_of(block, ["attn.q_proj"], data)["attn.q_proj"]
    whole = block.attn_norm(data.inputs.take(range(6)))
    assert torch.allclose(peaks, whole.abs().amax((0, 1)))
    assert not block.attn.q_proj._forward_pre_hooks  # the hooks are gone
