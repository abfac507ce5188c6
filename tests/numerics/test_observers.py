import pytest
import torch

from lilliput.numerics.observers import BINS, Observer, StaticGrid, per_token, rounded_per_token

X = torch.randn(4, 33, 24, generator=torch.Generator().manual_seed(0)) + 0.5


def fed(observer: Observer, x: torch.Tensor = X) -> Observer:
    for part in x.split(1):  # the reach grows on the way
        observer.add(part)
    return observer


def error(grid: StaticGrid, x: torch.Tensor) -> float:
    return float((grid.rounded(x) - x).square().mean())


def test_each_token_has_its_own_scale() -> None:
    x = torch.tensor([[1.0, -0.5, 0.26], [100.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    codes, scale = per_token(x)
    assert codes.tolist() == [[127, -64, 33], [127, 1, 0], [0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([1 / 127, 100 / 127, 0])
    assert ((rounded_per_token(x) - x).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sym", [False, True])
def test_minmax_spans_what_was_seen_and_rounds_to_half_a_step(bits: int, sym: bool) -> None:
    observer = fed(Observer("minmax", bits, sym=sym))
    low, high = observer.range()
    peak = float(X.abs().max())
    assert (low, high) == ((-peak, peak) if sym else (float(X.min()), float(X.max())))
    grid = observer.grid()
    # a whole zero moves the range by up to half a step, so an end may lose another half
    assert (grid.rounded(X) - X).abs().max() <= grid.scale * (0.5 if sym else 1.0) + 1e-6
    assert grid.rounded(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_percentile_cuts_its_share_off_to_a_bin(share: float) -> None:
    bin_ = 4 * float(X.abs().max()) / BINS
    low, high = fed(Observer("percentile", share=share)).range()
    goal = share / 2 * X.numel()
    assert X.lt(low).sum() <= goal <= X.lt(low + bin_).sum()
    assert X.gt(high).sum() <= goal <= X.gt(high - bin_).sum()
    low, high = fed(Observer("percentile", share=share, sym=True)).range()
    assert low == -high
    assert X.abs().gt(high).sum() <= 2 * goal <= X.abs().gt(high - bin_).sum()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_least_error_is_that_of_a_search_over_all_values(bits: int, sym: bool) -> None:
    observer = fed(Observer("mse", bits, sym=sym))
    wide = fed(Observer("minmax", bits, sym=sym))
    low, high = wide.range()
    brute = min(error(wide._grid(low * f, high * f), X) for f in (i / 200 for i in range(20, 201)))
    assert error(observer.grid(), X) <= 1.02 * brute
    assert error(observer.grid(), X) < 0.98 * error(wide.grid(), X)


@pytest.mark.parametrize("rule", ["percentile", "mse"])
def test_what_an_activation_reads_is_judged_behind_it(rule: str) -> None:
    x = torch.cat(
        [torch.randn(1, 4000, 8, generator=torch.Generator().manual_seed(0)) * 3, torch.full((1, 2, 8), 20.0)], 1
    )
    gelu, plain = torch.nn.functional.gelu, Observer(rule, share=1e-3)
    behind, whole = (Observer(r, share=1e-3, through=gelu) for r in (rule, "minmax"))
    for one in (plain, behind, whole):
        one.add(x)
    low, high = behind.range()
    assert -4 < low < -2  # a GELU of less is 0
    assert high > 18  # and one of more is as large as it was
    errors = [float((gelu(one.grid().rounded(x)) - gelu(x)).square().mean()) for one in (behind, plain, whole)]
    assert errors[0] < 0.8 * min(errors[1:])
    assert whole.range() == (float(x.min()), 20.0)


def test_the_first_position_stays_out_when_it_is_apart() -> None:
    x = X.clone()
    x[:, 0] *= 300
    assert fed(Observer(apart=True), x).range() == fed(Observer(), X[:, 1:]).range()
    assert fed(Observer(), x).grid().scale > 50 * fed(Observer(apart=True), x).grid().scale


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
def test_silence_and_nothing_have_a_grid(rule: str) -> None:
    silent = Observer(rule)  # type: ignore[arg-type]
    assert silent.grid() == StaticGrid(1.0, -128, 8)
    silent.add(torch.zeros(1, 2, 3))
    assert silent.grid().rounded(torch.zeros(2)).tolist() == [0, 0]
    silent.add(torch.ones(1, 2, 3))
    assert silent.range() == (0, 1)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^an activation is NaN or infinite$"):
        Observer().add(torch.tensor([[[1.0, float("nan")]]]))
    with pytest.raises(ValueError, match=r"^bits is 17, outside 2\.\.16$"):
        Observer(bits=17)
