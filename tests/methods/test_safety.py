"""What is taken where a method does worse than rounding, and what is said of inputs that tell little."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.core.errors import InputCorrupt
from lilliput.methods.quantize.any_precision import AnyPrecision
from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.quantize.leanquant import LeanQuant
from lilliput.methods.safety import finite, output_errors, remark, safer
from lilliput.numerics.nested import Quantized
from lilliput.numerics.statistics import Gram


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(16, 96) weight, the (96, 96) Gram matrix of its inputs, and what each weight counts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 96, generator=generator)
    inputs = torch.randn(300, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    return weight, inputs.T @ inputs, torch.rand(16, 96, generator=generator) + 0.01


CASES = [
    (GPTQ(bits=(2, 4), group_size=32), 1),
    (GPTQ(bits=(2, 4), group_size=32, shared=True), 1),
    (LeanQuant(bits=(2, 4), group_size=32, nonuniform=True), 1),
    (AnyPrecision(bits=(2, 4), group_size=32, affine=True), 2),
    (AnyPrecision(bits=(2, 4), group_size=32), 2),
]
FORMS = ["grids", "a shared grid", "tables", "affine, singly", "tables, singly"]


@pytest.mark.parametrize(("method", "which"), CASES, ids=FORMS)
def test_a_good_result_is_kept_and_its_errors_are_those_of_the_objective(method: Any, which: int) -> None:
    weight, stat = layer()[0], layer()[which]
    solved = method.solve(weight, stat)
    kept, errors, note = safer(method, weight, solved, stat)
    assert kept is solved
    assert not note
    for bits in (2, 4):
        off = (weight - solved.dequantize(bits)).double()
        both = [off, weight.double()]
        told = [(x.square() * stat).sum() if which == 2 else torch.trace(x @ stat.double() @ x.T) for x in both]
        assert errors[bits] == pytest.approx(float(told[0] / told[1]), rel=1e-3)


@pytest.mark.parametrize("broken", ["codes", "nan"])
@pytest.mark.parametrize(("method", "which"), CASES, ids=FORMS)
def test_a_result_worse_than_rounding_is_replaced_in_the_same_form(method: Any, which: int, broken: str) -> None:
    weight, stat = layer()[0], layer()[which]
    solved: Quantized = method.solve(weight, stat)
    bad = replace(solved, codes=torch.zeros_like(solved.codes))
    if broken == "nan":
        bad = replace(solved, scale={b: torch.full_like(s, torch.nan) for b, s in solved.scale.items()})
    kept, errors, note = safer(method, weight, bad, stat)
    assert note.startswith(f"{method.name} was worse than rounding to nearest (2 bits ")
    assert note.endswith(", which was taken")
    for kind in ("scale", "zero", "table", "ratio"):
        assert getattr(kept, kind).keys() == getattr(solved, kind).keys()
        for bits, values in getattr(kept, kind).items():
            assert values.shape == getattr(solved, kind)[bits].shape
            assert values.dtype == getattr(solved, kind)[bits].dtype
    assert kept.codes.shape == solved.codes.shape
    assert 0 < errors[4] < errors[2] < 0.3
    assert errors == output_errors(weight, kept, stat, single=which == 2)


def test_what_is_not_a_number_is_no_small_error() -> None:
    weight, gram, _ = layer()
    made = GPTQ(bits=(4,), group_size=32).solve(weight, gram)
    gone = replace(made, scale={4: torch.full_like(made.scale[4], torch.nan)})
    assert output_errors(weight, gone, gram)[4] != output_errors(weight, gone, gram)[4]


def test_inputs_that_tell_little_are_named() -> None:
    total = Gram(4)
    total.add(torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 0], [2, 0, 1, 1], [0, 0, 0, 0]]))  # two of four are padding
    assert total.tokens == 2
    assert remark("a", total.value(), total) == "1 of 4 inputs are never active; 2 tokens for 4 inputs"
    total.add(torch.full((1, 4), torch.inf))
    with pytest.raises(InputCorrupt, match=r"^layers\.0\.attn\.q_proj: its inputs are NaN or infinite"):
        remark("layers.0.attn.q_proj", total.value(), total)


def test_what_a_block_puts_out_is_looked_at() -> None:
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, torch.nan]])
    assert list(finite("layers.1", [good, good])) == [good, good]
    with pytest.raises(InputCorrupt, match=r"^layers\.1: what it puts out on the calibration text is NaN or infinite"):
        list(finite("layers.1", [good, bad]))
