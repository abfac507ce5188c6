import pytest
import torch
from torch import Tensor

from lilliput.methods.quantize.any_precision import AnyPrecision, felt_of, tree
from lilliput.methods.quantize.rtn import RTN
from lilliput.numerics.clusters import Runs, lloyd, sort, start
from lilliput.numerics.nested import Quantized

BITS = (2, 3, 4)


def draw(seed: int = 0, out: int = 24, columns: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    return weight, torch.randn(out, columns, generator=generator).square().square()


def error(weight: Tensor, felt: Tensor, made: Quantized, bits: int) -> Tensor:
    return (felt * (made.dequantize(bits) - weight).square()).sum(1)


@pytest.mark.parametrize("refine", [0, 20])
def test_centres_are_weighted_means_of_their_members_in_order(refine: int) -> None:
    values, felt = draw()
    made = tree(values, felt, BITS, refine)
    for b in BITS:
        codes = (made.codes >> (4 - b)).to(torch.int64)
        weight = torch.zeros(24, 2**b).scatter_add_(1, codes, felt)
        first = torch.zeros(24, 2**b).scatter_add_(1, codes, felt * values)
        full = weight > 1e-3
        assert torch.allclose(made.centres[b][full], (first / weight)[full], atol=1e-4)
        assert (made.centres[b].diff(dim=1) >= 0).all()
        ordered = codes.gather(1, values.sort(1).indices)
        assert (ordered.diff(dim=1) >= 0).all()  # a larger weight has no smaller code


def test_without_refinement_the_seed_is_weighted_k_means() -> None:
    values, felt = draw(1)
    made = tree(values, felt, BITS, refine=0)
    runs = Runs(*sort(values, felt))
    plain = [runs.means(lloyd(runs, start(runs, 4, init))) for init in ("tree", "quantile")]

    def cost(centres: Tensor) -> Tensor:
        return (felt[..., None] * (values[..., None] - centres[:, None]).square()).amin(-1).sum(1)

    seed = (felt * (values - made.centres[2].gather(1, (made.codes >> 2).long())).square()).sum(1)
    assert torch.allclose(seed, torch.minimum(*map(cost, plain)), rtol=1e-4)


@pytest.mark.parametrize("refine", [0, 20])
def test_every_wider_width_errs_less_in_every_row(refine: int) -> None:
    values, felt = draw(2)
    made = tree(values, felt, BITS, refine)
    errors = []
    for b in BITS:
        level = made.centres[b].gather(1, (made.codes >> (4 - b)).long())
        errors.append((felt * (values - level).square()).sum(1))
    assert (errors[0] > errors[1]).all()
    assert (errors[1] > errors[2]).all()


def test_refining_saves_more_of_the_widths_errors_than_it_costs() -> None:
    values, felt = draw(3)
    logs = []
    for refine in (0, 20):
        made = tree(values, felt, BITS, refine)
        level = [made.centres[b].gather(1, (made.codes >> (4 - b)).long()) for b in BITS]
        errors = torch.stack([(felt * (values - x).square()).sum(1) for x in level])
        logs.append(errors.log().mean())
    assert logs[1] < logs[0] - 0.01


@pytest.mark.parametrize(
    "options", [{}, {"group_size": -1}, {"sym": True}, {"affine": True}, {"affine": True, "bits": (2, 3, 4, 8)}]
)
def test_every_width_is_nearer_than_rounding_by_what_the_loss_feels(options: dict[str, object]) -> None:
    weight, felt = draw(4)
    method = AnyPrecision(**{"group_size": 32, **options})  # type: ignore[arg-type]
    made = method.solve(weight, felt)
    plain = RTN(bits=method.bits, group_size=method.group_size, sym=method.sym).solve(weight, None)
    for b in (2, 3, 4):
        assert error(weight, felt, made, b).sum() < 0.9 * error(weight, felt, plain, b).sum()
    assert set(made.table) == set(method.tables) == (set() if method.affine else set(BITS))


def test_columns_in_another_order_give_codes_in_that_order_and_scaled_sensitivity_the_same_codes() -> None:
    weight, felt = draw(5)
    weight[:, 7] = weight[:, 90]  # equal weights have equal codes wherever they stand
    method = AnyPrecision(group_size=-1)
    made = method.solve(weight, felt)
    assert torch.equal(made.codes[:, 7], made.codes[:, 90])
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    moved = method.solve(weight[:, order], felt[:, order])
    assert (moved.codes == made.codes[:, order]).float().mean() > 0.999  # sums in another order may round a border away
    assert torch.equal(method.solve(weight, 4 * felt).codes, made.codes)


def test_pruned_weights_do_not_pull_and_a_row_that_feels_nothing_counts_all_alike() -> None:
    weight, felt = draw(6)
    weight[0, ::2] = 0
    felt[1] = 0
    counted = felt_of(weight, felt, floor=0.1)
    assert (counted[0, ::2] == 0).all()
    assert (counted[1] == 1).all()
    assert (felt_of(torch.zeros(2, 8), torch.rand(2, 8), 0.1) == 1).all()
    assert torch.isfinite(AnyPrecision().solve(weight, felt).dequantize(2)).all()


def test_the_embedding_without_sensitivity_counts_all_alike() -> None:
    weight, _ = draw(7)
    assert torch.equal(
        AnyPrecision().solve(weight, None).codes, AnyPrecision().solve(weight, torch.ones_like(weight)).codes
    )


@pytest.mark.parametrize("options", [{"bits": (2, 4, 8)}, {"end_bits": (4, 8)}, {"layer_bits": {"*": (8,)}}])
def test_tables_beyond_4_bits_are_refused_with_what_to_do(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^any_precision\.bits: a ladder has 8 bits, .* or set affine: true"):
        AnyPrecision(**options)  # type: ignore[arg-type]
    assert AnyPrecision(affine=True, **options).tables == ()  # type: ignore[arg-type]


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^any_precision\.refine: refine is -1\."):
        AnyPrecision(refine=-1)
    with pytest.raises(ValueError, match=r"^any_precision\.floor: floor is nan\."):
        AnyPrecision(floor=float("nan"))
