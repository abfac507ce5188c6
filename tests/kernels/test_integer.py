"""The ops of integer graphs, each variant against `numerics.fixed`, codes at the ends of their ranges among them."""

from dataclasses import replace

import numpy as np
import pytest

from lilliput.core.graph import Attend, Grid, Rotate
from lilliput.engine import native
from lilliput.numerics import fixed
from lilliput.numerics.packing import fields_of, pack_fields, unpack_fields
from support.stored import random_linear

MATMUL, ATTENTION = native.variants("matmul_integer"), native.variants("attention_integer")
POINTWISE = native.variants("norm_integer")
BITS = [8, 16]


def grid(rng: np.random.Generator, bits: int, scale: float = 0.01) -> Grid:
    half = 1 << (bits - 1)
    return Grid(bits=bits, scale=scale, zero=int(rng.choice([-half, -half // 3, 0, half // 5, half - 1])))


def codes(rng: np.random.Generator, own: Grid, *shape: int) -> np.ndarray:
    """Random ones, of which a third stands at the ends."""
    return np.where(
        rng.random(shape) < 1 / 3, rng.choice([own.low, own.high], shape), rng.integers(own.low, own.high + 1, shape)
    ).astype(np.int16)


def factors(rng: np.random.Generator, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return fixed.multipliers(real * np.exp2(rng.uniform(-2, 2, real.shape)))


@pytest.mark.parametrize("variant", MATMUL)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x_bits", BITS)
@pytest.mark.parametrize("y_bits", BITS)
def test_matmul_is_its_definition(variant: str, bits: int, x_bits: int, y_bits: int) -> None:
    rng = np.random.default_rng(0)
    ladders = [(bits,), (4, 8) if bits == 8 else (2, 4), (2, 3, 4, 8)[: 3 + (bits == 8)], (1, bits)]
    for ladder in ladders:
        for out, columns, tokens in [(1, 1, 1), (17, 33, 2), (40, 200, 9), (16, 320, 5), (70, 97, 23)]:
            linear = random_linear(rng, out, columns, ladder, -1)
            own, to = grid(rng, x_bits), grid(rng, y_bits)
            x = codes(rng, own, tokens, columns)
            stored = unpack_fields(linear.planes, linear.fields, out, columns).astype(np.int64)
            most = 1 << (bits + x_bits - 1)
            bias = rng.integers(-most, most, out)
            m, s = factors(rng, np.full(out, 2.0 ** (y_bits - bits - x_bits) / columns**0.5 * 4))
            for zeros in (None, rng.integers(0, 1 << bits, out), np.where(rng.random(out) < 0.5, 0, (1 << bits) - 1)):
                weight = stored - (1 << (bits - 1) if zeros is None else zeros[:, None])
                wanted = fixed.linear(x, weight, bias, m, s, to)
                found = native.matmul_integer(linear, x, own, bias, m, s, to, zeros=zeros, variant=variant)
                assert np.array_equal(found, wanted), (ladder, out, columns, tokens)


@pytest.mark.parametrize("variant", MATMUL)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x_bits", BITS)
@pytest.mark.parametrize("ends", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
@pytest.mark.parametrize("middle", [True, False])
def test_no_sum_saturates(variant: str, bits: int, x_bits: int, ends: tuple[int, int], middle: bool) -> None:
    linear = random_linear(np.random.default_rng(1), 16, 4096, (bits,), -1)
    code, value = (0, (1 << bits) - 1)[ends[0]], (-(1 << (x_bits - 1)), (1 << (x_bits - 1)) - 1)[ends[1]]
    full = np.full((16, 4096), code, np.uint8)
    linear = replace(linear, planes=tuple(pack_fields(full, fields_of((bits,)))))
    own, to = Grid(bits=x_bits, scale=1.0, zero=0), Grid(bits=16, scale=1.0, zero=0)
    m, s = fixed.multipliers(np.full(16, 2.0 ** (16 - bits - x_bits) / (8192 if middle else 16384)))
    # the farthest from the codes that a zero can be
    zeros = None if middle else np.full(16, (1 << bits) - 1 if code == 0 else 0)
    weight = np.full((16, 4096), code - (1 << (bits - 1) if zeros is None else zeros[0]))
    for tokens in (1, 3, 9):
        x = np.full((tokens, 4096), value, np.int16)
        wanted = fixed.linear(x, weight, np.zeros(16, np.int64), m, s, to)
        assert 0 < np.abs(wanted).max() < 32767
        found = native.matmul_integer(linear, x, own, np.zeros(16, np.int64), m, s, to, zeros=zeros, variant=variant)
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("variant", ATTENTION)
@pytest.mark.parametrize("window", [0, 1, 7, 70])
@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8, 8, 8, 16), (16, 8, 8, 8), (8, 16, 8, 8), (8, 8, 16, 16)], ids=str)
@pytest.mark.parametrize("probability", [255, 65535])
def test_attention_is_its_definition(
    variant: str, window: int, widths: tuple[int, int, int, int], probability: int
) -> None:
    rng = np.random.default_rng(2)
    for dim, group, queries, position, sharp in [
        (16, 1, 1, 0, 1),
        (64, 4, 5, 61, 40),
        (33, 2, 9, 130, 2),
        (128, 3, 1, 200, 8),
    ]:
        grids = tuple(grid(rng, bits) for bits in widths)
        count = position + queries
        q, k, v = (
            codes(rng, g, *shape)
            for g, shape in zip(grids, [(queries, group * dim), (count, dim), (count, dim)], strict=False)
        )
        size = 2.0 ** (widths[0] + widths[1])
        m, s = fixed.multiplier(2.0**17 / size / dim**0.5)
        out_m, out_s = fixed.multiplier(2.0 ** (widths[3] - widths[2]) / probability * 1.3)
        hi, lo = fixed.exponentials(sharp / 2000)
        cap = np.rint(2e4 * np.tanh(np.arange(-32768, 32768) / 2e4)).astype(np.int16) if group == 2 else None
        scores = grid(rng, 16)
        node = Attend(
            q="q", k="k", v="v", y="y", heads=group, kv_heads=1, head_dim=dim, window=window, scores=scores,
            multiplier=m, shift=s, capped=scores if group == 2 else None, softcap=1.0 if group == 2 else None,
            scale=1.0, probability=probability, out_multiplier=out_m, out_shift=out_s,
        )  # fmt: skip
        wanted = fixed.attend(q, k, v, grids, node, (hi, lo, cap), start=position)
        for share in (1, 2, 3, 16):
            found = native.attention_integer(
                q.reshape(queries, group, dim), k, v, grids, node, (hi, lo, cap), position=position, share=share,
                variant=variant,
            )  # fmt: skip
            assert np.array_equal(found.reshape(queries, -1), wanted), (dim, share)


@pytest.mark.parametrize("variant", POINTWISE)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_bits", BITS)
@pytest.mark.parametrize("y_bits", BITS)
def test_norm_is_its_definition(variant: str, kind: str, x_bits: int, y_bits: int) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 7, 64, 65, 300, 2048):
        for eps in (0.0, 1e-5, 1e20):
            for spread in (1, 200, 1 << 20):
                own, to = grid(rng, x_bits, 0.003), grid(rng, y_bits, 4 / 2 ** (y_bits - 1))
                x = np.clip(rng.integers(-spread, spread + 1, (1, n)) + own.zero, own.low, own.high)
                weight, bias = rng.normal(1, 0.5, n), rng.normal(0, 0.5, n) if n % 2 else None
                gain, offset, whole_eps, shift = fixed.norm_constants(kind, weight, bias, n, eps, own, to)
                wanted = fixed.norm(x, own, gain, offset, to, kind=kind, heads=1, eps=whole_eps, shift=shift)
                found = native.norm_integer(
                    x[0], own, gain, offset, to, layer=kind == "layer", eps=whole_eps, shift=shift, variant=variant
                )
                assert np.array_equal(found, wanted[0]), (n, eps, spread)


@pytest.mark.parametrize("variant", POINTWISE)
@pytest.mark.parametrize("x_bits", BITS)
@pytest.mark.parametrize("y_bits", BITS)
def test_rotary_is_its_definition(variant: str, x_bits: int, y_bits: int) -> None:
    rng = np.random.default_rng(4)
    for head_dim, dim, heads in [(2, 2, 1), (64, 64, 3), (80, 32, 2), (256, 256, 2), (9, 4, 5)]:
        own, to = grid(rng, x_bits), grid(rng, y_bits)
        m, s = fixed.multiplier(2.0 ** (y_bits - x_bits - 14) * 0.9)
        node = Rotate(
            x="x", y="y", head_dim=head_dim, dim=dim, multiplier=m, shift=s, plain_multiplier=m - 5, plain_shift=s
        )
        cos, sin = fixed.turns([0.01 * (i + 1) for i in range(dim // 2)], 40)
        x = codes(rng, own, heads, head_dim)
        wanted = fixed.rotate(x.reshape(1, -1), own, cos[37:38], sin[37:38], node, to)
        found = native.rotary_integer(x, own, cos[37], sin[37], node, to, variant=variant)
        assert np.array_equal(found.reshape(1, -1), wanted)


@pytest.mark.parametrize("variant", POINTWISE)
@pytest.mark.parametrize("bits", [(a, b, y) for a in BITS for b in BITS for y in BITS], ids=str)
def test_multiply_and_sum_are_their_definitions(variant: str, bits: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(5)
    for n in (1, 63, 64, 200):
        of_a, of_b, to = (grid(rng, b, 0.01 / 2**b) for b in bits)
        a, b = codes(rng, of_a, n), codes(rng, of_b, n)
        m, s = fixed.multiplier(2.0 ** (bits[2] - bits[0] - bits[1]) * 3)
        wanted = fixed.multiply(a, of_a, b, of_b, m, s, to)
        assert np.array_equal(native.multiply_integer(a, of_a, b, of_b, m, s, to, variant=variant), wanted)
        parts = [(a, of_a), (b, of_b), (a, of_a)]
        factors_, shift = fixed.sum_constants([g.scale for _, g in parts], to)
        wanted = fixed.add(parts, factors_, shift, to)
        assert np.array_equal(native.sum_integer(parts, factors_, shift, to, variant=variant), wanted)


@pytest.mark.parametrize("bits", [(8, 8), (8, 16), (16, 8), (16, 16)], ids=str)
def test_tables_are_looked_up(bits: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    own, to = grid(rng, bits[0]), grid(rng, bits[1])
    table, x = codes(rng, to, 1 << bits[0]), codes(rng, own, 300)
    wanted = fixed.look_up(x, table, bits[0])
    assert np.array_equal(native.table_integer(x, bits[0], table, to), wanted)
