"""From a task to a schedule in the artifact; what is learned, on artifacts of random numbers."""

import random
from pathlib import Path

import numpy as np
import pytest

from lilliput.core.errors import ConfigError, Interrupted
from lilliput.engine import Engine, load
from lilliput.engine.schedules.features import Features, all_choices
from lilliput.engine.schedules.learned import Learned
from lilliput.numerics.divergence import log_softmax
from lilliput.scheduling import ScheduleJob, find_schedule
from lilliput.scheduling.learn import Beginning, Table, fit_features
from support.small_artifact import write_small_artifact

GRID, LADDER = (0, 10, 20, 30), (4, 3, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("job") / "small.lilliput"
    write_small_artifact(folder)
    return load(folder, threads=1)


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[257, *(draw.randrange(200) for _ in range(draw.randrange(3, 9)))] for _ in range(count)]


def beginnings(classes: np.ndarray, seed: int = 0) -> list[Beginning]:
    """Prompts of 4 to 20 tokens whose values lean one way for each class; keys say nothing."""
    draw, made = np.random.default_rng(seed), []
    leaning = np.random.default_rng(9).normal(0, 1, (4, 2, 1, 8))
    for which in classes:
        count = int(draw.integers(4, 20))
        keys, values = draw.normal(0, 1, (2, 2, count, 8))
        entropy = float(which + draw.normal(0, 0.05))
        made.append(Beginning(count, ((entropy, 0.5),) * 3, keys.astype("f4"), (values + leaning[which]).astype("f4")))
    return made


def test_the_search_keeps_within_the_tolerance_and_shows_all_it_scored(small: Engine) -> None:
    job = ScheduleJob(tolerance=0.05, max_new_tokens=24, ladder=(8, 4, 2), grid=4, exhaustive=True)
    found = find_schedule(small, prompts(6), job)
    chosen = next(row for row in found.frontier if row.chosen)
    assert chosen.schedule == str(found.schedule)
    assert chosen.within
    assert all(row.average_bits >= chosen.average_bits for row in found.frontier if row.within)
    assert len(found.frontier) == len({row.schedule for row in found.frontier}) > 10
    best = [row for row in found.frontier if row.best]
    assert [row.score for row in best] == sorted(row.score for row in best)  # fewer bits, more divergence
    assert found.entry().horizon == 24
    quick = find_schedule(small, prompts(6), ScheduleJob(tolerance=0.05, max_new_tokens=24, ladder=(8, 4, 2), grid=4))
    assert {row.schedule: row.score for row in quick.frontier}.items() <= {
        row.schedule: row.score for row in found.frontier
    }.items()


def test_references_given_are_what_counts(small: Engine) -> None:
    job = ScheduleJob(metric="nll", max_new_tokens=8, ladder=(4, 2), grid=2, tolerance=0.5)
    found = find_schedule(small, prompts(2), job, references=[[1, 2, 3, 4], [5, 6, 7]])
    widest = next(row for row in found.frontier if row.average_bits == 4)
    nll = 0.0
    for prompt, answer in zip(prompts(2), ([1, 2, 3, 4], [5, 6, 7]), strict=True):
        rows = small.logits([*prompt, *answer[:-1]], bits=4)[len(prompt) - 1 :].astype(np.float64)
        nll += float((np.log(np.exp(rows).sum(1)) - rows[range(len(answer)), answer]).mean()) / 2
    assert widest.score == pytest.approx(nll, rel=1e-4)


def separable(classes: np.ndarray) -> Table:
    """Losses such that class c is best left at 3 bits from GRID[min(c, 2)] and at 2 bits from GRID[c] on."""
    choices = tuple(all_choices(GRID, 2))
    wanted = np.stack([np.minimum(classes, 2), classes], axis=1) * 10
    loss = np.abs(np.array(choices)[None] - wanted[:, None]).sum(-1) / 10
    return Table(LADDER, GRID, choices, loss, np.full(loss.shape, 3.0), np.zeros(len(classes)))


def test_what_separates_is_learned_and_padding_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    from lilliput.scheduling.train import exported, fit, padded, places_of

    classes = np.random.default_rng(1).integers(0, 4, 160)
    job, none, table = (
        ScheduleJob(method="learned", max_new_tokens=30),
        np.zeros(0, dtype=np.float32),
        separable(classes),
    )
    pairs = [(one.keys, one.values) for one in beginnings(classes)]
    reader = fit(pairs, table.loss, places_of(table), 0)
    made = exported(reader, none, LADDER, GRID, job)
    fresh = np.random.default_rng(2).integers(0, 4, 100)
    seen = [(one.keys, one.values) for one in beginnings(fresh, seed=5)]
    said = np.stack([made.logits(*pair) for pair in seen])
    chosen = np.maximum.accumulate(said.argmax(-1), axis=1)
    assert (chosen == np.stack([np.minimum(fresh, 2), fresh], axis=1)).mean() > 0.9
    # what it says goes into one softmax as it is: had it been made probabilities first, none of 4 could be above 0.48
    assert np.exp(log_softmax(said)).max(-1).mean() > 0.7
    again = exported(fit(pairs, table.loss, places_of(table), 0), none, LADDER, GRID, job)
    assert all((made.weights[name] == again.weights[name]).all() for name in made.weights)  # the same seed
    with torch.no_grad():
        together = reader(*padded(seen[:8])).numpy()
        alone = np.concatenate([reader(*padded([pair])).numpy() for pair in seen[:8]])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, said[:8], atol=1e-4)  # NumPy says the same


def test_expected_costs_are_those_of_every_choice_by_its_probability() -> None:
    torch = pytest.importorskip("torch")
    from lilliput.scheduling.train import expected, places_of

    table = separable(np.array([0, 3, 1]))
    places = places_of(table)
    assert table.choices[places[2, 1]] == table.choices[places[2, 2]] == (20, 20)  # no rung is left before the last
    logits = np.random.default_rng(0).normal(0, 1, (3, 2, 4))
    p = np.exp(log_softmax(logits))
    by_hand = [
        sum(p[n, 0, i] * p[n, 1, j] * table.loss[n, places[i, j]] for i in range(4) for j in range(4)) for n in range(3)
    ]
    told = expected(torch.from_numpy(logits), torch.from_numpy(table.loss[:, places]))
    assert float(told) == pytest.approx(np.mean(by_hand))


def test_the_price_of_a_bit_is_that_of_the_hull_where_the_tolerance_lies() -> None:
    pytest.importorskip("torch")
    from lilliput.scheduling.train import highest, slope_at

    bits, loss = np.array([2.0, 2.5, 3.0, 3.5, 4.0]), np.array([1.0, 0.9, 0.2, 0.15, 0.0])  # 2.5 and 3.5 lie above it
    assert slope_at(bits, loss, 0.1) == pytest.approx(0.2)
    assert slope_at(bits, loss, 0.5) == slope_at(bits, loss, 9.0) == pytest.approx(0.8)
    asked: list[float] = []

    def within(price: float) -> bool:
        asked.append(price)
        return price <= 1.3

    assert 1.2 < highest(within, 1.0) <= 1.3
    assert len(asked) == 5
    assert highest(lambda price: False, 1.0) == 0


def test_the_classifier_keeps_the_tolerance_of_all_on_prompts_it_did_not_see() -> None:
    """Half of the prompts lose much by few bits, the others nothing: all it needs is to tell them apart."""
    pytest.importorskip("torch")
    from lilliput.scheduling.train import train

    choices, grid = tuple(all_choices((0, 30), 1)), (0, 30)

    def drawn(count: int, seed: int) -> tuple[Table, list[Beginning]]:
        classes = np.random.default_rng(seed).integers(0, 2, count)
        bits = np.tile([2.0, 4.0], (count, 1))
        return Table((4, 2), grid, choices, classes[:, None] * (4 - bits) * 0.5, bits, np.zeros(count)), beginnings(
            classes, seed
        )

    table, seen = drawn(60, 0)
    job, none = ScheduleJob(method="learned", max_new_tokens=30), np.zeros(0, dtype=np.float32)
    allowed = 0.2
    made = train(table, range(60), seen, none, job, allowed)
    fresh, beginning = drawn(60, 1)
    place = [int(made.logits(one.keys, one.values).argmax()) for one in beginning]
    assert fresh.loss[range(60), place].mean() <= 1.5 * allowed
    assert fresh.bits[range(60), place].mean() < 3.3  # about half of them at 2


def test_features_spend_bits_where_they_help_within_the_tolerance_of_all() -> None:
    """Half of the prompts, told by their entropy, lose much by few bits, the others nothing."""
    classes = np.random.default_rng(0).integers(0, 2, 120)
    choices = tuple(all_choices(GRID, 1))
    bits = np.tile([2.0, 2.7, 3.3, 4.0], (120, 1))
    loss = classes[:, None] * (4 - bits) * 0.5
    table = Table((4, 2), GRID, choices, loss, bits, np.zeros(120))
    job = ScheduleJob(method="features", max_new_tokens=30, watch=2)
    made = fit_features(table, range(120), beginnings(classes), job, 0.01)
    assert made.price > 0

    def choice(entropy: float) -> tuple[int, ...] | None:
        class Row:
            def entropy(self) -> float:
                return entropy

            def top1(self) -> float:
                return 0.5

        return made.decide(2, 10, [(entropy, 0.5)] * 2, Row())  # type: ignore[arg-type]

    assert (choice(0.0), choice(1.0)) == ((0,), (30,))


@pytest.mark.parametrize("method", ["learned", "features"])
def test_learned_on_a_task_and_scored_again_from_the_notebook(small: Engine, tmp_path: Path, method: str) -> None:
    if method == "learned":
        pytest.importorskip("torch")
    job = ScheduleJob(method=method, max_new_tokens=12, ladder=(4, 2), grid=3, watch=2)  # type: ignore[arg-type]
    found, again = (find_schedule(small, prompts(24), job, notebook=tmp_path / "notes.jsonl") for _ in range(2))
    assert isinstance(found.schedule, Learned if method == "learned" else Features)
    assert found.frontier == again.frontier
    assert all((found.schedule.tensors()[name] == w).all() for name, w in again.schedule.tensors().items())
    assert [row.schedule for row in found.frontier if row.chosen] == [str(found.schedule)]


def test_an_interrupt_says_how_to_go_on_and_the_same_comes_out(
    small: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, notes = ScheduleJob(max_new_tokens=12, ladder=(8, 4, 2), grid=3, tolerance=0.05), tmp_path / "notes.jsonl"
    whole = find_schedule(small, prompts(4), job)
    real, left = Engine.follow, [9]

    def interrupted(*args):  # type: ignore[no-untyped-def]
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Engine, "follow", interrupted)
    with pytest.raises(Interrupted, match=r"^schedule: stopped; what was scored is kept in .*notes\.jsonl\. Repeat"):
        find_schedule(small, prompts(4), job, notebook=notes)
    left[0] = 10_000
    assert find_schedule(small, prompts(4), job, notebook=notes) == whole
    with_all = 10_000 - left[0]
    left[0] = 10_000
    find_schedule(small, prompts(4), job)
    assert with_all == 10_000 - left[0] - 8  # eight were scored before, and are not again
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        find_schedule(small, prompts(4), job)


def test_faults_are_one_line(small: Engine) -> None:
    for job, match in (
        ({"ladder": (4,)}, "leaves nothing to choose"),
        ({"ladder": (4, 5)}, "5 bits are not in this artifact"),
        ({"ladder": (2, 4)}, "does not fall"),
        ({"prefill": 6}, "6 bits are not in this artifact"),
        ({"method": "learned"}, "teach no chooser"),
        ({"max_new_tokens": 1000}, "leaves room"),
    ):
        with pytest.raises(ConfigError, match=match):
            find_schedule(small, prompts(2), ScheduleJob(**{"max_new_tokens": 8, "watch": 1, **job}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="share such as 1%"):
        ScheduleJob(tolerance=1.5)
    with pytest.raises(LookupError, match="kl"):
        find_schedule(small, prompts(2), ScheduleJob(metric="kll", max_new_tokens=8, watch=1))
