from pathlib import Path

import pytest
import torch

from lilliput.methods.quantize.smoothquant import SmoothQuant, smoothing
from lilliput.models.pairs import pairs
from lilliput.numerics.observers import rounded_per_token
from support.blocks import LOUD, calibration, followed_by, state, tiny_block


def test_equation_4_by_hand() -> None:
    (pair, *_) = pairs(tiny_block())
    peaks, weights = torch.full((32,), 16.0), [torch.full((3, 32), 0.25), torch.full((5, 32), -4.0)]
    peaks[1] = 0.0  # an input that is never active
    half = smoothing(pair, peaks, weights, 0.5)
    assert half[0] == pytest.approx(2.0)  # sqrt(16 / 4)
    assert half[1] == 1.0
    assert smoothing(pair, peaks, weights, 1.0)[0] == pytest.approx(16.0)
    assert smoothing(pair, peaks, weights, 0.0)[0] == pytest.approx(0.25)


@torch.no_grad()
def test_outliers_move_from_the_activations_into_the_weights(tmp_path: Path) -> None:
    block = tiny_block()
    data = calibration(tmp_path, block)
    x = data.inputs.take([0, 1, 2])

    def outliers() -> float:
        seen = block.attn_norm(x).abs().amax((0, 1))
        return float(seen[list(LOUD)].mean() / seen.median())

    def error() -> float:
        seen, weight = block.attn_norm(x), block.attn.q_proj.weight
        return float((rounded_per_token(seen) @ weight.T - seen @ weight.T).square().mean())

    before = outliers(), error()
    note = SmoothQuant(alphas=(0.5,)).apply(block, data, followed_by(block, bits=(8,)))
    assert note == "alpha: attn_norm 0.5, mlp_norm 0.5"
    assert outliers() < 0.5 * before[0]
    assert error() < 0.5 * before[1]


def test_of_several_alphas_none_is_taken_where_all_would_hurt(tmp_path: Path) -> None:
    block = tiny_block()
    with torch.no_grad():  # no loud input, and a heavy column of one layer: evening that out makes an input loud
        block.attn_norm.weight.fill_(1.0)
        block.attn.q_proj.weight[:, 5] *= 100
    data, before = calibration(tmp_path, block), state(block)
    note = SmoothQuant(alphas=(0.0, 0.1), exclude=("*.mlp.*",)).apply(block, data, followed_by(block, bits=(8,)))
    assert note == "alpha: attn_norm none"
    assert all(torch.equal(value, before[key]) for key, value in block.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": (1.5,)}, r"^smoothquant\.alphas: alphas is \[1\.5\], not shares in \[0, 1\]\."),
        ({"alphas": ()}, r"^smoothquant\.alphas: "),
        (
            {"kinds": ("query_key",)},
            r"^smoothquant\.kinds: kinds is \['query_key'\]\. Give some of norm, value, inner\.$",
        ),
        ({"samples": 0}, r"^smoothquant: samples is 0 "),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothQuant(**options)  # type: ignore[arg-type]
