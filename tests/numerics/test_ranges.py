import pytest
import torch

from lilliput.numerics.grids import encode, minmax_grid, nest
from lilliput.numerics.ranges import best_range

WEIGHT = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) ** 3
IMPORTANCE = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 3


def errors(scale: torch.Tensor, zero: torch.Tensor | None, bits: tuple[int, ...]) -> torch.Tensor:
    codes = encode(WEIGHT, scale, zero, bits[-1], 32)
    made = nest(WEIGHT, codes, scale, zero, bits, 32, IMPORTANCE)
    return torch.stack([((made.dequantize(b) - WEIGHT).square() * IMPORTANCE).sum(1) for b in bits], 1)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_found_serves_better_than_the_whole_one(bits: int, sym: bool) -> None:
    found = errors(*best_range(WEIGHT, (bits,), 32, sym, IMPORTANCE, 0.6), (bits,))
    whole = errors(*minmax_grid(WEIGHT, bits, 32, sym), (bits,))
    assert bool((found <= whole * 1.01).all())
    assert float(found.sum()) < 0.9 * float(whole.sum())


def test_the_search_from_coarse_to_fine_agrees_with_all_pairs() -> None:
    row = WEIGHT[:4, :32]
    importance = IMPORTANCE[:32]
    scale, zero = best_range(row, (2,), 32, False, importance, 0.6)
    assert zero is not None
    made = (
        (nest(row, encode(row, scale, zero, 2, 32), scale, zero, (2,), 32).dequantize(2) - row).square() * importance
    ).sum(1)
    low, high = row.amin(1, keepdim=True), row.amax(1, keepdim=True)
    best = torch.full((4,), torch.inf)
    for i in range(32):
        for j in range(32):
            left, right = low + i / 64 * (high - low), high - j / 64 * (high - low)
            step = (right - left) / 3
            level = ((row - left) / step).round().clamp(0, 3) * step + left
            best = torch.minimum(best, ((level - row).square() * importance).sum(1))
    assert bool((made <= best * 1.25).all())
    assert float(made.sum()) <= 1.02 * float(best.sum())


def test_a_ladder_weighs_its_widths_by_the_balance() -> None:
    narrow = errors(*best_range(WEIGHT, (2, 8), 32, False, IMPORTANCE, 0.0), (2, 8)).sum(0)
    wide = errors(*best_range(WEIGHT, (2, 8), 32, False, IMPORTANCE, 3.0), (2, 8)).sum(0)
    assert float(narrow[0]) < float(wide[0])
    assert float(narrow[1]) > float(wide[1])
