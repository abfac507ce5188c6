import pytest
import torch
from torch import Tensor

from lilliput.numerics import codebooks
from lilliput.numerics.codebooks import encode, positions, refit, round_table
from lilliput.numerics.grids import minmax_grid
from lilliput.numerics.nested import Quantized, look_up


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_encode_takes_the_nearest_level(bits: int, group_size: int, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "_CHUNK", 700)  # several slices, the last one short
    weight = normal(17, 100)
    scale, zero = minmax_grid(weight, 7, group_size, sym)
    table = round_table(torch.rand(17, 2**bits, generator=torch.Generator().manual_seed(1)).mul(127).sort(1).values)
    codes = encode(weight, table, scale, zero, group_size)
    size = 100 if group_size == -1 else group_size
    wide = [None if t is None else t.double().repeat_interleave(size, 1)[:, :100, None] for t in (scale, zero)]
    every = wide[0] * (table.double()[:, None] - 63.5 - (0 if wide[1] is None else wide[1]))  # (out, in, levels)
    error = (every - weight[..., None]).abs()
    chosen = error.gather(2, codes.long()[..., None])[..., 0]
    assert (chosen <= error.amin(2) + 1e-5 * wide[0][..., 0]).all()
    grid = Quantized(codes, (bits,), group_size, {bits: scale}, {} if zero is None else {bits: zero}, {bits: table})
    assert torch.allclose(grid.dequantize(bits).double(), every.gather(2, codes.long()[..., None])[..., 0], rtol=1e-6)


def test_positions_are_the_inverse_of_the_grid() -> None:
    weight = normal(9, 70)
    scale, zero = minmax_grid(weight, 7, 32, False)
    assert zero is not None
    at = positions(weight, scale, zero, 32)
    assert -1 < float(at.min()) < 1  # a scale in a byte is off by a 128th at most
    assert 126 < float(at.max()) < 128
    wide = [t.float().repeat_interleave(32, 1)[:, :70] for t in (scale, zero)]
    assert torch.allclose((at - 63.5 - wide[1]) * wide[0], weight, atol=1e-5)


def test_ties_go_to_the_lower_code() -> None:
    table = torch.tensor([[10, 20, 30, 40]], dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=torch.float16)
    weight = torch.tensor([[15.0, 25.0, 35.0, 15.001, -99, 99]]) - 63.5
    assert encode(weight, table, one, None, -1).tolist() == [[0, 1, 2, 1, 0, 3]]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 40])
def test_refit_is_the_weighted_least_squares_line(group_size: int, sym: bool) -> None:
    weight, importance = normal(12, 80), torch.rand(80, generator=torch.Generator().manual_seed(2)) + 0.1
    table = round_table(torch.rand(12, 8, generator=torch.Generator().manual_seed(3)).mul(127).sort(1).values)
    scale, zero = minmax_grid(weight, 7, group_size, sym)
    codes = encode(weight, table, scale, zero, group_size)
    fitted, shift = refit(weight, codes, table, group_size, sym, importance)
    made = Quantized(codes, (3,), group_size, {3: fitted}, {} if shift is None else {3: shift}, {3: table}).dequantize(
        3
    )
    size = 80 if group_size == -1 else group_size
    entry = look_up(table, codes).double() - 63.5
    for row in range(12):
        for at in range(0, 80, size):
            part = slice(at, at + size)
            root = importance[part].double().sqrt()
            basis = torch.stack([entry[row, part], *([] if sym else [torch.ones(size).double()])], 1) * root[:, None]
            goal = weight[row, part].double() * root
            least = (basis @ torch.linalg.lstsq(basis, goal[:, None]).solution - goal[:, None]).norm()
            assert ((made[row, part] - weight[row, part]) * root).norm() <= least * 1.001 + 1e-6


@pytest.mark.parametrize(
    "bad", [[3.0, 2, 4, 5], [0.0, float("nan"), 1, 2], [0.0, 1, 2, float("inf")], [float(n) for n in range(17)]]
)
def test_what_is_no_codebook_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="at most 16 a row, finite and in order"):
        round_table(torch.tensor([bad]))


def test_rows_stack_and_look_up_go_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    table = round_table(normal(10, 4).sort(1).values * 20 + 60)
    codes = torch.randint(0, 4, (10, 33), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    whole = look_up(table, codes)
    monkeypatch.setattr("lilliput.numerics.nested._CHUNK", 100)
    assert torch.equal(look_up(table, codes), whole)
    assert torch.equal(whole[7, :5], torch.stack([table[7, c] for c in codes[7, :5].tolist()]))
    scale = {2: torch.ones(10, 1, dtype=torch.float16), 4: torch.ones(10, 1, dtype=torch.float16)}
    grid = Quantized(codes, (2, 4), -1, scale, {}, {2: table})
    parts = [grid.rows(slice(0, 3)), grid.rows(torch.arange(3, 10))]
    again = Quantized.stack(parts)
    for bits in (2, 4):  # 4 has no table and stays affine
        assert torch.equal(again.dequantize(bits), grid.dequantize(bits))
    assert torch.equal(grid.dequantize(4), codes.float() - 7.5)
    assert torch.equal(grid.dequantize(2), look_up(table, codes >> 2).float() - 63.5)
