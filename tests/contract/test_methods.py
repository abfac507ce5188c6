"""Every registered method answers the same questions."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.core.progress import Silent
from lilliput.data.streams import Batches
from lilliput.methods import METHODS
from lilliput.methods.base import (
    BlockMethod,
    BlockQuantizer,
    IntegerMethod,
    LayerMethod,
    ModelMethod,
    Quantizer,
    Statistic,
    build,
)
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.models.lowering import lower
from lilliput.models.sites import sites
from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized
from support.blocks import calibration, followed_by, state, tiny_block
from support.families import write_checkpoint

ROOT = Path(__file__).parents[2]
LAYER_METHODS = [name for name in METHODS if issubclass(METHODS.load(name), LayerMethod)]
BLOCK_METHODS = [name for name in METHODS if issubclass(METHODS.load(name), BlockMethod)]
BLOCK_QUANTIZERS = [name for name in METHODS if issubclass(METHODS.load(name), BlockQuantizer)]
MODEL_METHODS = [name for name in METHODS if issubclass(METHODS.load(name), ModelMethod)]
INTEGER_METHODS = [name for name in METHODS if issubclass(METHODS.load(name), IntegerMethod)]
EXACT: dict[str, dict[str, object]] = {"awq": {"clip": False}}
"""Options without which a block method changes the float output, by its own account."""


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
    first = next(iter(build(name, {}).options()))
    with pytest.raises(ValueError, match=rf"^{name}: there is no option 'no_such'\. It has .*{first}"):
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


@pytest.mark.parametrize("name", [n for n in LAYER_METHODS if issubclass(METHODS.load(n), Quantizer)])
def test_widths_share_a_grid_where_they_are_told_to(name: str) -> None:
    bits = (2, 3, 4)
    even = {"affine": True} if name == "any_precision" else {}
    method = build(name, {"bits": list(bits), "shared": True, **even})
    assert isinstance(method, Quantizer)
    weight, stat = inputs(method)
    own = build(name, {"bits": list(bits), **even}).solve(weight, stat)  # type: ignore[attr-defined]
    made = method.solve(weight, stat)
    assert (set(made.scale), set(made.ratio)) == ({2}, set(bits))
    for b in bits:
        error, least = (float((one.dequantize(b) - weight).norm()) for one in (made, own))
        assert error < 1.2 * least
    weight[0], weight[1] = 0.0, 0.25
    weight[2] = 0.0
    weight[2, 5] = 3.0
    made = method.solve(weight, stat)
    for b in bits:
        assert torch.isfinite(made.dequantize(b)).all()
        assert (made.dequantize(b)[0].abs() <= 1e-6).all()


def block_method(name: str, **options: object) -> BlockMethod:
    method = build(name, options)
    assert isinstance(method, BlockMethod)
    return method


@pytest.mark.parametrize("name", BLOCK_METHODS)
@torch.no_grad()
def test_a_block_method_leaves_the_float_output_as_it_was(name: str, tmp_path: Path) -> None:
    block = tiny_block()
    data, before, x = calibration(tmp_path, block), state(block), torch.randn(2, 16, 32)
    expected = block(x)
    block_method(name, **EXACT.get(name, {})).apply(block, data, followed_by(block))
    assert any(not torch.equal(value, before[key]) for key, value in block.named_parameters())
    assert (block(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_a_block_method_repeats_itself_and_leaves_the_text_alone(name: str, tmp_path: Path) -> None:
    block, other = tiny_block(), tiny_block()
    data = calibration(tmp_path, block)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    notes = [block_method(name).apply(one, data, followed_by(one)) for one in (block, other)]
    assert notes[0] == notes[1] != ""
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize("name", BLOCK_METHODS)
@pytest.mark.parametrize("why", ["excluded", "nothing is quantized"])
def test_a_block_method_leaves_alone_what_it_should(name: str, why: str, tmp_path: Path) -> None:
    block = tiny_block()
    before = state(block)
    method = block_method(name, exclude=["layers.0.*"] if why == "excluded" else [])
    after = followed_by(block) if why == "excluded" else {}
    assert method.apply(block, calibration(tmp_path, block), after) == ""
    assert all(torch.equal(value, before[key]) for key, value in block.named_parameters())


@pytest.mark.parametrize("name", BLOCK_QUANTIZERS)
@pytest.mark.parametrize(("bits", "shared"), [((3,), False), ((2, 3, 4, 8), False), ((2, 3, 4, 8), True)])
def test_a_block_quantizer_repeats_itself_and_is_no_worse_than_rounding(
    name: str, bits: tuple[int, ...], shared: bool, tmp_path: Path
) -> None:
    def solve(data: object) -> dict[str, Quantized]:
        block = tiny_block()
        method = build(name, {"bits": list(bits), "group_size": 16, "shared": shared})
        assert isinstance(method, BlockQuantizer)
        return method.solve_block(block, list(block.linears())[1:], data)[0]  # type: ignore[arg-type]

    data = calibration(tmp_path, tiny_block(), drift=0.01)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    first, second = solve(data), solve(data)
    assert all(path.read_bytes() == content for path, content in files.items())
    assert list(first) == list(tiny_block().linears())[1:]
    for layer, made in first.items():
        assert made.bits == bits
        assert set(made.scale) == set(made.zero) == {bits[0], *(() if shared else bits)}
        assert torch.equal(made.codes, second[layer].codes)
        assert all(torch.equal(made.dequantize(b), second[layer].dequantize(b)) for b in bits)

    def errors(coded: dict[str, Quantized]) -> float:
        block, total = tiny_block(), 0.0
        x, y = (of.take(range(of.samples)) for of in (data.inputs, data.targets) if of is not None)
        for width in bits:
            for layer, made in coded.items():
                block.linears()[layer].weight.data = made.dequantize(width)
            total += float((block(x) - y).square().mean().log().detach())
        return total

    linears = tiny_block().linears()
    plain = {n: nearest(linears[n].weight.detach(), bits, 16, False, shared) for n in first}
    assert errors(first) <= errors(plain) + 1e-6


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    write_checkpoint(tmp_path, "qwen2", seed=3)  # a tied head, biases, fewer key heads than query heads
    return load_decoder(Checkpoint.open(tmp_path)).eval()


@pytest.mark.parametrize("name", MODEL_METHODS)
def test_makes_the_model_it_announces_and_repeats_itself(name: str, decoder: Decoder) -> None:
    method = build(name, {})
    assert isinstance(method, ModelMethod)
    rows = [torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(s)).int().numpy() for s in (0, 1)]
    data: Any = rows if method.reads_text else None
    before = decoder.tensors()
    spec, tensors = method.respec(decoder.spec, before)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        one = method.apply(deepcopy(decoder), data)
        assert one.spec == spec
        assert {n: t.shape for n, t in one.tensors().items()} == {n: t.shape for n, t in tensors.items()}
        made.append(one.state_dict())
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())
    assert all(torch.isfinite(value).all() for value in made[0].values())
    assert method.respec(decoder.spec, before) == (spec, tensors)
    assert decoder.tensors() == before


@pytest.mark.parametrize("name", INTEGER_METHODS)
def test_an_integer_method_makes_the_codes_it_announces_a_grid_for_every_edge_and_repeats_itself(
    name: str, decoder: Decoder, tmp_path: Path
) -> None:
    method = build(name, {"bits": 4, "steps": 2})
    assert isinstance(method, IntegerMethod)
    rows = torch.randint(3, 300, (6, 12), generator=torch.Generator().manual_seed(0)).int().numpy()
    made = [method.make(deepcopy(decoder), Batches(rows, 2), tmp_path / f"work-{i}", Silent()) for i in range(2)]
    one, other = made
    assert set(one.codes) == set(decoder.spec.matrices())
    for layer, codes in one.codes.items():
        assert (codes.bits, codes.group_size) == ((method.width(layer),), -1)
        last = 2 ** codes.bits[0] - 1
        zeros = codes.zero[codes.bits[0]].float() + last / 2
        assert bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= last)).all())
        assert torch.equal(codes.codes, other.codes[layer].codes)
    assert set(sites(decoder.spec)) == set(one.grids)
    assert one.grids == other.grids
    assert json.loads(json.dumps(dict(one.record))) == dict(other.record)
    lower(decoder.spec, one.grids, one.model.state_dict(), one.codes)
