"""Codes to nested, tiled bit fields and back (NumPy only; the C++ engine reads the same bytes).

A weight's widest code of B bits is cut, most significant bits first, into fields of 1, 2 or 4 bits. The ladder of
widths decides the cut: (2, 3, 4, 8) gives 2|1|1|4. A narrow width reads only the leading fields.

Inside a field the matrix is cut into tiles of 16 rows x 32 inputs. In a tile, step j = 0..7 covers inputs 4j..4j+3 and
lane p = 0..63 is row p // 4, input 4j + p % 4. With i = j // 4 and f = j % 4, the field bits of (j, p) stand at

    4-bit field, 256 bytes a tile: byte 64 * (2i + f % 2) + p, bits 4 * (f // 2) and up
    2-bit field, 128 bytes a tile: byte 64 * i + p,            bits 2f and up
    1-bit field,  64 bytes a tile: byte p,                     bit  2f + 1 - i

so that one 64-byte line, masked, is the operand of a byte dot product for 16 rows x 4 inputs, and the single planes
merge with the 2-bit field by selects and shifts. Rows are padded to 16 and inputs to 32 with code 0.
docs/artifact.md draws it.
"""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ROWS = 16
"""Rows of a tile."""
INPUTS = 32
"""Inputs of a tile."""
LEVEL_BITS = 7
"""Bits of the entry of a table: the int8 kernels multiply it as it is, two products without overflow of int16."""
LEVEL_MIDDLE = (2**LEVEL_BITS - 1) / 2
TABLE_BITS = 4
"""Widest code that may have a table: 16 entries are what one byte shuffle looks up."""
RATIO_ONE = 128
"""The byte that means 1 where rows have ratios: r means (128 + r) / 256, from 0.5 to 1.496."""
SCALE_TOP = 508
"""The largest number a scale's byte means; see `scale_numbers`."""
UNIT_LEAST = -24
"""The power of two that a row's unit of 0 means. So every scale in bytes is a float16 too."""
UNIT_MOST = 7 - UNIT_LEAST
ZERO_BITS = 8

U8 = npt.NDArray[np.uint8]


def fields_of(bits: Sequence[int]) -> tuple[int, ...]:
    """Field widths, most significant first, for a strictly increasing ladder of widths in 1..8.

    Each step of the ladder is cut into powers of two, largest first: (2, 3, 4, 8) is (2, 1, 1, 4), (8,) is (4, 4).
    Raises ValueError for an empty or unordered ladder.
    """
    if not bits or list(bits) != sorted(set(bits)) or bits[0] < 1 or bits[-1] > 8:
        raise ValueError(f"ladder {tuple(bits)} is not strictly increasing within 1..8")
    fields: list[int] = []
    for low, high in zip((0, *bits), bits, strict=False):
        step = high - low
        while step:
            width = next(w for w in (4, 2, 1) if w <= step)
            fields.append(width)
            step -= width
    return tuple(fields)


def serving_width(ladder: Sequence[int], bits: int) -> int:
    """The width a matrix of this ladder runs at when asked for `bits`: its narrowest of at least that, else its widest."""
    return next((own for own in ladder if own >= bits), ladder[-1])


def padded(count: int, multiple: int) -> int:
    """Round `count` up to a multiple."""
    return -(-count // multiple) * multiple


def field_shape(out: int, columns: int, width: int) -> tuple[int, int, int]:
    """Shape of one packed field in uint8: (row tiles, input tiles, 64 * width)."""
    return padded(out, ROWS) // ROWS, padded(columns, INPUTS) // INPUTS, 64 * width


def _tiles(codes: U8) -> U8:
    """(out, in) to (row tiles, input tiles, i, f, lane), zero padded."""
    out, columns = codes.shape
    full = np.zeros((padded(out, ROWS), padded(columns, INPUTS)), np.uint8)
    full[:out, :columns] = codes
    split = full.reshape(full.shape[0] // ROWS, ROWS, full.shape[1] // INPUTS, 2, 4, 4)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 4, 1, 5)).reshape(*split.shape[:1], split.shape[2], 2, 4, 64)


def pack_fields(codes: U8, fields: Sequence[int]) -> list[U8]:
    """Pack codes into tiled fields.

    codes: (out, in) uint8, each below 2 ** sum(fields).
    Returns one uint8 array per field, of `field_shape(out, in, width)`.
    """
    tiles = _tiles(codes)
    packed, below = [], sum(fields)
    for width in fields:
        below -= width
        part = (tiles >> below) & ((1 << width) - 1)  # (.., .., i, f, lane)
        if width == 4:
            line = part[..., :2, :] | (part[..., 2:, :] << 4)  # f % 2 picks the line, f // 2 the nibble
            packed.append(line.reshape(*line.shape[:2], 256))
        elif width == 2:
            line = part[..., 0, :] | (part[..., 1, :] << 2) | (part[..., 2, :] << 4) | (part[..., 3, :] << 6)
            packed.append(line.reshape(*line.shape[:2], 128))
        else:
            both = (part[..., 0, :, :] << 1) | part[..., 1, :, :]
            packed.append(both[..., 0, :] | (both[..., 1, :] << 2) | (both[..., 2, :] << 4) | (both[..., 3, :] << 6))
    return [np.ascontiguousarray(p.astype(np.uint8)) for p in packed]


def unpack_fields(packed: Sequence[U8], fields: Sequence[int], out: int, columns: int) -> U8:
    """Codes from the leading fields: the inverse of `pack_fields`, or its top bits when fewer fields are given.

    packed: arrays as `pack_fields` returns them; fields: their widths.
    Returns (out, columns) uint8 of sum(fields) bits.
    """
    tiles_out, tiles_in = packed[0].shape[:2]
    codes = np.zeros((tiles_out, tiles_in, 2, 4, 64), np.uint8)
    for array, width in zip(packed, fields, strict=True):
        codes <<= width
        if width == 4:
            line = array.reshape(tiles_out, tiles_in, 2, 2, 64)
            codes |= np.concatenate([line & 15, line >> 4], axis=3)
        elif width == 2:
            line = array.reshape(tiles_out, tiles_in, 2, 1, 64)
            codes |= (line >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
        else:
            line = array.reshape(tiles_out, tiles_in, 1, 1, 64)
            shift = np.array([[1, 3, 5, 7], [0, 2, 4, 6]], np.uint8)
            codes |= (line >> shift[..., None]) & 1
    split = codes.reshape(tiles_out, tiles_in, 2, 4, ROWS, 4).transpose(0, 4, 1, 2, 3, 5)
    return np.ascontiguousarray(split.reshape(tiles_out * ROWS, tiles_in * INPUTS)[:out, :columns])


def scale_numbers() -> npt.NDArray[np.int64]:
    """What the 256 bytes of a scale mean, ascending: two bits of exponent e and six of mantissa m.

    m where e is 0, else (64 + m) * 2**(e - 1): 0 to 508, the steps at most a 64th of the number from 64 on. As the bits
    of a float16, byte * 16 is that number times 2**-20.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 6, byte & 63
    return np.where(exponent == 0, mantissa, (64 + mantissa) << np.maximum(exponent - 1, 0))


def pack_scales(scale: npt.NDArray[np.float16]) -> tuple[U8, U8]:
    """Scales as bytes, and the unit of each row: (out, groups) and (out,) uint8.

    scale: (out, groups) float16, each a number of `scale_numbers` times 2**(unit + UNIT_LEAST), the unit the least that
    reaches the row's largest. Raises ValueError for others.
    """
    full = scale.astype(np.float64)
    mantissa, exponent = np.frexp(full.max(1, initial=0) / SCALE_TOP)
    unit = np.clip(exponent - (mantissa == 0.5) - UNIT_LEAST, 0, UNIT_MOST).astype(np.uint8)
    want = full * np.exp2(-(unit.astype(np.float64) + UNIT_LEAST))[:, None]
    numbers = scale_numbers()
    found = np.searchsorted(numbers, want).clip(0, 255)
    if (numbers[found] != want).any():
        raise ValueError("a scale is not what a byte and the unit of its row can say")
    return found.astype(np.uint8), unit


def unpack_scales(stored: U8, unit: U8) -> npt.NDArray[np.float16]:
    """The inverse of `pack_scales`: (out, groups) float16."""
    power = np.exp2(unit.astype(np.float64) + UNIT_LEAST)
    return (scale_numbers()[stored] * power[:, None]).astype(np.float16)


def counted_bits(width: int, tables: Container[int]) -> int:
    """Bits of the grid that a width's scales and zeros count on: its own, or those of levels where it has a table."""
    return LEVEL_BITS if width in tables else width


def zero_step(bits: int) -> float:
    """What a zero's byte counts, in steps of a width: the 256 of them span the range of its codes."""
    return 2.0 ** (bits - ZERO_BITS)


def pack_zeros(zero: npt.NDArray[np.float16], bits: int) -> npt.NDArray[np.int8]:
    """Zeros of a grid of `bits` bits as bytes: int8, shape of `zero`. Raises ValueError for what they cannot say."""
    want = zero.astype(np.float64) / zero_step(bits)
    found: npt.NDArray[np.int8] = want.clip(-128, 127).astype(np.int8)
    if (found != want).any():
        raise ValueError("a zero is not what a byte can say")
    return found


def unpack_zeros(stored: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.float16]:
    """The inverse of `pack_zeros`: float16."""
    return (stored * zero_step(bits)).astype(np.float16)


def tile_groups(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(out, groups) to (row tiles, groups, 16): the 16 rows of a tile side by side; padding rows get 0."""
    out, groups = values.shape
    full = np.zeros((padded(out, ROWS), groups), values.dtype)
    full[:out] = values
    return np.ascontiguousarray(full.reshape(-1, ROWS, groups).transpose(0, 2, 1))


def untile_groups(tiled: npt.NDArray[Any], out: int) -> npt.NDArray[Any]:
    """The inverse of `tile_groups`: (row tiles, groups, 16) to (out, groups)."""
    tiles, groups, rows = tiled.shape
    return np.ascontiguousarray(tiled.transpose(0, 2, 1).reshape(tiles * rows, groups)[:out])


def tile_table(table: U8) -> U8:
    """(out, 2**b) to (row tiles, 16, 2**b); padding rows get 0."""
    full = np.zeros((padded(len(table), ROWS), table.shape[1]), np.uint8)
    full[: len(table)] = table
    return full.reshape(-1, ROWS, table.shape[1])


def tile_rows(values: U8) -> U8:
    """(out,) to (row tiles, 16); padding rows get 0."""
    return tile_table(values[:, None])[..., 0]


def untile_table(tiled: U8, out: int) -> U8:
    """The inverse of `tile_table`: (row tiles, 16, 2**b) to (out, 2**b), a view."""
    return tiled.reshape(-1, tiled.shape[2])[:out]
