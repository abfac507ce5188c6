"""Several budgets in, one ladder for every layer out, and each width served inside its own."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.plan import Plan, stored_bytes
from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError
from lilliput.core.recipe import Recipe, load_recipe
from lilliput.methods.quantize.any_precision import AnyPrecision
from lilliput.methods.quantize.rtn import RTN
from lilliput.models import Checkpoint
from lilliput.pipeline import compress
from lilliput.pipeline.budget import Target, allocate, check_target, largest
from lilliput.pipeline.plan import Work, entry_of, plan_work
from lilliput.pipeline.rungs import NEAR, Stair, climb, labels_of, limit_of, price
from support.families import FAMILIES

LADDER = [2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rungs") / "llama"
    FAMILIES["llama"](folder, 0)
    return folder


def recipe_of(shared: bool, **options: Any) -> Recipe:
    return load_recipe([{"rtn": {"bits": LADDER, "group_size": 32, "shared": shared, **options}}])


def made_up(work: Work, seed: int = 0) -> dict[str, dict[int, float]]:
    draw = np.random.default_rng(seed)
    return {n: {b: feels * 4.0**-b for b in [*LADDER, 8]} for n in work.plan.entries for feels in [draw.exponential()]}


def held(plan: Plan, label: int) -> float:
    """Bits a quantized weight in the files a copy needs, but for what stayed in float and alignment."""
    slots = [item for file in plan.files_at(label) for item in plan.files[file].slots.items()]
    read = sum(s.end - s.begin for name, s in slots if name not in plan.floats and not s.padding)
    return 8 * read / sum(e.out * e.columns for e in plan.entries.values())


def ladders_of(labels: Sequence[int], before: tuple[int, ...] = ()) -> list[list[tuple[int, ...]]]:
    """Every way through the rungs of the labels: the ladder at each."""
    if not labels:
        return [[]]
    kept = bool(before) and before[-1] >= labels[0]
    now = [before] if kept else [(*before, bits) for bits in LADDER if bits >= labels[0]]
    return [[ladder, *then] for ladder in now for then in ladders_of(labels[1:], ladder)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_rung_is_what_trying_all_would_find_given_the_narrower_ones(shared: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    stairs = {
        f"{n}": Stair((int(draw.integers(1, 5)) * 16, 64), RTN(bits=tuple(LADDER), group_size=32, shared=shared))
        for n in range(4)
    }
    losses = {name: {b: float(feels) * 3.0**-b for b in LADDER} for name in stairs for feels in [draw.exponential()]}
    labels, top = (2, 3, 5), 5
    least = [sum(held) for held in zip(*(s.least((), labels, top) for s in stairs.values()), strict=True)]
    limits = [int(bytes_ * more) for bytes_, more in zip(least, (1.1, 1.25, 1.1), strict=True)]
    prices = [price(stairs, losses, label, limit, top) for label, limit in zip(labels, limits, strict=True)]

    def expected(name: str, way: Sequence[tuple[int, ...]], at: int) -> float:
        bytes_ = [prices[at + n].byte * stairs[name].held(ladder, top) for n, ladder in enumerate(way) if n]
        return sum(bytes_) + sum(prices[at + n].loss * losses[name][ladder[-1]] for n, ladder in enumerate(way))

    so_far: dict[str, tuple[int, ...]] = dict.fromkeys(stairs, ())
    for at, rung in enumerate(climb(stairs, losses, labels, limits)):
        ways = {name: ladders_of(labels[at:], before) for name, before in so_far.items()}
        every = {}
        for taken in product(*ways.values()):
            ways_of = dict(zip(ways, taken, strict=True))
            held = [sum(stairs[n].held(way[k], top) for n, way in ways_of.items()) for k in range(len(labels) - at)]
            # What the later rungs then take is theirs to choose; that they can keep to their budgets is not.
            if all(cost <= most for cost, most in zip(held, limits[at:], strict=True)):
                first = tuple(way[0] for way in taken)
                every[first] = sum(
                    min(expected(n, way, at) for way in ways[n] if way[0] == ladder)
                    for n, ladder in zip(ways, first, strict=True)
                )
        found = tuple(rung.ladders.values())
        assert every[found] == pytest.approx(min(every.values()), rel=1e-12)
        assert rung.cost == sum(stairs[n].held(ladder, top) for n, ladder in rung.ladders.items()) <= limits[at]
        assert rung.loss == pytest.approx(sum(losses[n][ladder[-1]] for n, ladder in rung.ladders.items()))
        so_far = rung.ladders


def test_a_price_is_what_the_rung_by_itself_would_pay() -> None:
    stairs = {str(n): Stair((16 * n, 64), RTN(bits=tuple(LADDER), group_size=32)) for n in range(1, 5)}
    losses = {name: {b: n * 3.0**-b for b in LADDER} for n, name in enumerate(stairs, 1)}
    every = [
        (
            sum(s.held((b,), 3) for s, b in zip(stairs.values(), taken, strict=True)),
            sum(losses[n][b] for n, b in zip(stairs, taken, strict=True)),
        )
        for taken in product(LADDER[1:], repeat=4)
    ]
    middle = int(np.median([cost for cost, _ in every]))
    found = price(stairs, losses, 3, middle, 3)
    assert found.loss == pytest.approx(1 / min(loss for cost, loss in every if cost <= middle))
    cheap, dear = int(middle * (1 - NEAR)), int(middle * (1 + NEAR))
    (low, low_cost), (high, high_cost) = (
        min((loss, cost) for cost, loss in every if cost <= most) for most in (cheap, dear)
    )
    assert found.byte == pytest.approx(found.loss * (low - high) / (high_cost - low_cost))
    assert found.byte > 0
    assert price(stairs, losses, 3, 10 * middle, 3).byte == 0  # all have the widest


def test_a_sensitive_layer_is_not_bound_to_what_a_wider_rung_would_not_take() -> None:
    quantizer = RTN(bits=(2, 3, 4), group_size=32, shared=True)
    stairs = {"sensitive": Stair((32, 256), quantizer), "other": Stair((96, 256), quantizer)}
    losses = {"sensitive": {2: 3.0, 3: 1.0, 4: 0.01}, "other": {2: 1.5, 3: 0.3, 4: 0.15}}
    bit, base = 32 * 32, sum(stair.held((2,), 3) for stair in stairs.values())
    first, second = climb(stairs, losses, (2, 3), [base + bit, base + 6 * bit])
    assert first.ladders["sensitive"] == (2,)  # at 3 it would lose 2 less here, and 0.99 more at the next rung
    assert second.ladders == {"sensitive": (2, 4), "other": (2, 3)}


def test_a_narrow_rung_leaves_room_for_what_a_wider_one_needs() -> None:
    quantizer = RTN(bits=(2, 3, 8), group_size=32, shared=True)
    stairs = {"sensitive": Stair((64, 64), quantizer), "other": Stair((64, 64), quantizer)}
    losses = {"sensitive": {2: 9.0, 3: 3.0, 8: 0.0}, "other": {2: 1.0, 3: 0.5, 8: 0.0}}
    wide, narrow = stairs["sensitive"].held((8,), 3), stairs["other"].held((2,), 3)
    then = sum(stairs["other"].held(to, 3) for to in ((2, 3), (2, 3)))
    free = climb(stairs, losses, (2, 3), [wide + narrow, 10 * wide])[0]
    assert free.ladders == {"sensitive": (8,), "other": (2,)}
    first, second = climb(stairs, losses, (2, 3), [wide + narrow, then])
    assert 8 not in {bits for ladder in first.ladders.values() for bits in ladder}
    assert first.ladders["sensitive"] == (3,)
    assert second.cost <= then


@pytest.mark.parametrize("seed", range(4))
def test_all_rungs_together_are_near_a_bound_that_no_choice_can_pass(seed: int) -> None:
    """For any prices of bytes, each layer's cheapest ladder less what the budgets are worth bounds all choices inside them."""
    draw, labels, top = np.random.default_rng(seed), (2, 3, 4), 4
    quantizer = RTN(bits=tuple(LADDER), group_size=128, shared=True)
    stairs = {f"{n}": Stair((int(draw.integers(4, 12)) * 64, 256), quantizer) for n in range(40)}
    falls = {name: draw.uniform(3.5, 4.5) for name in stairs}
    losses = {
        name: {b: float(feels * fall**-b) for b in LADDER}
        for name, fall in falls.items()
        for feels in [draw.lognormal()]
    }
    weights = sum(s.shape[0] * s.shape[1] for s in stairs.values())
    limits = [limit_of(bits, weights) for bits in (2.33, 3.4, 4.6)]
    share = np.array([price(stairs, losses, b, most, top).loss for b, most in zip(labels, limits, strict=True)])
    found = float(share @ [rung.loss for rung in climb(stairs, losses, labels, limits)])

    ways = {name: ladders_of(labels) for name in stairs}
    cost = [np.array([[stairs[n].held(ladder, top) for ladder in way] for way in ways[n]], float) for n in stairs]
    lost = [np.array([[losses[n][ladder[-1]] for ladder in way] for way in ways[n]]) @ share for n in stairs]
    byte, bound = np.full(3, share @ [0.05, 0.02, 0.005] / weights), 0.0
    for turn in range(400):
        best = [int(np.argmin(loss + held @ byte)) for loss, held in zip(lost, cost, strict=True)]
        used = sum(held[at] for held, at in zip(cost, best, strict=True))
        bound = max(bound, sum(loss[at] for loss, at in zip(lost, best, strict=True)) + float(byte @ (used - limits)))
        byte = byte * np.exp(20 / (1 + turn / 20) * (used / limits - 1))
    assert bound > 0
    assert found < 1.04 * bound


@pytest.mark.parametrize("seed", range(12))
def test_every_budget_is_kept_where_a_later_one_binds(seed: int) -> None:
    """What is chosen then need not be the best, but it is there, and no budget is passed."""
    draw = np.random.default_rng(seed)
    quantizer = RTN(bits=tuple(LADDER), group_size=32, shared=True)
    stairs = {f"{n}": Stair((int(draw.integers(1, 5)) * 16, 64), quantizer) for n in range(6)}
    losses = {name: {b: float(feels) * 3.0**-b for b in LADDER} for name in stairs for feels in [draw.exponential()]}
    least = [sum(held) for held in zip(*(s.least((), (2, 3), 3) for s in stairs.values()), strict=True)]
    wide = sum(stair.held((4,), 3) for stair in stairs.values())
    free = climb(stairs, losses, (2, 3), [wide, 2 * wide])
    tight = climb(stairs, losses, (2, 3), [wide, int(least[1] * 1.03)])
    for limits, rungs in (((wide, 2 * wide), free), ((wide, int(least[1] * 1.03)), tight)):
        assert all(rung.cost <= most for rung, most in zip(rungs, limits, strict=True))
    # The narrow rung by itself would take what leaves the later one out of reach.
    assert sum(stairs[n].least(ladder, (3,), 3)[0] for n, ladder in free[0].ladders.items()) > int(least[1] * 1.03)
    assert tight[0].cost < free[0].cost


def test_later_rungs_do_not_change_what_a_copy_of_an_earlier_one_holds() -> None:
    tables = AnyPrecision(bits=(2, 3, 4), group_size=-1)
    own, shared = (RTN(bits=tuple(LADDER), group_size=32, shared=s) for s in (False, True))
    for quantizer, ladder in (
        (own, (2, 3, 5)),
        (shared, (2, 3, 5)),
        (shared, (3, 6)),
        (shared, (5,)),
        (tables, (2, 4)),
    ):
        stair, made = Stair((40, 96), quantizer), entry_of((40, 96), replace(quantizer, bits=ladder))
        for count, width in enumerate(ladder, 1):
            assert stair.held(ladder[:count], ladder[-1]) == stored_bytes(made, width)
        assert stair.held(ladder, ladder[-1]) == stored_bytes(made)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("end_bits", [[4, 8], []])
def test_no_width_passes_its_budget_and_the_report_says_what_it_takes(
    llama: Path, shared: bool, end_bits: list[int]
) -> None:
    checkpoint, recipe = Checkpoint.open(llama), recipe_of(shared, end_bits=end_bits)
    work = plan_work(checkpoint, recipe)
    plain = {row.uniform: row.bits_per_weight for row in allocate(recipe, work, Target(bits=(9.0,)), made_up(work))[1]}
    kinds = set()
    for seed in range(3):
        for labels, more in (((2, 3, 4), 0.3), ((2, 4), 0.05), ((2, 3, 5), 0.6)):
            beside = 0.125 if shared else 0.625  # a ratio a row of 64, or scales and zeros and their unit
            budgets = tuple(round(plain[b] + more + (at + shared) * beside, 2) for at, b in enumerate(labels))
            target = Target(bits=budgets)
            check_target(work, target)
            named, rows = allocate(recipe, work, target, made_up(work, seed))
            plan = plan_work(checkpoint, named).plan
            chosen = [row for row in rows if row.chosen]
            assert [row.rung for row in chosen] == list(plan.bits)
            for label, budget, row in zip(plan.bits, budgets, chosen, strict=True):
                assert plan.bits_per_weight(label) <= held(plan, label) <= budget
                assert row.bits_per_weight == pytest.approx(held(plan, label), abs=1e-4)
                assert row.size_bytes == plan.bytes_at(label)
                for name, entry in plan.entries.items():
                    width = entry.width_at(label)
                    assert width >= label or width == work.plan.entries[name].bits[-1]
            assert plan.total_bytes() <= largest(work, target)
            kinds |= {entry.bits for entry in plan.entries.values()}
    assert len(kinds) > 5


def test_what_is_spent_on_layers_that_feel_most_is_predicted_to_pay_at_every_rung(llama: Path) -> None:
    recipe = recipe_of(True, embeddings=False, head=False)
    work = plan_work(Checkpoint.open(llama), recipe)
    losses = made_up(work)
    for name in ("layers.0.attn.v_proj", "layers.1.mlp.down_proj"):
        losses[name] = {bits: 100 * loss for bits, loss in losses[name].items()}
    target = Target(bits=(3.0, 4.15, 5.25))
    named, rows = allocate(recipe, work, target, losses)
    plain = {row.uniform: row.predicted_kl for row in rows if row.uniform}
    chosen = {row.rung: row.predicted_kl for row in rows if row.chosen}
    assert all(chosen[bits] < 0.7 * plain[bits] for bits in (2, 3, 4))
    assert named.stages[0].options["bits"] == [2, 3, 4]
    own = named.stages[0].options["layer_bits"]
    assert own["layers.0.attn.v_proj"][-1] == own["layers.1.mlp.down_proj"][-1] == 5


def one_stair(shared: bool = False) -> tuple[list[Stair], int]:
    return [Stair((64, 128), RTN(bits=(2, 3, 4), group_size=32, shared=shared))], 64 * 128


@pytest.mark.parametrize(
    ("budgets", "error"),
    [
        ((2.2, 3.6), r"2\.2 bits a weight is below the 2\.57 of every layer at 2 bits\. Give at least that, narrower"),
        ((2.6, 3.3), r"3\.3 bits a weight is below the 4\.13 of every layer at 3 bits beside 2\. .*set shared: true"),
        ((2.6, 4.2, 4.3), r"4\.3 bits a weight is below the 5\.69 of every layer at 4 bits beside 2 and 3\. "),
        (
            (4.6, 7.0),
            r"7 bits a weight has no width to be served under, as 4 bits is the widest there is\. Leave it out",
        ),
    ],
)
def test_budgets_that_have_no_widths_of_their_own_are_refused(budgets: Sequence[float], error: str) -> None:
    stairs, weights = one_stair()
    with pytest.raises(ConfigError, match=f"^--target-bits: {error}"):
        labels_of(stairs, [2, 3, 4], budgets, weights)


def test_a_budget_is_served_under_the_widest_width_that_fits_it() -> None:
    stairs, weights = one_stair(shared=True)
    assert labels_of(stairs, [2, 3, 4], (2.65, 3.9, 4.8), weights) == (2, 3, 4)
    assert labels_of(stairs, [2, 3, 4], (2.9, 4.7), weights) == (2, 4)  # two ratios a row where three are too many
    stairs, weights = one_stair()
    assert labels_of(stairs, [2, 3, 4], (2.6, 5.1), weights) == (2, 3)  # 4 bits would fit alone


@pytest.mark.parametrize("bits", [(3.4, 2.4), (2.4, 2.4), (0, 2.4), (2.4, float("nan")), (), ("a", "b"), "3.2"])
def test_bits_that_are_no_ascending_numbers_are_refused_in_a_line(bits: Any) -> None:
    with pytest.raises(ConfigError, match=r"^target: the target is [^\n]*\. Give 3\.2 bits"):
        Target.of(bits, None)


def test_one_number_is_what_it_was_and_there_is_one_size() -> None:
    assert Target.of([3.2], None) == Target.of(3.2, None) == Target(bits=(3.2,))
    assert Target(bits=(3.2,)).text == "3.2 bits"
    assert Target(size=1000).text == "1000 bytes"
    assert Target(bits=(2.4, 3.5)).text == "2.4, 3.5 bits"
    with pytest.raises(ConfigError, match=r"^target: the target is 1,000, 2,000\. Give one size such as 1\.1GB\.$"):
        Target.of(None, [1000, 2000])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^target: both a target of 2\.4, 3\.4 bits and one of 1,000 bytes"):
        Target.of([2.4, 3.4], 1000)


def test_one_artifact_serves_every_width_inside_its_budget(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The old man and the child went on and on, and the sea and the wind went with them. " * 60)
    options = {"bits": LADDER, "group_size": 32, "shared": True, "embeddings": False, "head": False}
    told: dict[str, Any] = {"recipe": [{"gptq": options}], "calibration": [file], "samples": 4, "length": 32}
    budgets = [2.95, 4.1, 5.2]
    dry = compress(llama, tmp_path / "out", **told, target_bits=budgets, dry_run=True)
    report = compress(llama, tmp_path / "out", **told, gate=False, target_bits=budgets)
    assert report.size_bytes <= dry.size_bytes
    assert [row.rung for row in report.frontier if row.chosen] == [2, 3, 4]
    assert {row.uniform for row in report.frontier if not row.chosen} == set(LADDER)
    losses = [row.kl for row in report.rows if row.kl is not None]  # the engine ran at each
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    with Artifact.open(tmp_path / "out") as artifact:
        assert artifact.bits == (2, 3, 4)
        for bits, budget, row in zip(artifact.bits, budgets, report.rows, strict=True):
            assert row.bits_per_weight == pytest.approx(artifact.plan.bits_per_weight(bits), abs=1e-4)
            assert held(artifact.plan, bits) <= budget
            for name, entry in artifact.manifest.entries.items():
                assert artifact.dequantize(name, bits).shape == (entry.out, entry.columns)
        ladders = {entry.bits for entry in artifact.manifest.entries.values()}
    assert len(ladders) > 1
