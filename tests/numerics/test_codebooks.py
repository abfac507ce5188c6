import pytest
import torch
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.numerics import codebooks
from lilliput.numerics.codebooks import encode, from_centroids, positions, refit, round_table
from lilliput.numerics.grids import minmax_grid
from lilliput.numerics.nested import Quantized, look_up


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(table: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The levels of whole rows in float64, (out, 2**b)."""
    shift = 0.0 if zero is None else zero.double()
    return scale.double() * (table.double() - 63.5 - shift)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_centroid_is_met_within_half_a_level(bits: int, sym: bool) -> None:
    centroids = normal(50, 2**bits).sort(1).values * torch.logspace(-3, 3, 50)[:, None]
    table, scale, zero = from_centroids(centroids, sym)
    assert (table.dtype, table.shape, zero is None) == (torch.uint8, (50, 2**bits), sym)
    assert (table[:, 1:] >= table[:, :-1]).all()
    assert int(table.max()) <= 127
    # scale and zero are rounded to 11 bits, which moves a level by that part of its distance from 0, and of the zero
    reach = 64 + (0 if zero is None else 2 * zero.double().abs())
    assert ((levels(table, scale, zero) - centroids).abs() <= scale.double() * (0.5 + 2.0**-11 * reach)).all()
    if zero is not None:
        near = zero[:, 0].abs() < 200
        assert near.sum() > 20
        assert (table[near][:, 0] <= 1).all()
        assert (table[near][:, -1] >= 126).all()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e-7, 2e4])
def test_equal_centroids_have_one_level_on_their_value(value: float, sym: bool) -> None:
    table, scale, zero = from_centroids(torch.full((3, 4), value), sym)
    assert (table == table[:, :1]).all()
    assert torch.allclose(
        levels(table, scale, zero), torch.full((3, 4), value, dtype=torch.float64), rtol=1e-3, atol=3e-8
    )


def test_zero_rows_among_others_stay_zero_and_repeated_centroids_stay_equal() -> None:
    centroids = torch.tensor([[0.0, 0, 0, 0], [-1, -1, 2, 2], [0.5, 0.5, 0.5, 4]])
    table, scale, zero = from_centroids(centroids)
    made = levels(table, scale, zero)
    assert torch.equal(made[0], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(made[:, 1:] == made[:, :-1], centroids[:, 1:] == centroids[:, :-1])
    weight = torch.tensor([[0.0, 0, 0], [-1, 2, 0.4], [0.4, 4, 3]])
    found = made.gather(1, encode(weight, table, scale, zero, -1).long())
    assert torch.allclose(found, torch.tensor([[0, 0, 0], [-1, 2, -1], [0.5, 4, 4]]).double(), rtol=2e-3)


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
    assert -0.3 < float(at.min()) < 0.3
    assert 126.7 < float(at.max()) < 127.3
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


def test_refit_undoes_the_rounding_of_centroids_on_the_whole() -> None:
    weight = normal(40, 400).pow(3)
    centroids = torch.quantile(weight, torch.linspace(0.02, 0.98, 4), dim=1).T.contiguous()
    table, scale, zero = from_centroids(centroids)
    codes = encode(weight, table, scale, zero, -1)

    def error(s: Tensor, z: Tensor | None) -> float:
        assert z is not None
        return float((Quantized(codes, (2,), -1, {2: s}, {2: z}, {2: table}).dequantize(2) - weight).square().sum())

    assert error(*refit(weight, codes, table, -1, False)) < 0.97 * error(scale, zero)


@pytest.mark.parametrize("bad", [[3.0, 2, 4, 5], [0.0, float("nan"), 1, 2], [0.0, 1, 2, float("inf")]])
def test_what_is_no_codebook_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        from_centroids(torch.tensor([bad]))
    with pytest.raises(ValueError, match="in order"):
        round_table(torch.tensor([bad]))


def test_too_many_centroids_and_too_wide_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 a row"):
        from_centroids(torch.arange(32.0)[None])
    with pytest.raises(ConfigError, match="beyond float16"):
        from_centroids(torch.tensor([[-1e9, 1e9]]))


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
