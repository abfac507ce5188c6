from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import StoredLinear
from lilliput.engine import native
from lilliput.numerics.packing import (
    fields_of,
    pack_fields,
    tile_groups,
    tile_table,
    unpack_fields,
    untile_table,
)
from support.stored import gamma, random_linear

LADDERS = [(b,) for b in range(1, 9)] + [(2, 3, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 4), (2, 4, 6, 8), (1, 8), (2, 7)]
WITH_TABLES = [(1,), (2,), (3,), (4,), (2, 3, 4, 8), (1, 2, 3, 4), (1, 3, 8)]
VARIANTS = native.variants("matmul_nested_i8")


def exact(linear: StoredLinear, width: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product in int64 and float64, and the sum of the sizes of what is added up for it."""
    q, xscale, _ = native.quantize_i8(x, linear.group_size)
    count = next(n for n in range(1, len(linear.fields) + 1) if sum(linear.fields[:n]) == width)
    codes = unpack_fields(linear.planes[:count], linear.fields[:count], linear.out, linear.columns).astype(np.int64)
    top = (1 << width) - 1
    if width in linear.table:
        codes, top = np.take_along_axis(untile_table(linear.table[width], linear.out).astype(np.int64), codes, 1), 127
    own, times = linear.grid_at(width), np.ones(linear.out, np.float32)
    if linear.ratio:
        ratio = linear.ratio[width].reshape(-1)[: linear.out]
        times = (ratio.astype(np.float32) + 128) * np.float32(2.0 ** (own - width - 8))
    scale = linear.scales(own).astype(np.float64) * times[:, None]
    zero, stored = np.zeros_like(scale), linear.zeros(own)
    if stored is not None:
        zero = stored.astype(np.float64) * (np.float32(1) / times)[:, None]
    group = linear.columns if linear.group_size == -1 else linear.group_size
    y, size = np.zeros((2, len(x), linear.out))
    for g, begin in enumerate(range(0, linear.columns, group)):
        part = q[:, begin : begin + group].astype(np.int64)
        doubled = 2 * (part @ codes[:, begin : begin + group].T) - top * part.sum(1)[:, None]
        shift = 2 * part.sum(1)[:, None] * zero[:, g]
        factor = scale[:, g] * xscale[:, g].astype(np.float64)[:, None] / 2
        y += factor * (doubled - shift)
        size += np.abs(factor) * (np.abs(doubled) + np.abs(shift))
    return y, size


@pytest.mark.parametrize("group_size", [-1, 7, 16, 32, 64, 128])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("tables", [(), (1, 2, 3, 4)])
def test_the_reference_is_the_formula_up_to_the_rounding_of_floats(
    group_size: int, sym: bool, tables: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    for bits in LADDERS:
        linear = random_linear(rng, 20, 150, bits, group_size, sym=sym, tables=tables)
        x = rng.standard_normal((3, 150), dtype=np.float32)
        for width in bits:
            wanted, size = exact(linear, width, x)
            error = np.abs(native.matmul_nested_i8(linear, width, x, variant="reference") - wanted)
            assert (error <= gamma(linear.groups + 6) * size).all()


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("bits", LADDERS, ids=str)
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128])
def test_every_variant_is_the_reference_bit_for_bit(bits: tuple[int, ...], group_size: int, variant: str) -> None:
    rng = np.random.default_rng(1)
    for out, columns, tokens in [(1, 1, 1), (17, 33, 2), (40, 200, 9), (16, 320, 5), (70, 97, 23), (150, 70, 14)]:
        linear = random_linear(rng, out, columns, bits, group_size, sym=out == 16)
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        for width in bits:
            wanted = native.matmul_nested_i8(linear, width, x, variant="reference")
            assert np.array_equal(native.matmul_nested_i8(linear, width, x, variant=variant), wanted)


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("bits", WITH_TABLES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64])
def test_every_variant_looks_levels_up_as_the_reference_does(
    bits: tuple[int, ...], group_size: int, variant: str
) -> None:
    rng = np.random.default_rng(5)
    for out, columns, tokens in [(1, 1, 1), (17, 33, 2), (40, 200, 9), (16, 320, 5), (70, 97, 23)]:
        linear = random_linear(rng, out, columns, bits, group_size, sym=out == 16, tables=(1, 2, 3, 4))
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        for width in bits:
            wanted = native.matmul_nested_i8(linear, width, x, variant="reference")
            assert np.array_equal(native.matmul_nested_i8(linear, width, x, variant=variant), wanted)


@pytest.mark.parametrize("bits", [(2, 3, 4, 8), (3, 4), (2, 7)], ids=str)
@pytest.mark.parametrize("group_size", [-1, 7, 32, 64])
@pytest.mark.parametrize("form", [{"shared": True}, {"in_bytes": True}, {"shared": True, "in_bytes": True}], ids=str)
def test_a_grid_with_factors_of_rows_is_the_formula_in_every_variant(
    bits: tuple[int, ...], group_size: int, form: dict[str, Any]
) -> None:
    rng = np.random.default_rng(8)
    for out, columns, tokens in [(1, 1, 1), (17, 33, 2), (40, 200, 9), (16, 320, 5), (70, 97, 23), (150, 70, 14)]:
        linear = random_linear(rng, out, columns, bits, group_size, sym=out == 16, **form)
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        for width in bits:
            found = native.matmul_nested_i8(linear, width, x, variant="reference")
            wanted, size = exact(linear, width, x)
            assert (np.abs(found - wanted) <= gamma(linear.groups + 8) * size).all()
            for variant in VARIANTS[1:]:
                assert np.array_equal(native.matmul_nested_i8(linear, width, x, variant=variant), found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", [{}, {"shared": True}, {"tables": (2, 3)}], ids=str)
def test_bytes_are_the_float16_they_stand_for_bit_for_bit(form: dict[str, Any], variant: str) -> None:
    rng = np.random.default_rng(9)
    small = random_linear(rng, 37, 150, (2, 3, 4), 32, in_bytes=True, **form)
    scale = {b: tile_groups(small.scales(b).astype(np.float16)) for b in small.scale}
    zero = {b: tile_groups(found.astype(np.float16)) for b in small.zero if (found := small.zeros(b)) is not None}
    wide = replace(small, scale=scale, zero=zero, unit={})
    x = rng.standard_normal((11, 150), dtype=np.float32)
    for width in small.bits:
        assert np.array_equal(small.scales(small.grid_at(width)), wide.scales(wide.grid_at(width)))
        made, wanted = (native.matmul_nested_i8(m, width, x, variant=variant) for m in (small, wide))
        assert np.array_equal(made, wanted)
        assert np.array_equal(native.matmul_nested(small, width, x), native.matmul_nested(wide, width, x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_even_tables_are_the_affine_grid(width: int, variant: str) -> None:
    rng = np.random.default_rng(6)
    affine = random_linear(rng, 37, 150, (width,), 32, sym=True)
    entries = 63.5 + 7 * (np.arange(1 << width) - ((1 << width) - 1) / 2)  # whole numbers, 7 apart
    table = {width: tile_table(np.tile(entries.astype(np.uint8), (37, 1)))}
    assert np.array_equal(table[width][0, 0], entries)
    affine.scale[width][:] = (affine.scale[width] * 64).astype(np.uint8).astype(np.float16) * 7  # so a 7th is float16
    levels = replace(affine, scale={width: (affine.scale[width] / 7).astype(np.float16)}, table=table)
    x = rng.standard_normal((11, 150), dtype=np.float32)
    wanted = native.matmul_nested_i8(affine, width, x, variant=variant)
    made = native.matmul_nested_i8(levels, width, x, variant=variant)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tables", [(), (2, 3, 4)])
def test_any_number_of_tokens_gives_each_what_it_gets_alone(variant: str, tables: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    linear = random_linear(rng, 83, 330, (2, 3, 4, 8), 64, tables=tables)
    x = rng.standard_normal((40, 330), dtype=np.float32)
    for width in linear.bits:
        alone = np.concatenate([native.matmul_nested_i8(linear, width, row[None]) for row in x])
        for tokens in (*range(1, 18), 32, 33, 40):
            assert np.array_equal(native.matmul_nested_i8(linear, width, x[:tokens], variant=variant), alone[:tokens])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("sign", [-1, 1])
def test_nothing_saturates_at_the_extremes(code: int, sign: int, variant: str) -> None:
    rng = np.random.default_rng(3)
    for bits in [(2, 3, 4, 8), (4, 8), (8,), (2, 7)]:
        linear = random_linear(rng, 16, 2048, bits, -1, sym=True)
        full = np.full((16, 2048), code >> (8 - bits[-1]), np.uint8)
        linear = replace(linear, planes=tuple(pack_fields(full, fields_of(bits))))
        for width in bits:
            linear.scale[width] = tile_groups(np.ones((16, 1), np.float16))
            y = native.matmul_nested_i8(linear, width, np.full((9, 2048), sign * 127, np.float32), variant=variant)
            wanted = sign * 2048 * 127 * ((code >> (8 - width)) - ((1 << width) - 1) / 2)
            assert np.array_equal(y, np.full((9, 16), wanted, np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("entry", [0, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_entry_saturates(entry: int, sign: int, variant: str) -> None:
    rng = np.random.default_rng(7)
    for bits in [(1,), (2, 3, 4, 8), (4,)]:
        linear = random_linear(rng, 16, 2048, bits, -1, sym=True, tables=bits)
        for width in (b for b in bits if b <= 4):
            linear.scale[width] = tile_groups(np.ones((16, 1), np.float16))
            linear.table[width] = tile_table(np.full((16, 1 << width), entry, np.uint8))
            y = native.matmul_nested_i8(linear, width, np.full((9, 2048), sign * 127, np.float32), variant=variant)
            assert np.array_equal(y, np.full((9, 16), sign * 2048 * 127 * (entry - 63.5), np.float32))


def test_what_is_not_a_number_stays_so() -> None:
    linear = random_linear(np.random.default_rng(4), 16, 64, (4,), 32)
    x = np.ones((2, 64), np.float32)
    x[1, 40] = np.inf
    y = native.matmul_nested_i8(linear, 4, x)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
