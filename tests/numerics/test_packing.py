import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.numerics.packing import (
    INPUTS,
    ROWS,
    field_shape,
    fields_of,
    pack_fields,
    tile_groups,
    tile_table,
    unpack_fields,
    untile_groups,
    untile_table,
)

LADDERS = st.sets(st.integers(1, 8), min_size=1).map(lambda widths: tuple(sorted(widths)))
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70))
FEW = settings(max_examples=50, deadline=None)


def codes_of(shape: tuple[int, int], bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


@given(bits=LADDERS)
def test_fields_are_powers_of_two_and_end_at_every_width(bits: tuple[int, ...]) -> None:
    fields = fields_of(bits)
    assert set(fields) <= {1, 2, 4}
    assert set(bits) <= set(np.cumsum(fields).tolist())
    assert sum(fields) == bits[-1]


def test_the_ladders_of_the_documentation() -> None:
    assert fields_of((2, 3, 4, 8)) == (2, 1, 1, 4)
    assert fields_of((8,)) == (4, 4)
    assert fields_of((3,)) == (2, 1)


@pytest.mark.parametrize("bits", [(), (3, 2), (2, 2), (0, 2), (9,), (-1,)])
def test_no_ladder_is_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ladder \(.*\) is not strictly increasing within 1\.\.8$"):
        fields_of(bits)


@FEW
@given(bits=LADDERS, shape=SHAPES, seed=st.integers(0, 99))
def test_packing_round_trips_and_a_prefix_of_fields_is_the_top_bits(
    bits: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    fields, codes = fields_of(bits), codes_of(shape, bits[-1], seed)
    packed = pack_fields(codes, fields)
    assert [field.shape for field in packed] == [field_shape(*shape, width) for width in fields]
    for count in range(1, len(fields) + 1):
        top = unpack_fields(packed[:count], fields[:count], *shape)
        assert np.array_equal(top, codes >> (bits[-1] - sum(fields[:count])))


@FEW
@given(bits=LADDERS, shape=SHAPES)
def test_what_lies_outside_the_matrix_is_packed_as_zero(bits: tuple[int, ...], shape: tuple[int, int]) -> None:
    fields = fields_of(bits)
    packed = pack_fields(np.full(shape, (1 << bits[-1]) - 1, np.uint8), fields)
    rows, inputs = packed[0].shape[0] * ROWS, packed[0].shape[1] * INPUTS
    whole = unpack_fields(packed, fields, rows, inputs)
    assert not whole[shape[0] :].any()
    assert not whole[:, shape[1] :].any()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_bit_stands_where_the_layout_says(width: int) -> None:
    for row, column in np.ndindex(ROWS, INPUTS):
        codes = np.zeros((ROWS, INPUTS), np.uint8)
        codes[row, column] = (1 << width) - 1
        step, lane = column // 4, 4 * row + column % 4
        half, quarter = step // 4, step % 4
        byte, shift = {
            4: (64 * (2 * half + quarter % 2) + lane, 4 * (quarter // 2)),
            2: (64 * half + lane, 2 * quarter),
            1: (lane, 2 * quarter + 1 - half),
        }[width]
        expected = np.zeros(64 * width, np.uint8)
        expected[byte] = ((1 << width) - 1) << shift
        assert np.array_equal(pack_fields(codes, (width,))[0][0, 0], expected)


@FEW
@given(shape=SHAPES)
def test_group_values_round_trip_through_tiles(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
    tiled = tile_groups(values)
    assert tiled.shape == (-(-shape[0] // ROWS), shape[1], ROWS)
    assert np.array_equal(untile_groups(tiled, shape[0]), values)
    assert not untile_groups(tiled, len(tiled) * ROWS)[shape[0] :].any()


@pytest.mark.parametrize("out", [1, 16, 33])
def test_tables_round_trip_through_tiles(out: int) -> None:
    table = np.random.default_rng(3).integers(1, 128, (out, 8), dtype=np.uint8)
    tiled = tile_table(table)
    assert tiled.shape == (-(-out // ROWS), ROWS, 8)
    assert np.array_equal(untile_table(tiled, out), table)
    assert not untile_table(tiled, len(tiled) * ROWS)[out:].any()
