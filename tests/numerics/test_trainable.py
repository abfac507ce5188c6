import pytest
import torch

from lilliput.numerics.grids import nearest
from lilliput.numerics.trainable import Trainable


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
def test_what_is_trained_is_what_is_stored_and_grids_get_its_gradient(group_size: int, sym: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 48, generator=draw)
    layer = Trainable(weight, nearest(weight, (2, 4), group_size, sym), codes=True)
    with torch.no_grad():
        for grid in layer.grids():  # by far less than what a byte can say, and by more
            grid.add_(torch.randn(grid.shape, generator=draw) * torch.tensor([0.001, 0.1]).repeat(3)[:, None])
    made = layer.quantized(4)
    for bits in (2, 4):
        assert torch.allclose(layer.at(bits), made.dequantize(bits), atol=1e-6)
    layer.at(2).square().sum().backward()
    moved = [grid.grad for name, grid in layer.named() if name.endswith(".2")]
    assert len(moved) == (1 if sym else 2)
    assert all(grad is not None and bool((grad != 0).all()) for grad in moved)
