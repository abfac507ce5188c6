import numpy as np
import pytest

from lilliput.engine import native

VARIANTS = native.variants("quantize_i8")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 32, 200, 513])
@pytest.mark.parametrize("group_size", [-1, 7, 16, 32, 64, 128])
def test_it_is_the_formula_in_float32(columns: int, group_size: int, variant: str) -> None:
    x = np.random.default_rng(columns).standard_normal((3, columns + 1), dtype=np.float32)[:, 1:]
    codes, scale, total = native.quantize_i8(x, group_size, variant=variant)
    group = columns if group_size == -1 else group_size
    for g, begin in enumerate(range(0, columns, group)):
        part = x[:, begin : begin + group]
        wanted = np.abs(part).max(axis=1) / np.float32(127)
        assert np.array_equal(scale[:, g], wanted)
        assert np.array_equal(codes[:, begin : begin + group], np.rint(part / wanted[:, None]).astype(np.int8))
        assert np.array_equal(total[:, g], codes[:, begin : begin + group].sum(axis=1, dtype=np.int32))
    assert scale.shape == total.shape == (3, -(-columns // group))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_go_to_even_and_extremes_stay_within_127(variant: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]], np.float32)
    assert native.quantize_i8(x, -1, variant=variant)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    rng = np.random.default_rng(0)
    wild = (rng.standard_normal((64, 64)) * 10.0 ** rng.integers(-44, 38, (64, 1))).astype(np.float32)
    assert np.abs(native.quantize_i8(wild, 32, variant=variant)[0].astype(int)).max() == 127


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_and_subnormals_are_nothing_and_what_is_not_finite_is_not_hidden(variant: str) -> None:
    x = np.ones((1, 5 * 32), np.float32)
    x[0, :32], x[0, 32:64], x[0, 70], x[0, 100] = 0, 1e-40, np.inf, np.nan
    codes, scale, total = native.quantize_i8(x, 32, variant=variant)
    assert np.array_equal(scale[0], np.array([0, 0, np.nan, np.nan, 1 / np.float32(127)], np.float32), equal_nan=True)
    assert not codes[0, :128].any()
    assert total[0].tolist() == [0, 0, 0, 0, 32 * 127]
