import numpy as np
import pytest

from lilliput.engine import native
from support.stored import gamma, stored

DTYPES = ["F32", "F16", "BF16"]


@pytest.mark.parametrize("variant", native.variants("matmul_float"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33, 500])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_products_are_within_the_rounding_of_one_sum(dtype: str, columns: int, tokens: int, variant: str) -> None:
    rng = np.random.default_rng(columns)
    weight = stored(rng.standard_normal((21, columns)), dtype)
    exact = weight.to_float32().astype(np.float64)
    x = rng.standard_normal((tokens, columns), dtype=np.float32)
    error = np.abs(native.matmul_float(weight, x, variant=variant) - x @ exact.T)
    assert (error <= gamma(columns + 1) * (np.abs(x) @ np.abs(exact).T)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_and_blocks_of_tokens_agree_bit_for_bit(dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight = stored(rng.standard_normal((35, 203)), dtype)
    x = rng.standard_normal((19, 203), dtype=np.float32)
    alone = np.concatenate([native.matmul_float(weight, row[None], variant="reference") for row in x])
    for variant in native.variants("matmul_float"):
        assert np.array_equal(native.matmul_float(weight, x, variant=variant), alone)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_half_is_widened_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32) if dtype == "F16" else stored(np.zeros(1), dtype).to_float32()
    if dtype == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(values)
    data = (bits.view(np.float16) if dtype == "F16" else bits)[finite].reshape(-1, 1)
    weight = stored(np.zeros((1, 1)), dtype)
    weight = type(weight)(dtype, data.shape, data)
    one = np.ones((1, 1), np.float32)
    assert np.array_equal(native.matmul_float(weight, one)[0], values[finite])
    wide = type(weight)(dtype, (len(data), 16), np.ascontiguousarray(np.pad(data, ((0, 0), (0, 15)))))
    unit = np.eye(1, 16, dtype=np.float32)
    assert np.array_equal(native.matmul_float(wide, unit)[0], values[finite])
