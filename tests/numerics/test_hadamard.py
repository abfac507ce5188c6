import pytest
import torch

from lilliput.numerics.hadamard import Rotation, core_order, hadamard_core


def draw(size: int, seed: int = 0) -> Rotation:
    return Rotation.draw(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 64, 12, 43, 7 * 16, 11 * 32, 16 * 43, 3 * 25, 9 * 32])
def test_the_map_is_orthogonal(size: int) -> None:
    found = draw(size).matrix()
    assert found.dtype is torch.float64
    assert (found.T @ found - torch.eye(size, dtype=torch.float64)).abs().max() <= 1e-12


@pytest.mark.parametrize("size", [64, 288, 768, 896, 2560, 5632])
def test_where_a_hadamard_core_is_known_every_coordinate_is_spread_evenly(size: int) -> None:
    rotation = draw(size)
    unit = torch.zeros(3, size)
    unit[0, 0], unit[1, size // 3], unit[2, size - 1] = 1, 1, 1
    assert torch.allclose(rotation.right(unit).abs(), torch.tensor(size**-0.5, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize(("size", "order"), [(1, 1), (4096, 1), (896, 28), (5632, 44), (288, 36), (688, 0), (43, 0)])
def test_the_smallest_known_core_is_used(size: int, order: int) -> None:
    assert core_order(size) == order


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 104])
def test_a_core_has_signs_for_entries_and_orthogonal_rows(order: int) -> None:
    core = hadamard_core(order)
    assert torch.equal(core.abs(), torch.ones_like(core))
    assert torch.equal(core @ core.T, order * torch.eye(order, dtype=torch.float64))


def test_without_a_core_a_coordinate_is_still_spread() -> None:
    found = draw(688).matrix()
    assert found.abs().max() <= 5 * 688**-0.5  # 43 * 43 normal entries stay below five deviations


def test_the_seed_decides() -> None:
    assert torch.equal(draw(96).matrix(), draw(96).matrix())
    assert not torch.equal(draw(96).matrix(), draw(96, seed=1).matrix())


def test_right_is_the_product_with_the_matrix() -> None:
    x = torch.randn(2, 3, 88, generator=torch.Generator().manual_seed(2))
    rotation = draw(88)
    assert torch.allclose(rotation.right(x), x.double() @ rotation.matrix(), atol=1e-12)
