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


def test_a_ratio_widens_the_steps_and_leaves_the_middle() -> None:
    one = Quantized(
        CODES, (2, 4), 2,
        {2: torch.tensor([[1.0, 2.0], [4.0, 8.0]]).half()}, {2: torch.tensor([[0.5, -1.0], [0.25, 3.0]]).half()},
        ratio={2: torch.tensor([128, 64], dtype=torch.uint8), 4: torch.tensor([128, 192], dtype=torch.uint8)},
    )  # fmt: skip
    scale, zero = one.grid(4)
    assert scale.tolist() == [[0.25, 0.5], [4 * 1.25 / 4, 8 * 1.25 / 4]]
    assert one.grid(2)[0].tolist() == [[1.0, 2.0], [3.0, 6.0]]
    assert zero is not None
    torch.testing.assert_close(scale * zero, one.grid(2)[0] * one.grid(2)[1])
    assert one.dequantize(4)[0].tolist() == [0.25 * (-7.5 - 2), 0.25 * (-2.5 - 2), 0.5 * (2.5 + 4), 0.5 * (7.5 + 4)]
    assert torch.equal(Quantized.stack([one.rows(slice(0, 1)), one.rows(slice(1, 2))]).dequantize(4), one.dequantize(4))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("table", [{}, {2: TABLE}])
def test_other_codes_stand_on_the_same_grid(bits: int, table: dict[int, torch.Tensor]) -> None:
    one, other = grid(table), CODES.flip(0)
    assert torch.equal(one.marks(bits, other), replace(one, codes=other).marks(bits))
    assert not torch.equal(one.marks(bits, other), one.marks(bits))
    zero = one.zero[bits].float()[:, :1] if bits in one.zero else 0.0
    assert torch.equal(one.dequantize(bits), 0.5 * (one.marks(bits) - zero))
