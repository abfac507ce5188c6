"""Rounding with gradients: the values, the gradients of the card's section 3, and what is stored."""

import pytest
import torch
from torch import Tensor

from lilliput.numerics.grids import F16_MIN
from lilliput.numerics.straight import best_share, coded_rows, on_grid, on_rows, row_grids


def written_out(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The same with torch's own gradients: rounding lets them through, the clamp does not."""
    top = 2 ** (bits - 1)
    whole = zero + (zero.round() - zero).detach()
    u = x / step
    code = u + (u.round() - u).detach() + whole
    return (torch.clamp(code, -top, top - 1) - whole) * step


@pytest.mark.parametrize("bits", [8, 16])
def test_gradients_are_those_of_the_expression_written_out(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(64, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    step = torch.tensor(3.5 / 2**bits, dtype=torch.float64)  # a range of 3.5: some are outside
    zero = torch.tensor(0.2 * 2**bits + 0.3, dtype=torch.float64)
    found = []
    for rounded in (on_grid, written_out):
        given = [value.clone().requires_grad_() for value in (x, step, zero)]
        out = rounded(*given, bits)
        out.backward(pull)
        found.append((out.detach(), [g.grad for g in given]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert 0 < int((found[0][1][0] == 0).sum()) < x.numel()
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_every_code_is_its_own_rounding() -> None:
    codes = torch.arange(-128, 128)
    step, zero = torch.tensor(0.037), torch.tensor(-41.0)
    values = (codes - zero) * step
    assert torch.equal(on_grid(values, step, zero, 8), values)


def test_rows_mean_what_is_stored() -> None:
    weight = torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    weight[4] = F16_MIN / 100
    weight[5] = weight[5].abs() + 1
    weight[6] = -weight[5]
    for bits, share in ((4, 0.7), (8, 1.0), (4, torch.full((9, 2), 0.9)), (8, torch.rand(9, 2))):
        coded = coded_rows(weight, share, bits)
        assert torch.equal(coded.dequantize(bits), on_rows(weight, share, bits))
        assert int(coded.codes.max()) < 2**bits
    assert (on_rows(weight, 1.0, 8) - weight).abs().max() <= row_grids(weight, 1.0, 8)[0].max() * 0.51


def test_rows_pass_gradients_to_the_weight_and_to_the_share() -> None:
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    share = torch.full((5, 1), 0.6, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    on_rows(weight, share, 4).backward(pull)
    found = weight.grad, share.grad
    weight.grad = share.grad = None
    reach = torch.maximum(weight.amax(1, keepdim=True) / 7, -weight.amin(1, keepdim=True) / 8) * share
    step = reach + (row_grids(weight, share, 4)[0] - reach).detach()
    written_out(weight, step, torch.zeros((), dtype=torch.float64), 4).backward(pull)
    for one, other in zip(found, (weight.grad, share.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


def test_zeros_are_whole_and_at_the_end_of_rows_of_one_sign() -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    for bits in (4, 8):
        step, zero = row_grids(weight, torch.ones(3, 2), bits)
        assert torch.equal(zero, zero.round())
        assert zero[1:, 0].tolist() == [0, 2**bits - 1]
        assert 0 < float(zero[0]) < 2**bits - 1
        coded = coded_rows(weight, torch.ones(3, 2), bits)
        assert torch.equal(coded.zero[bits].float() + (2**bits - 1) / 2, zero)
        # no row needs more steps than its codes, so none is cut by more than the rounding of the zero
        assert ((coded.dequantize(bits) - weight).abs() <= 1.01 * step).all()
        symmetric = (on_rows(weight, 1.0, bits) - weight).square().sum(1)
        assert ((coded.dequantize(bits) - weight).square().sum(1)[1:] < symmetric[1:] / 2).all()


def test_rows_with_zeros_pass_gradients_to_the_weight_and_to_both_shares() -> None:
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    share = torch.full((5, 2), 0.6, dtype=torch.float64)
    share[:, 1] = 0.8
    share.requires_grad_()
    pull = torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    on_rows(weight, share, 4).backward(pull)
    found = weight.grad, share.grad
    weight.grad = share.grad = None
    low, high = weight.amin(1, keepdim=True) * share[:, :1], weight.amax(1, keepdim=True) * share[:, 1:]
    step = (high - low) / 15
    step = step + (row_grids(weight, share, 4)[0] - step).detach()
    zero = -low / step - 8
    whole = zero + (zero.round() - zero).detach()
    u = weight / step
    code = u + (u.round() - u).detach() + whole
    ((torch.clamp(code, -8, 7) - whole) * step).backward(pull)
    for one, other in zip(found, (weight.grad, share.grad), strict=True):
        assert one is not None
        assert other is not None
        assert float(other.abs().min(0).values.max()) > 0
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


def test_best_share_cuts_an_outlier_that_nothing_reads_and_keeps_one_that_counts() -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    weight[0, 5] = 30.0
    quiet, loud = torch.ones(64), torch.ones(64)
    quiet[5], loud[5] = 0.0, 1000.0
    assert float(best_share(weight, quiet, 4)) < 0.5
    assert float(best_share(weight, loud, 4)) > 0.9
    down, up = best_share(weight, quiet, 4, sym=False)[0].tolist()
    assert up < 0.5 < down  # only one side has the outlier
