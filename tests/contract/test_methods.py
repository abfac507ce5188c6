"""Every registered method answers the same questions."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.methods import METHODS
from lilliput.methods.base import LayerMethod, Quantizer, Statistic, build
from lilliput.numerics.nested import Quantized

ROOT = Path(__file__).parents[2]
LAYER_METHODS = [name for name in METHODS if issubclass(METHODS.load(name), LayerMethod)]


def inputs(method: LayerMethod, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(32, 128, generator=generator), torch.randn(500, 128, generator=generator)
    if method.needs is Statistic.NONE:
        return weight, None
    if method.needs is Statistic.FISHER:
        return weight, torch.randn(32, 128, generator=generator).square()
    total = method.needs.accumulator(128)
    total.add(x)
    return weight, total.value()


def matrix(solved: Tensor | Quantized) -> Tensor:
    return solved if isinstance(solved, Tensor) else solved.dequantize(solved.bits[-1])


@pytest.mark.parametrize("name", METHODS)
def test_builds_without_arguments_and_survives_json(name: str) -> None:
    method = build(name, {})
    assert build(name, json.loads(json.dumps(method.options()))) == method


@pytest.mark.parametrize("name", METHODS)
def test_refuses_an_option_it_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: there is no option 'no_such'\. It has .*exclude"):
        build(name, {"no_such": 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "rtn",
            {"bits": 4},
            r"^rtn: bits is 4: input should be a valid tuple\. Write it as in bits: \[2, 3, 4, 8\]\.$",
        ),
        ("rtn", {"bits": ["4"]}, r"^rtn: bits is \['4'\]: input should be a valid integer"),
        ("rtn", {"group_size": 64.0}, r"^rtn: group_size is 64\.0: input should be a valid integer"),
        ("rtn", {"sym": "no"}, r"^rtn: sym is 'no': input should be a valid boolean\. Write it as in sym: False\.$"),
        ("rtn", {"exclude": "layers.0.*"}, r"^rtn: exclude is 'layers\.0\.\*': input should be a valid tuple"),
        ("wanda", {"sparsity": "abc"}, r"^wanda: sparsity is 'abc': input should be a valid number"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, options)


@pytest.mark.parametrize("name", METHODS)
def test_has_its_file_its_page_its_test_and_its_source(name: str) -> None:
    cls = METHODS.load(name)
    stage = cls.__module__.split(".")[-2]
    assert cls.__module__ == f"lilliput.methods.{stage}.{name}"
    assert (ROOT / "tests" / "methods" / stage / f"test_{name}.py").is_file()
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
    source = (ROOT / "src" / cls.__module__.replace(".", "/")).with_suffix(".py").read_text("utf-8")
    assert re.search(r"^Source: .+", source, re.M)
    assert re.search(r"^Deviation: .+", source, re.M)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_leaves_its_inputs_alone_and_repeats_itself(name: str) -> None:
    method = build(name, {})
    assert isinstance(method, LayerMethod)
    weight, stat = inputs(method)
    before = weight.clone(), None if stat is None else stat.clone()
    first, second = matrix(method.solve(weight, stat)), matrix(method.solve(weight, stat))
    assert torch.equal(first, second)
    assert torch.equal(weight, before[0])
    assert stat is None or torch.equal(stat, before[1])
    assert first.shape == weight.shape
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_rows_alone_means_that_slices_give_the_same_answer(name: str) -> None:
    method = build(name, {})
    assert isinstance(method, LayerMethod)
    if not method.rows_alone:
        pytest.skip(f"{name} looks at all rows together, by its own account")
    weight, stat = inputs(method)
    by_row = stat is not None and method.needs is Statistic.FISHER
    stats = stat.split(11) if by_row and stat is not None else [stat] * 3
    parts = torch.cat([matrix(method.solve(p, s)) for p, s in zip(weight.split(11), stats, strict=True)])
    assert torch.equal(parts, matrix(method.solve(weight, stat)))


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_zero_constant_and_lonely_rows_do_no_harm(name: str) -> None:
    method = build(name, {})
    assert isinstance(method, LayerMethod)
    weight, stat = inputs(method)
    weight[0], weight[1] = 0.0, 0.25
    weight[2] = 0.0
    weight[2, 5] = 3.0
    made = method.solve(weight, stat)
    assert torch.isfinite(matrix(made)).all()
    assert (matrix(made)[0].abs() <= 1e-6).all()
    if isinstance(method, Quantizer):
        assert isinstance(made, Quantized)
        assert set(made.scale) == set(method.bits)
