"""What a recipe is expected to take, before any weight is read."""

from typing import Any

import pytest

from lilliput.core.errors import OutOfResource
from lilliput.core.recipe import load_recipe
from lilliput.models import Checkpoint
from lilliput.pipeline.plan import INTERPRETER_BYTES, Work, budget, plan_work
from support.families import write_checkpoint

LENGTH = 32
RTN: dict[str, Any] = {"rtn": {"bits": [2, 4], "group_size": 32}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Blocks that outweigh the embedding."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama", 0, hidden_size=128, intermediate_size=512, num_hidden_layers=3)
    return Checkpoint.open(folder)


def plan(checkpoint: Checkpoint, *stages: dict[str, Any]) -> Work:
    return plan_work(checkpoint, load_recipe(list(stages)))


def expected(work: Work, whole: bool = False, max_ram: int | None = None) -> int:
    return budget(work, max_ram=max_ram, length=LENGTH, whole=whole).ram_bytes


def test_a_tuner_is_counted_with_its_copies_gradients_and_moments(checkpoint: Checkpoint) -> None:
    works = {
        codes: plan(checkpoint, RTN, {"tune": {"batch": 1, "codes": codes, "written": False}})
        for codes in (True, False)
    }
    coded = sum(entry.out * entry.columns for entry in works[True].plan.entries.values())
    frozen, moved = (expected(works[codes], whole=True) for codes in (False, True))
    # the number behind a code, its gradient, two moments, and whether it is inside
    assert moved - frozen == (4 * 4 + 1) * coded
    # three decoders in float32, codes, and the graph of one width
    assert frozen > INTERPRETER_BYTES + 3 * 4 * works[False].parameters + (1 + 8) * coded
    assert expected(plan(checkpoint, RTN)) < frozen
    more = plan(checkpoint, RTN, {"tune": {"batch": 5, "codes": False, "written": False}})
    rows = expected(more, whole=True) - frozen
    assert rows > 4 * 3 * 4 * LENGTH * 512  # four rows more, each with at least its gates, ups and products
    # a stage on the whole model before them leaves another decoder
    turned = plan(checkpoint, {"hadamard": {}}, RTN, {"tune": {"batch": 1, "codes": False, "written": False}})
    assert expected(turned, whole=True) - frozen >= 4 * works[False].parameters


def test_a_tuner_that_does_not_fit_is_named_before_any_work(checkpoint: Checkpoint) -> None:
    work = plan(checkpoint, RTN, {"tune": {}})
    needed = expected(work, whole=True)
    assert expected(work, whole=True, max_ram=needed) == needed
    with pytest.raises(
        OutOfResource, match=r"^memory: tune on the whole model needs about .* GiB, more than --max-ram"
    ):
        expected(work, whole=True, max_ram=needed - 1)


def test_a_block_in_training_is_counted_where_it_outweighs_a_solve(checkpoint: Checkpoint) -> None:
    options = {"bits": [2, 4], "group_size": 16, "rows": 1, "let": True}
    spec = checkpoint.spec
    weights = sum(out * columns for out, columns in spec.linears(0).values())
    plain = plan(checkpoint, {"omniquant": options})
    full = plan(checkpoint, {"omniquant": {**options, "learn_rounding": True}})
    assert expected(full) - expected(plain) == 12 * weights  # the offsets of the rounding, their gradients, their best
    assert expected(full) > INTERPRETER_BYTES + (4 + 4 + 1 + 4 * 4 + 12 + 12) * weights
    assert expected(plan(checkpoint, RTN)) < expected(plain)
