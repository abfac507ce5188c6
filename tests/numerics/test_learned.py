import pytest
import torch

from lilliput.numerics.grids import nearest
from lilliput.numerics.learned import LearnedGrid, signed_step

WEIGHT = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
WEIGHT[0], WEIGHT[1] = 0.0, 0.25  # nothing to span, and nothing to span away from zero
LADDER = (2, 3, 4, 8)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_trained_is_what_is_stored(sym: bool, rounding: bool, shared: bool) -> None:
    grid = LearnedGrid(WEIGHT, LADDER, 16, sym, rounding, shared)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in grid.parameters:
            value += 0.1 * torch.randn(value.shape, generator=generator)
        stored = grid.quantized(WEIGHT)
        for width in LADDER:
            made = grid.at(WEIGHT, width)
            off = (made - stored.dequantize(width)).abs()
            assert torch.isfinite(made).all()
            # rounding the grid to float16 moves a level by a 2000th, and a few weights to the next code of 8 bits
            assert off.median() <= 2e-3
            assert (off <= 0.05 * 2 ** (8 - width)).all()


@pytest.mark.parametrize("sym", [False, True])
def test_with_open_bounds_it_is_rounding_to_nearest(sym: bool) -> None:
    grid, plain = LearnedGrid(WEIGHT, (4,), 16, sym, False), nearest(WEIGHT, (4,), 16, sym)
    for bound in grid.bounds:
        bound.data.fill_(40.0)  # sigmoid(40) is 1
    made = grid.quantized(WEIGHT)
    assert torch.equal(made.codes, plain.codes)
    assert torch.equal(made.dequantize(4), plain.dequantize(4))


def test_narrower_widths_start_at_the_least_squares_grid_of_their_codes() -> None:
    grid, weight = LearnedGrid(WEIGHT, LADDER, 16, False, False), WEIGHT[2:]
    start = grid.quantized(WEIGHT)
    plain = nearest(WEIGHT, LADDER, 16, False)
    for width in (2, 3, 4):
        errors = [float((made.dequantize(width)[2:] - weight).norm()) for made in (start, plain)]
        assert errors[0] <= 1.05 * errors[1]


def test_every_parameter_and_the_weight_get_a_gradient() -> None:
    grid, weight = LearnedGrid(WEIGHT, LADDER, 16, False, True), WEIGHT.clone().requires_grad_()
    sum((grid.at(weight, b) * torch.linspace(-1, 1, 40)).sum() for b in LADDER).backward()  # type: ignore[union-attr]
    for value in (*grid.parameters, weight):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()
        assert value.grad[2:].abs().sum() > 0


def test_a_signed_step_stays_within_reach() -> None:
    value = torch.tensor([0.0, 0.45, -0.2], requires_grad=True)
    (value * torch.tensor([3.0, -1.0, 0.0])).sum().backward()
    signed_step(value, 0.1, 0.5)
    assert value.tolist() == pytest.approx([-0.1, 0.5, -0.2])
    assert value.grad is None
