import pytest
import torch

from lilliput.methods.quantize.rtn import RTN

WEIGHT = torch.randn(16, 688, generator=torch.Generator().manual_seed(0))


def test_one_width_is_plain_round_to_nearest() -> None:
    weight = torch.tensor([[-1.0, -0.4, 0.1, 2.0]])
    made = RTN(bits=(2,), group_size=-1).solve(weight, None)
    assert made.codes.tolist() == [[0, 1, 1, 3]]  # levels -1, 0, 1, 2
    assert torch.allclose(made.dequantize(2), torch.tensor([[-1.0, 0.0, 0.0, 2.0]]), atol=1e-3)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_what_is_on_the_grid_is_left_as_it_is(group_size: int, sym: bool) -> None:
    method = RTN(bits=(4,), group_size=group_size, sym=sym, ragged=True)
    once = method.solve(WEIGHT, None).dequantize(4)
    twice = method.solve(once, None).dequantize(4)
    assert torch.allclose(twice, once, atol=1e-2 * float((once - WEIGHT).abs().max()))


def test_a_group_that_is_a_row_is_the_row() -> None:
    whole, row = (RTN(bits=(3,), group_size=g, ragged=True).solve(WEIGHT[:, :64], None) for g in (64, -1))
    assert torch.equal(whole.codes, row.codes)
    assert torch.equal(whole.scale[3], row.scale[3])


def test_symmetric_levels_stand_evenly_around_zero() -> None:
    made = RTN(bits=(2,), group_size=-1, sym=True).solve(torch.tensor([[-3.0, -0.2, 0.2, 1.9]]), None)
    assert torch.allclose(made.dequantize(2), torch.tensor([[-3.0, -1.0, 1.0, 1.0]]), atol=3e-3)
    assert not made.zero


@pytest.mark.parametrize("bits", [(2,), (5,), (8,), (2, 3, 4, 8), (3, 6)])
def test_the_widths_asked_for_are_the_widths_served(bits: tuple[int, ...]) -> None:
    made = RTN(bits=bits, ragged=True).solve(WEIGHT, None)
    assert made.bits == bits
    assert int(made.codes.max()) < 2 ** bits[-1]
    assert set(made.scale) == set(made.zero) == set(bits)


def test_smaller_groups_err_less() -> None:
    errors = [
        float((RTN(group_size=g, bits=(4,), ragged=True).solve(WEIGHT, None).dequantize(4) - WEIGHT).norm())
        for g in (-1, 128, 64, 32)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_group_size_that_does_not_divide_is_refused_with_what_does() -> None:
    with pytest.raises(
        ValueError,
        match=r"^layers\.3\.mlp\.down_proj: group_size 64 does not divide 688 columns\. "
        r"Use group_size 16, set ragged: true for a shorter last group, or exclude this layer\.$",
    ):
        RTN(group_size=64).check("layers.3.mlp.down_proj", 256, 688)
    RTN(group_size=64, ragged=True).check("layers.3.mlp.down_proj", 256, 688)
    RTN(group_size=-1).check("layers.3.mlp.down_proj", 256, 688)


@pytest.mark.parametrize("bits", [(), (1, 4), (4, 2), (9,), (4, 4)])
def test_widths_out_of_range_or_order_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^rtn\.bits: .* Give widths such as \[4\] or \[2, 3, 4, 8\]\.$"):
        RTN(bits=bits)


@pytest.mark.parametrize("group_size", [0, -2, 2, 33])
def test_a_group_size_no_kernel_reads_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=r"^rtn\.group_size: group_size is -?\d+\. Give -1 for whole rows"):
        RTN(group_size=group_size)


def test_the_ends_may_have_widths_of_their_own() -> None:
    method = RTN(end_bits=(4, 8))
    assert method.at("embed_tokens").bits == method.at("lm_head").bits == (4, 8)
    assert method.at("layers.0.attn.q_proj").bits == (2, 3, 4, 8)
