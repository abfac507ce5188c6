from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.methods.base import Statistic
from lilliput.methods.calibration import evenly, first_readers, inputs_of, peaks_of, sample
from support.blocks import calibration, tiny_block
from support.families import FAMILIES
from support.integers import tiny_decoder, tiny_encoder


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


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_layers_that_share_a_statistic_read_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path, family) if family == "bert" else tiny_decoder(tmp_path, family)
    block, seen = model.blocks[1], dict[str, Tensor]()
    linears = block.linears()  # type: ignore[operator]
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    block(torch.randn(2, 5, model.spec.hidden_size, generator=torch.Generator().manual_seed(0)))
    first = first_readers(model.spec, dict.fromkeys(linears, Statistic.GRAM))
    assert first.keys() == linears.keys()
    assert first["layers.1.attn.v_proj"] == first["layers.1.attn.k_proj"] == "layers.1.attn.q_proj"
    for name, one in first.items():
        assert torch.equal(seen[name], seen[one])
    kinds = {n: Statistic.INPUT_NORM if n.endswith("k_proj") else Statistic.GRAM for n in linears}
    assert first_readers(model.spec, kinds)["layers.1.attn.k_proj"] == "layers.1.attn.k_proj"
