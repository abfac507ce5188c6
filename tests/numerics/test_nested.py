"""A nested matrix: where its codes stand."""

from dataclasses import replace

import pytest
import torch

from lilliput.numerics.nested import Quantized

CODES = torch.tensor([[0, 5, 10, 15], [3, 12, 6, 9]], dtype=torch.uint8)
TABLE = torch.tensor([[0, 20, 90, 127], [1, 2, 3, 4]], dtype=torch.uint8)


def grid(table: dict[int, torch.Tensor]) -> Quantized:
    scale = {b: torch.full((2, 2), 0.5, dtype=torch.float16) for b in (2, 4)}
    return Quantized(CODES, (2, 4), 2, scale, {2: torch.full((2, 2), 0.25, dtype=torch.float16)}, table)


def test_marks_count_from_the_middle_of_the_width() -> None:
    assert grid({}).marks(2).tolist() == [[-1.5, -0.5, 0.5, 1.5], [-1.5, 1.5, -0.5, 0.5]]
    assert grid({}).marks(4).tolist() == [[-7.5, -2.5, 2.5, 7.5], [-4.5, 4.5, -1.5, 1.5]]
    assert grid({2: TABLE}).marks(2).tolist() == [[-63.5, -43.5, 26.5, 63.5], [-62.5, -59.5, -61.5, -60.5]]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("table", [{}, {2: TABLE}])
def test_other_codes_stand_on_the_same_grid(bits: int, table: dict[int, torch.Tensor]) -> None:
    one, other = grid(table), CODES.flip(0)
    assert torch.equal(one.marks(bits, other), replace(one, codes=other).marks(bits))
    assert not torch.equal(one.marks(bits, other), one.marks(bits))
    zero = one.zero[bits].float()[:, :1] if bits in one.zero else 0.0
    assert torch.equal(one.dequantize(bits), 0.5 * (one.marks(bits) - zero))
