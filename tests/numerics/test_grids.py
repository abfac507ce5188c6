import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.numerics.grids import Refit, encode, minmax_grid, nest, stored_scale, stored_zero
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import pack_scales, pack_zeros, unpack_scales, unpack_zeros

LADDER = (2, 3, 4, 8)


def weights(out: int = 24, columns: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def nested(
    weight: Tensor, group_size: int, sym: bool, bits: tuple[int, ...] = LADDER, shared: bool = False
) -> Quantized:
    scale, zero = minmax_grid(weight, bits[-1], group_size, sym)
    codes = encode(weight, scale, zero, bits[-1], group_size)
    return nest(weight, codes, scale, zero, bits, group_size, shared=shared)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_errs_by_half_a_step_at_most(bits: int, group_size: int, sym: bool) -> None:
    weight = weights()
    grid = nested(weight, group_size, sym, (bits,))
    size = 200 if group_size == -1 else group_size
    step = grid.scale[bits].float().repeat_interleave(size, 1)[:, :200]
    # Scales are rounded to 11 bits, in bytes to 7: the outermost level, 2^(bits-1) steps out, may miss the extreme by that,
    # and by half of what a zero's byte counts.
    slack = 2.0**-11 * (2 ** (bits - 1) + 2) if group_size == -1 else 2.0**-7 * 2 ** (bits - 1) + 2.0 ** (bits - 9)
    assert ((grid.dequantize(bits) - weight).abs() <= step * (0.5 + slack)).all()


@pytest.mark.parametrize("sym", [True, False])
def test_a_narrow_width_is_the_least_squares_line_of_its_codes(sym: bool) -> None:
    weight = weights(columns=64)
    grid = nested(weight, 64, sym)
    for bits in LADDER[:-1]:
        code = (grid.codes >> (8 - bits)).double() - (2**bits - 1) / 2
        ones = [] if sym else [torch.ones_like(code)]
        for row in range(len(weight)):
            basis = torch.stack([code[row], *[o[row] for o in ones]], 1)
            best = basis @ torch.linalg.lstsq(basis, weight[row].double()[:, None]).solution
            least = (best[:, 0] - weight[row]).norm()
            found = (grid.dequantize(bits)[row] - weight[row]).norm()
            assert found <= least * 1.0005 + 1e-6  # float16 scale and zero, at the flat bottom of a parabola


@pytest.mark.parametrize("sym", [True, False])
def test_error_falls_with_every_width_and_beats_plain_rounding_of_that_width(sym: bool) -> None:
    weight = weights()
    grid = nested(weight, 64, sym)
    errors = [float((grid.dequantize(b) - weight).norm()) for b in LADDER]
    assert errors == sorted(errors, reverse=True)
    for bits, error in zip(LADDER[:-1], errors, strict=False):
        assert error < float((nested(weight, 64, sym, (bits,)).dequantize(bits) - weight).norm())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e-7, 2e4])
def test_equal_weights_survive_every_width(value: float, sym: bool) -> None:
    weight = torch.full((3, 64), value)
    grid = nested(weight, 64, sym)
    for bits in LADDER:
        assert torch.allclose(grid.dequantize(bits), weight, rtol=2**-10, atol=6e-8)  # the smallest float16


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e-4, 2e4])
@pytest.mark.parametrize("group_size", [64, -1])
def test_equal_weights_survive_every_width_of_a_shared_grid(value: float, group_size: int) -> None:
    weight = torch.full((3, 64), value)
    if group_size == 64:
        weight = torch.cat([weight, (value or 1) * weights(3, 64)], 1)
    grid = nested(weight, group_size, False, shared=True)
    # No zero in a byte puts levels of all widths on one value: an eighth of a narrow step remains, and the row's ratio.
    slack = 2.0**-10 if group_size == -1 else 0.1
    for bits in LADDER:
        assert torch.allclose(grid.dequantize(bits)[:, :64], weight[:, :64], rtol=slack, atol=6e-8)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 64, 96])
@pytest.mark.parametrize("bits", [LADDER, (2, 3, 4), (3, 8)])
def test_a_shared_grid_loses_little(bits: tuple[int, ...], group_size: int, sym: bool) -> None:
    weight = weights()
    one, own = (nested(weight, group_size, sym, bits, shared) for shared in (True, False))
    assert (list(one.scale), list(one.ratio)) == ([bits[0]], list(bits))
    assert all(r.dtype == torch.uint8 and r.shape == (24,) for r in one.ratio.values())
    assert (one.zero == {}) is sym
    for b in bits:
        errors = [float((made.dequantize(b) - weight).norm()) for made in (one, own)]
        assert errors[0] < 1.03 * errors[1]
    step = one.grid(bits[-1])[0].repeat_interleave(200 if group_size == -1 else group_size, 1)[:, :200]
    slack = 0.6 if group_size == -1 else 0.5 + (2.0**-7 + 2.0**-8) * 2 ** (bits[-1] - 1) + 2.0 ** (bits[-1] - 9)
    assert ((one.dequantize(bits[-1]) - weight).abs() <= step * slack).all()


def test_a_tiny_span_on_a_large_offset_keeps_the_offset() -> None:
    weight = 100 + 1e-3 * weights(4, 64)
    grid = nested(weight, 64, False)
    for bits in LADDER:
        assert torch.allclose(grid.dequantize(bits), weight, rtol=1e-3)


def test_the_short_last_group_has_its_own_range() -> None:
    weight = torch.cat([torch.ones(2, 64), torch.linspace(-5, 9, 16).expand(2, 16)], 1)
    grid = nested(weight, 64, False)
    assert grid.scale[8].shape == (2, 2)
    assert torch.allclose(grid.dequantize(8)[:, :64], weight[:, :64], rtol=1e-2)
    assert torch.allclose(grid.dequantize(8)[:, 64:], weight[:, 64:], atol=14 / 255 * 1.6)


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_what_rounding_leaves_is_what_bytes_say(seed: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(4 * torch.randn(5, groups, generator=draw)).clamp_max(6e4)
    scale = scale * (torch.rand(5, groups, generator=draw) > 0.1)
    kept = stored_scale(scale)
    stored, unit = pack_scales(kept.numpy())
    assert np.array_equal(unpack_scales(stored, unit), kept.numpy())
    assert torch.equal(stored_scale(kept), kept)
    assert ((kept == 0) == (scale == 0)).all()
    near = scale > scale.amax(1, keepdim=True) / 4
    assert ((kept.float() / scale - 1)[near & (scale < 6e4) & (scale > 1e-4)].abs() <= 2.0**-7).all()
    for bits in (2, 4, 7, 8):
        zero = stored_zero(2 ** (bits - 1) * torch.randn(5, groups, generator=draw), bits).numpy()
        assert np.array_equal(unpack_zeros(pack_zeros(zero, bits), bits), zero)


def test_a_group_beyond_zero_gets_a_grid_that_reaches_towards_it() -> None:
    weight = torch.cat([torch.linspace(5, 9, 64).expand(2, 64), torch.randn(2, 64)], 1)
    for bits in (2, 4, 8):
        made = nested(weight, 64, False, (bits,))
        most = 0.5 + 2.0**-6 * 2 ** (bits - 1) + 2.0 ** (bits - 9)
        assert (made.dequantize(bits) - weight)[:, :64].abs().max() <= most * float(made.scale[bits][:, 0].max())


def test_importance_pulls_the_fit_towards_the_columns_that_matter() -> None:
    weight = weights(columns=64)
    codes = encode(weight, *minmax_grid(weight, 8, 64, False), 8, 64) >> 6
    importance = torch.ones(64)
    importance[:8] = 1000.0
    plain = Refit(weight, 64).grid(codes, 2, False)
    pulled = Refit(weight, 64, importance).grid(codes, 2, False)

    def error(grid: tuple[Tensor, Tensor | None]) -> float:
        assert grid[1] is not None
        made = Quantized(codes, (2,), 64, {2: grid[0]}, {2: grid[1]}).dequantize(2)
        return float((importance * (made - weight) ** 2).sum())

    assert error(pulled) < error(plain)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^scale: weights need a step of 2e\+06, beyond float16\. Exclude this layer"):
        minmax_grid(torch.tensor([[0.0, 6e6]]), 2, -1, False)


def test_slices_of_rows_stack_to_the_whole() -> None:
    weight = weights()
    whole = nested(weight, 64, False)
    parts = Quantized.stack([nested(weight[:10], 64, False), nested(weight[10:], 64, False)])
    assert torch.equal(whole.codes, parts.codes)
    assert all(torch.equal(whole.dequantize(b), parts.dequantize(b)) for b in LADDER)
    assert torch.equal(whole.rows(torch.tensor([3, 3, 0])).dequantize(3), whole.dequantize(3)[[3, 3, 0]])


def test_a_width_outside_the_ladder_is_served_by_the_next_wider() -> None:
    grid = nested(weights(), 64, False, (4, 8))
    assert [grid.serving(b) for b in (2, 3, 4, 5, 8)] == [4, 4, 4, 8, 8]
    assert nested(weights(), 64, False, (2, 4)).serving(8) == 4
