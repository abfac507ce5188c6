from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import StoredLinear
from lilliput.engine import native
from support.stored import gamma, random_linear

LADDERS = [(b,) for b in range(1, 9)] + [(2, 3, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 4), (2, 4, 6, 8), (1, 8), (2, 7)]
SHAPES = [(1, 1), (16, 32), (17, 33), (5, 200), (50, 300), (33, 513)]  # around a tile, a panel of 256 and beyond


@pytest.mark.parametrize("bits", LADDERS, ids=str)
@pytest.mark.parametrize("tables", [(), (1, 2, 3, 4)])
def test_rows_are_the_reference_bit_for_bit_at_every_width(bits: tuple[int, ...], tables: tuple[int, ...]) -> None:
    linear = random_linear(np.random.default_rng(0), 37, 75, bits, 16, tables=tables)
    for width in bits:
        assert np.array_equal(native.nested_rows(linear, width), linear.dequantize(width))


@pytest.mark.parametrize("variant", native.variants("matmul_nested"))
@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_every_ladder_is_within_the_rounding_of_one_sum(bits: tuple[int, ...], variant: str) -> None:
    rng = np.random.default_rng(1)
    linear = random_linear(rng, 20, 300, bits, 64)
    x = rng.standard_normal((3, 300), dtype=np.float32)
    for width in bits:
        weight = linear.dequantize(width).astype(np.float64)
        error = np.abs(native.matmul_nested(linear, width, x, variant=variant) - x.astype(np.float64) @ weight.T)
        assert (error <= gamma(301) * (np.abs(x) @ np.abs(weight).T)).all()


@pytest.mark.parametrize("variant", native.variants("matmul_nested"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 4, 7, 16, 32, 96, 128])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("tables", [(), (3,)])
def test_odd_shapes_and_groups(
    shape: tuple[int, int], group_size: int, sym: bool, tables: tuple[int, ...], variant: str
) -> None:
    rng = np.random.default_rng(2)
    linear = random_linear(rng, *shape, (2, 3, 4), group_size, sym=sym, tables=tables)
    x = rng.standard_normal((11, shape[1]), dtype=np.float32)
    weight = linear.dequantize(3).astype(np.float64)
    y = native.matmul_nested(linear, 3, x, variant=variant)
    assert (np.abs(y - x @ weight.T) <= gamma(shape[1] + 1) * (np.abs(x) @ np.abs(weight).T)).all()


@pytest.mark.parametrize("group_size", [-1, 7, 32])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("form", [{}, {"shared": True}, {"tables": (2, 3)}], ids=str)
def test_rows_of_every_grid_are_the_reference_bit_for_bit(
    group_size: int, sym: bool, in_bytes: bool, form: dict[str, Any]
) -> None:
    rng = np.random.default_rng(5)
    linear = random_linear(rng, 37, 75, (2, 3, 4, 8), group_size, sym=sym, in_bytes=in_bytes, **form)
    for width in linear.bits:
        assert np.array_equal(native.nested_rows(linear, width), linear.dequantize(width))


def test_variants_and_blocks_of_tokens_agree_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    _agree(random_linear(rng, 50, 700, (2, 3, 4, 8), 128, shared=True), rng)
    for in_bytes in (False, True):
        for tables in ((), (2, 3, 4)):
            _agree(random_linear(rng, 50, 700, (2, 3, 4, 8), 128, tables=tables, in_bytes=in_bytes), rng)


def _agree(linear: StoredLinear, rng: np.random.Generator) -> None:
    x = rng.standard_normal((19, 700), dtype=np.float32)
    for width in linear.bits:
        alone = np.concatenate([native.matmul_nested(linear, width, row[None], variant="reference") for row in x])
        for variant in native.variants("matmul_nested"):
            assert np.array_equal(native.matmul_nested(linear, width, x, variant=variant), alone)


def test_the_sum_runs_over_inputs_in_order() -> None:
    rng = np.random.default_rng(4)
    linear = random_linear(rng, 3, 90, (4,))
    x = rng.standard_normal((1, 90), dtype=np.float32)
    expected = np.zeros(3, np.float32)
    for k, column in enumerate(linear.dequantize(4).T):
        expected += x[0, k] * column
    assert np.array_equal(native.matmul_nested(linear, 4, x)[0], expected)


def test_subnormal_scales_are_read_exactly() -> None:
    linear = random_linear(np.random.default_rng(5), 16, 32, (4,), spread=2.0**-16)
    assert (np.abs(linear.scale[4]) < 2.0**-14).all()
    assert np.array_equal(native.nested_rows(linear, 4), linear.dequantize(4))
    identity = np.eye(32, dtype=np.float32)
    assert np.array_equal(native.matmul_nested(linear, 4, identity), linear.dequantize(4).T)


def test_a_width_it_does_not_have_runs_at_the_next_one() -> None:
    linear = random_linear(np.random.default_rng(7), 16, 32, (3, 8))
    assert [np.array_equal(native.nested_rows(linear, b), linear.dequantize(b)) for b in (2, 3, 4, 8)] == [True] * 4


def test_an_unknown_variant_or_op_is_refused() -> None:
    linear = random_linear(np.random.default_rng(6), 16, 32, (4,))
    with pytest.raises(ValueError, match="no variant abacus"):
        native.matmul_nested(linear, 4, np.ones((1, 32), np.float32), variant="abacus")
    with pytest.raises(ValueError, match="no op matmul_roman"):
        native.variants("matmul_roman")
