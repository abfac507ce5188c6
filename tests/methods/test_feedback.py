"""Roundings from a sweep: the offsets mean the codes that were chosen, and the rounded model is closer for it."""

import pytest
import torch

from lilliput.methods.feedback import INSIDE, offsets
from lilliput.numerics.nested import Quantized
from lilliput.numerics.straight import coded_rows


def beside(weight: torch.Tensor, bits: int, share: torch.Tensor | float) -> Quantized:
    """The codes of a matrix, each of them up to one away from the nearest."""
    near = coded_rows(weight, share, bits)
    away = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(1))
    codes = (near.codes.to(torch.int16) + away).clamp(0, 2**bits - 1).to(torch.uint8)
    return Quantized(codes, near.bits, near.group_size, near.scale, near.zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("share", [1.0, torch.ones(24, 2)], ids=["symmetric", "zeros"])
def test_offsets_round_to_the_codes_given(bits: int, share: torch.Tensor | float) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight[:12] += 1
    wanted = beside(weight, bits, share)
    found = offsets(weight, wanted)
    assert torch.equal(coded_rows(weight, share, bits, found).codes, wanted.codes)
    assert float(found.abs().max()) <= 1.5 + INSIDE  # half a step more where a whole zero cuts the end of a row


def test_offsets_are_none_where_a_weight_is_well_inside_its_cell() -> None:
    weight = torch.tensor([[0.9, 1.1, 2.2, 3.4, 5.0, -8.0, 7.0]])
    steps = coded_rows(weight, 1.0, 4)
    assert float(steps.scale[4]) == 1.0
    assert torch.allclose(offsets(weight, steps), torch.tensor([[0.0, 0.0, 0.0, -0.15, 0.0, 0.0, 0.0]]), atol=1e-6)
