from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.quantize.leanquant import LeanQuant
from lilliput.methods.quantize.rtn import RTN
from lilliput.methods.safety import output_errors
from lilliput.numerics.nested import Quantized, look_up


def layer(seed: int = 0, out: int = 24, columns: int = 128, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Weights of a Student distribution, and the Gram matrix of correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::31] *= 15
    spread = torch.randn(3, out, columns, generator=generator).square().mean(0).sqrt()
    return torch.randn(out, columns, generator=generator) / spread * 0.02, x.T @ x


def plain(bits: tuple[int, ...], **options: Any) -> GPTQ:
    return GPTQ(bits=bits, clip=False, rounds=0, **options)


def error(made: Quantized, weight: Tensor, gram: Tensor) -> float:
    return output_errors(weight, made, gram)[made.bits[0]]


def test_without_importance_and_search_it_is_gptq_bit_for_bit() -> None:
    weight, gram = layer()
    lean = LeanQuant(bits=(3,), exponents=(0.0,), damps=(), search=False, rounds=0).solve(weight, gram)
    other = plain((3,)).solve(weight, gram)
    assert torch.equal(lean.codes, other.codes)
    assert torch.equal(lean.scale[3], other.scale[3])
    assert torch.equal(lean.zero[3], other.zero[3])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_gptq_and_both_kinds_of_grid_rank_as_in_the_paper(bits: int, seed: int) -> None:
    weight, gram = layer(seed)
    options: dict[str, Any] = {"bits": (bits,), "group_size": -1}
    nearest = error(RTN(**options).solve(weight, None), weight, gram)
    gptq = error(GPTQ(**options, clip=False, rounds=0).solve(weight, gram), weight, gram)
    affine = error(LeanQuant(**options, rounds=0).solve(weight, gram), weight, gram)
    uneven = error(LeanQuant(**options, rounds=0, nonuniform=True).solve(weight, gram), weight, gram)
    assert nearest > gptq > 1.2 * affine
    assert gptq > 1.2 * uneven


def test_levels_belong_to_the_grid_of_the_row() -> None:
    weight, gram = layer()
    made = LeanQuant(bits=(2, 3, 4), nonuniform=True, group_size=64).solve(weight, gram)
    assert set(made.table) == {2, 3, 4}
    for bits in (2, 3, 4):
        table = made.table[bits]
        assert table.shape == (24, 2**bits)
        assert int(table.max()) <= 127
        assert bool((table[:, 1:] >= table[:, :-1]).all())
        entry = look_up(table, made.codes >> (4 - bits)).float() - 63.5
        scale, zero = (v[bits].float().repeat_interleave(64, 1) for v in (made.scale, made.zero))
        assert torch.equal(made.dequantize(bits), scale * (entry - zero))


def test_even_levels_are_scale_times_code_less_zero() -> None:
    weight, gram = layer()
    made = LeanQuant(bits=(3,)).solve(weight, gram)
    scale, zero = (v[3].float().repeat_interleave(64, 1) for v in (made.scale, made.zero))
    assert not made.table
    assert torch.equal(made.dequantize(3), scale * (made.codes.float() - 3.5 - zero))


@pytest.mark.parametrize("nonuniform", [False, True])
def test_more_bits_and_smaller_groups_err_less(nonuniform: bool) -> None:
    weight, gram = layer()
    method = LeanQuant(nonuniform=nonuniform, bits=(2,), group_size=-1)
    by_bits = [error(replace(method, bits=(b,)).solve(weight, gram), weight, gram) for b in (2, 3, 4)]
    by_group = [error(replace(method, group_size=g).solve(weight, gram), weight, gram) for g in (-1, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("nonuniform", [False, True])
def test_scaled_inputs_give_the_same_codes(nonuniform: bool) -> None:
    weight, gram = layer()
    method = LeanQuant(bits=(2, 3), nonuniform=nonuniform)
    assert torch.equal(method.solve(weight, gram).codes, method.solve(weight, gram * 4.0**9).codes)


def test_a_nested_table_is_better_at_every_width_than_nested_rounding() -> None:
    weight, gram = layer()
    nested = output_errors(weight, LeanQuant(bits=(2, 3, 4), nonuniform=True).solve(weight, gram), gram)
    rounded = output_errors(weight, RTN(bits=(2, 3, 4)).solve(weight, None), gram)
    assert all(nested[b] < 0.8 * rounded[b] for b in (2, 3, 4))


def test_more_candidates_never_serve_worse() -> None:
    weight, gram = layer()
    few = LeanQuant(bits=(2,), nonuniform=True, exponents=(2.0,), starts=("even",))
    more = replace(few, exponents=(2.0, 4.0), starts=("even", "quantile", "tree"))
    assert error(more.solve(weight, gram), weight, gram) < error(few.solve(weight, gram), weight, gram)


def test_without_a_statistic_grids_are_learnt_all_the_same() -> None:
    weight = layer()[0]
    made = LeanQuant(bits=(2, 4), nonuniform=True).solve(weight, None)
    assert float((made.dequantize(2) - weight).norm()) < float(
        (RTN(bits=(2,)).solve(weight, None).dequantize(2) - weight).norm()
    )


def test_tables_end_at_four_bits_and_the_ends_may_go_beyond() -> None:
    with pytest.raises(
        ValueError, match=r"^leanquant\.bits: nonuniform with bits \[2, 8\], but tables end at 4 bits\. "
    ):
        LeanQuant(bits=(2, 8), nonuniform=True)
    method = LeanQuant(bits=(2, 3, 4), nonuniform=True, end_bits=(4, 8))
    assert method.tables == (2, 3, 4)
    assert method.at("embed_tokens").tables == ()
    assert replace(method, end_bits=(3, 4)).at("lm_head").tables == (3, 4)


def test_a_layer_that_is_named_has_the_ladder_it_is_named_with() -> None:
    method = LeanQuant(bits=(2, 3, 4), nonuniform=True, layer_bits={"layers.1.*": (3,), "lm_head": (8,)})
    assert method.at("layers.1.mlp.up_proj").bits == method.at("layers.1.mlp.up_proj").tables == (3,)
    assert method.at("layers.0.mlp.up_proj").bits == (2, 3, 4)
    assert (method.at("lm_head").bits, method.at("lm_head").tables) == ((8,), ())
    assert LeanQuant().tables == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponents": ()}, r"^leanquant\.exponents: exponents is \[\]"),
        (
            {"exponents": (-1.0,)},
            r"^leanquant\.exponents: exponents is \[-1\.0\], not numbers within 0\.\.8\. Give some",
        ),
        ({"damp": -1.0}, r"^leanquant\.damp: damp is -1\.0\. Give 0\.0 or more"),
        ({"nonuniform": True, "bits": (4,), "starts": ()}, r"^leanquant\.starts: starts is empty"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeanQuant(**options)
