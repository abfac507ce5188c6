"""Squared gradients of a whole model, against their definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lilliput.core.errors import InputCorrupt
from lilliput.core.progress import Silent
from lilliput.methods.fisher import Fisher, gather
from lilliput.models import Checkpoint, Decoder, load_decoder
from support.families import write_checkpoint

ROWS = np.random.default_rng(0).integers(3, 300, (5, 12)).astype(np.int32)


def decoder(folder: Path, family: str) -> Decoder:
    write_checkpoint(folder / family, family)
    return load_decoder(Checkpoint.open(folder / family))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has a tied head here
def test_the_sum_is_of_each_rows_squared_gradient_and_a_tied_matrix_is_counted_once(
    family: str, tmp_path: Path
) -> None:
    model = decoder(tmp_path, family)
    names = ["embed_tokens", "layers.0.attn.q_proj", "layers.1.mlp.down_proj"]
    found = gather(model, names, ROWS, tmp_path / "fisher.safetensors", Silent())
    for name in names:
        weight, total = model.get_parameter(f"{name}.weight"), torch.zeros(())
        for row in torch.tensor(ROWS, dtype=torch.int64):
            loss = F.cross_entropy(model(row[None])[0, :-1], row[1:])
            (gradient,) = torch.autograd.grad(loss, [weight])
            total = total + gradient.square()
        assert torch.allclose(found.value(name), total, rtol=1e-5, atol=0)
        assert torch.equal(found.value(name, slice(2, 5)), found.value(name)[2:5])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_row_twice_counts_twice(tmp_path: Path) -> None:
    model, name = decoder(tmp_path, "llama"), "layers.0.mlp.up_proj"
    once = gather(model, [name], ROWS[:1], tmp_path / "once.safetensors", Silent()).value(name)
    twice = gather(model, [name], ROWS[[0, 0]], tmp_path / "twice.safetensors", Silent()).value(name)
    assert torch.equal(twice, 2 * once)


def test_a_killed_run_goes_on_to_the_same_sums(tmp_path: Path) -> None:
    class Dies(Silent):
        left = 3

        def advance(self, units: int) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    model, names = decoder(tmp_path, "llama"), ["layers.0.attn.o_proj"]
    whole = gather(model, names, ROWS, tmp_path / "whole.safetensors", Silent(), keep_every=2)
    file = tmp_path / "fisher.safetensors"
    with pytest.raises(KeyboardInterrupt):
        gather(model, names, ROWS, file, Dies(), keep_every=2)
    assert Fisher(file).rows == 2
    again = gather(model, names, ROWS, file, Silent(), keep_every=2)
    assert again.rows == 5
    assert torch.equal(again.value(names[0]), whole.value(names[0]))


def test_gradients_that_are_not_numbers_name_their_matrix(tmp_path: Path) -> None:
    model = decoder(tmp_path, "llama")
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(InputCorrupt, match=r"^layers\.0\.attn\.q_proj: its gradients are NaN or infinite"):
        gather(model, ["layers.0.attn.q_proj"], ROWS, tmp_path / "f.safetensors", Silent())
