"""What is read off the edges, and the choice of those with 16 bits."""

import pytest
import torch

from lilliput.core.errors import QualityFailed
from lilliput.methods.ranges import ROOM, Loudness, Ranges, spanning, widest


def test_ranges_leave_out_what_the_mask_hides_and_where_asked_the_first_position() -> None:
    hidden = torch.tensor([100.0, -1.0, 2.0, 3.0])[None, :, None]
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    scores = torch.full((1, 2, 4, 4), 7.0).masked_fill(~seen, -4e4)
    for apart, high in ((False, 100.0), (True, 3.0)):
        ranges = Ranges(["mlp", "scores", "attn.probabilities"], "minmax", 0.0, apart)
        assert ranges("mlp", hidden) is hidden
        ranges("scores", scores, seen)
        grid = ranges.grid("mlp", 8)
        assert grid.scale * (grid.high - grid.zero) == pytest.approx(high, rel=0.01)
        wide = ranges.grid("mlp", 16)
        assert wide.scale * (wide.high - wide.zero) == pytest.approx(100 * ROOM, rel=1e-3)
        assert ranges.grid("scores", 8).scale == pytest.approx(7 / 255)
        assert ranges.sizes == {"mlp": 1.0, "scores": 8.0}
        own = ranges.grid("attn.probabilities", 16)
        assert (own.scale, own.zero) == (1 / 65535, own.low)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_a_small_range_has_as_many_levels_as_any_other(bits: int, size: float) -> None:
    grid = spanning(-0.3 * size, size, bits)
    assert grid.scale * (2**bits - 1) == pytest.approx(1.3 * size)
    assert grid.scale * (grid.low - grid.zero) == pytest.approx(-0.3 * size, abs=grid.scale)


def test_a_grid_and_its_range_are_one_and_the_same() -> None:
    grid = spanning(-2.0, 5.0, 8)
    ends = (grid.scale * (grid.low - grid.zero), grid.scale * (grid.high - grid.zero))
    again = spanning(*ends, 8)
    assert again.scale == pytest.approx(grid.scale)
    assert again.zero == grid.zero


def test_loudness_is_of_every_channel() -> None:
    x = torch.tensor([[[1.0, -4.0], [-3.0, 2.0]]])
    loud = Loudness(["a"])
    assert loud("a", x) is x
    loud("a", x / 2)
    loud("b", x)
    assert loud.peak("a").tolist() == [3.0, 4.0]
    assert loud.variance("a")[0] == pytest.approx(loud.energy("a")[0] - 0.75**2)
    assert loud.energy("a").tolist() == [(1 + 9) / 2 * 1.25 / 2, (16 + 4) / 2 * 1.25 / 2]


def test_widest_takes_a_number_or_a_share_of_bytes() -> None:
    found, sizes = {"a": 5.0, "b": 4.0, "c": 0.1, "d": -1.0}, {"a": 100.0, "b": 10.0, "c": 1.0, "d": 1.0}
    assert widest(found, 2, sizes) == ["a", "b"]
    assert widest(found, 0.2, sizes) == ["b", "c"]
    assert widest(found, 1.0, sizes) == ["b", "c", "a"]
    assert widest(found, 0, sizes) == []


def test_what_is_not_finite_is_named_and_what_the_mask_hides_may_be() -> None:
    ranges = Ranges(["layers.0.attn.scores", "layers.0.mlp.inner"], "minmax", 0.0, False)
    seen = torch.ones(2, 2, dtype=torch.bool).tril()
    ranges("layers.0.attn.scores", torch.zeros(1, 1, 2, 2).masked_fill(~seen, torch.inf), seen)
    with pytest.raises(QualityFailed, match=r"^layers\.0\.mlp\.inner: not finite on the calibration text\."):
        ranges("layers.0.mlp.inner", torch.tensor([[[1.0, torch.nan]]]))
