import pytest
import torch
from torch import Tensor

from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.quantize.rtn import RTN
from lilliput.methods.safety import output_errors
from lilliput.numerics.statistics import Gram


def layer(seed: int, out: int = 24, columns: int = 128, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, and the Gram matrix of correlated inputs with a few loud ones."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::31] *= 10
    normal = torch.randn(out, columns, generator=generator)
    total = Gram(columns)
    total.add(x)
    return normal * (1 + normal.abs()) * 0.02, total.value()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_errs_less_than_after_rounding(bits: int, seed: int) -> None:
    weight, gram = layer(seed)
    plain = output_errors(weight, RTN(bits=(bits,)).solve(weight, None), gram)[bits]
    paper = output_errors(weight, GPTQ(bits=(bits,), clip=False, rounds=0).solve(weight, gram), gram)[bits]
    ours = output_errors(weight, GPTQ(bits=(bits,)).solve(weight, gram), gram)[bits]
    assert ours < paper < plain
    assert paper < 0.8 * plain


def test_every_width_of_a_ladder_errs_less_than_nested_rounding_up_to_four_bits() -> None:
    weight, gram = layer(0)
    plain = output_errors(weight, RTN().solve(weight, None), gram)
    ours = output_errors(weight, GPTQ().solve(weight, gram), gram)
    for bits in (2, 3, 4):
        assert ours[bits] < 0.8 * plain[bits]
    assert ours[8] < 0.2 * ours[4]


def test_white_inputs_give_round_to_nearest() -> None:
    weight = layer(0)[0]
    made = GPTQ(bits=(4,), clip=False, rounds=0).solve(weight, torch.eye(128))
    plain = RTN(bits=(4,)).solve(weight, None)
    assert torch.equal(made.codes, plain.codes)
    assert torch.equal(made.scale[4], plain.scale[4])


def test_the_result_does_not_depend_on_the_block() -> None:
    weight, gram = layer(1)
    errors = [output_errors(weight, GPTQ(block=b).solve(weight, gram), gram) for b in (1, 16, 128)]
    for one in errors[1:]:
        assert one == pytest.approx(errors[0], rel=2e-2)  # ties; the exact form is checked in numerics/test_columns.py


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_codes_are_those_of_the_columns_as_they_stand(sym: bool, act_order: bool) -> None:
    weight, gram = layer(2)
    made = GPTQ(bits=(8,), sym=sym, act_order=act_order).solve(weight, gram)
    assert torch.allclose(made.dequantize(8), weight, atol=float(weight.abs().max()) / 20)
    assert (made.zero == {}) is sym


def test_more_bits_err_less() -> None:
    weight, gram = layer(0)
    errors = [output_errors(weight, GPTQ(bits=(b,)).solve(weight, gram), gram)[b] for b in (2, 3, 4, 5, 8)]
    assert errors == sorted(errors, reverse=True)


def test_batches_of_any_size_give_the_same_codes() -> None:
    weight = layer(0)[0]
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(5))
    errors = []
    for size in (300, 7):
        total = Gram(128)
        for part in x.split(size):
            total.add(part)
        errors.append(output_errors(weight, GPTQ(bits=(3,)).solve(weight, total.value()), x.T @ x)[3])
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_fewer_tokens_than_inputs_and_dead_inputs_are_no_obstacle() -> None:
    weight = layer(0)[0]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(5))
    x[:, 7] = 0
    made = GPTQ(damp=0.0).solve(weight, x.T @ x)
    assert bool(torch.isfinite(made.dequantize(2)).all())
    assert output_errors(weight, made, x.T @ x)[4] < 0.1


@pytest.mark.parametrize(("key", "value"), [("damp", -0.1), ("rounds", -1), ("balance", -1.0), ("block", 0)])
def test_options_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^gptq\.{key}: {key} is {value}\. Give "):
        GPTQ(**{key: value})
