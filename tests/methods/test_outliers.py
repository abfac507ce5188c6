from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.methods import METHODS, outliers
from lilliput.methods.base import BlockQuantizer, Quantizer, Statistic, build
from lilliput.methods.outliers import choose, solve
from lilliput.methods.safety import output_errors, safer
from lilliput.numerics.nested import Quantized

OUT, COLUMNS, SHARE = 24, 128, 0.01
KINDS = [name for name in METHODS if issubclass(METHODS.load(name), Quantizer)]
SOLVERS = [name for name in KINDS if not issubclass(METHODS.load(name), BlockQuantizer)]


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with `SHARE` of it thrown far out, where that is, and inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, COLUMNS, generator=draw) * 0.02
    far = torch.zeros(OUT * COLUMNS, dtype=torch.bool)
    far[torch.randperm(OUT * COLUMNS, generator=draw)[: round(SHARE * OUT * COLUMNS)]] = True
    far = far.view(OUT, COLUMNS)
    weight[far] += 0.4 * weight[far].sign()
    return weight, far, torch.randn(600, COLUMNS, generator=draw)


def method_of(name: str, **options: object) -> Quantizer:
    made = build(name, {"bits": [2, 4], "group_size": 32} | options)
    assert isinstance(made, Quantizer)
    return made


def statistic(method: Quantizer, x: Tensor) -> Tensor | None:
    if method.needs is Statistic.FISHER:
        return torch.ones(OUT, COLUMNS)
    return x.T @ x if method.needs is Statistic.GRAM else None


def coded(method: Quantizer, weight: Tensor, stat: Tensor | None) -> Quantized:
    made = solve(method, weight, stat)
    assert isinstance(made, Quantized)
    return made


@pytest.mark.parametrize("name", SOLVERS)
def test_what_stands_out_is_found_and_every_width_gains_from_it(name: str) -> None:
    weight, far, x = case()
    method = method_of(name, outliers=SHARE)
    made = coded(method, weight, statistic(method, x))
    assert made.outliers is not None
    assert len(made.outliers.values) == method.kept(OUT, COLUMNS) == int(far.sum())
    found = torch.zeros(OUT * COLUMNS, dtype=torch.bool)
    found[made.outliers.places(COLUMNS)] = True
    assert torch.equal(found.view(OUT, COLUMNS), far)
    without = coded(replace(method, outliers=0.0), weight, statistic(method, x))
    assert without.outliers is None
    errors, plain = (output_errors(weight, q, x.T @ x) for q in (made, without))
    assert errors[2] < 0.5 * plain[2]
    assert errors[4] < 0.5 * plain[4]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_codes_are_those_of_what_is_left(name: str) -> None:
    weight, _, x = case(1)
    method = method_of(name, outliers=SHARE)
    stat = statistic(method, x)
    made = coded(method, weight, stat)
    assert made.outliers is not None
    rest = replace(method, outliers=0.0).solve(made.outliers.taken_from(weight), stat)
    assert torch.equal(made.codes, rest.codes)
    assert torch.equal(made.dequantize(2), made.outliers.added(rest.dequantize(2)))


def test_turns_find_a_better_choice_than_distance_from_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=draw) * torch.randn(48, 256, generator=draw).abs()
    weight *= (torch.rand(48, 4, generator=draw) + 0.3).repeat_interleave(64, 1)  # groups are not alike
    method = method_of("rtn", bits=[2], group_size=64, outliers=SHARE)
    errors = []
    for rounds in (1, outliers.ROUNDS):
        monkeypatch.setattr(outliers, "ROUNDS", rounds)
        errors.append(float((weight - coded(method, weight, None).dequantize(2)).square().sum()))
    assert errors[1] < 0.95 * errors[0]


def test_any_precision_chooses_where_an_error_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, counts = torch.randn(OUT, COLUMNS, generator=draw), torch.full((OUT, COLUMNS), 1e-3)
    counts[:, ::8] = 1.0
    made = coded(method_of("any_precision", outliers=SHARE), weight, counts)
    assert made.outliers is not None
    assert float((made.outliers.columns % 8 == 0).float().mean()) > 0.9
    plain = choose(method_of("rtn", outliers=SHARE), weight, None)
    assert float((plain.columns % 8 == 0).float().mean()) < 0.4


def test_a_share_of_less_than_one_weight_is_none() -> None:
    weight, _, _ = case()
    method = method_of("rtn", outliers=1e-5)
    assert method.kept(OUT, COLUMNS) == 0
    assert coded(method, weight, None).outliers is None


def test_wider_widths_do_not_change_the_choice() -> None:
    weight, _, x = case(2)
    gram = x.T @ x
    made = [coded(method_of("gptq", bits=bits, outliers=SHARE), weight, gram).outliers for bits in ([2], [2, 3, 4, 8])]
    assert made[0] is not None
    assert made[1] is not None
    assert torch.equal(made[0].places(COLUMNS), made[1].places(COLUMNS))
    assert torch.equal(made[0].values, made[1].values)


def test_rounding_to_nearest_is_tried_beside_the_same_outliers() -> None:
    weight, _, x = case(3)
    method = method_of("gptq", outliers=SHARE)
    made = coded(method, weight, x.T @ x)
    broken = replace(made, codes=made.codes ^ 8)
    taken, errors, note = safer(method, weight, broken, x.T @ x)
    assert "gptq was worse than rounding to nearest" in note
    assert taken.outliers is made.outliers
    assert errors == output_errors(weight, taken, x.T @ x)
    assert errors[2] < output_errors(weight, method_of("rtn").solve(weight, None), x.T @ x)[2]


def test_a_weight_beyond_half_precision_is_kept_as_far_as_it_goes() -> None:
    weight, _, _ = case(4)
    weight[0, 5] = 3e5
    made = coded(method_of("rtn", bits=[8], outliers=SHARE), weight, None)
    assert made.outliers is not None
    assert bool(torch.isfinite(made.outliers.values).all())
    assert bool(torch.isfinite(made.dequantize(8)).all())


def test_the_ends_of_a_model_have_none() -> None:
    method = method_of("gptq", outliers=SHARE)
    assert method.at("layers.0.mlp.up_proj").outliers == SHARE
    assert method.at("embed_tokens").outliers == method.at("lm_head").outliers == 0


@pytest.mark.parametrize("share", [-0.1, 0.11, float("nan")])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"gptq\.outliers: outliers is .*Give a share from 0 to 0\.1"):
        method_of("gptq", outliers=share)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SOLVERS])
def test_what_solves_blocks_together_says_that_it_keeps_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} keeps no outliers"):
        method_of(name, outliers=SHARE)


def test_rows_too_long_to_name_a_column_are_refused() -> None:
    with pytest.raises(ConfigError, match="65536 columns are more than outliers can name"):
        method_of("rtn", outliers=SHARE, group_size=-1).check("layers.0.mlp.down_proj", 16, 65536)
