"""What the widths cost, as docs/artifact.md has it."""

import pytest

from lilliput.artifact.plan import Plan, stored_bytes
from lilliput.artifact.schema import rung_file
from support.small_artifact import llama_spec, small_plan

SPEC = llama_spec(layers=1, hidden=4096, heads=32, kv_heads=8, inter=14336)


def rungs(plan: Plan, kind: str = "") -> list[float]:
    """Bits a weight of the tensors of that kind in each rung file."""
    weights = sum(entry.out * entry.columns for entry in plan.entries.values())
    slots = [[plan.slot(t.name) for t in plan.tensors[rung_file(b)] if kind in t.name] for b in plan.bits]
    return [8 * sum(slot.end - slot.begin for slot in file) / weights for file in slots]


@pytest.mark.parametrize(
    ("group_size", "read", "added"),
    [(64, [2.5, 3.5, 4.5, 8.5], [2.5, 1.5, 1.5, 4.5]), (128, [2.25, 3.25, 4.25, 8.25], [2.25, 1.25, 1.25, 4.25])],
)
def test_the_bits_of_a_weight_are_those_of_the_documentation(
    group_size: int, read: list[float], added: list[float]
) -> None:
    plan = small_plan(SPEC, group_size=group_size)
    assert [plan.bits_per_weight(b) for b in plan.bits] == read
    assert rungs(plan) == added
    looked = small_plan(SPEC, group_size=group_size, tables=(2, 3, 4))
    assert [round(more, 3) for more in rungs(looked, ".table.")] == [0.006, 0.013, 0.025, 0]
    assert rungs(looked) == pytest.approx([a + t for a, t in zip(added, rungs(looked, ".table."), strict=True)])
    for b, more in zip(plan.bits, rungs(looked, ".table."), strict=True):
        assert looked.bits_per_weight(b) == pytest.approx(plan.bits_per_weight(b) + more)


def test_a_shared_grid_costs_a_byte_a_row_and_width() -> None:
    plan = small_plan(SPEC, group_size=64, shared=True)
    assert [round(more, 3) for more in rungs(plan, ".ratio.")] == [0.002] * 4
    assert rungs(plan, ".scale.") == [0.25, 0, 0, 0]
    assert [round(plan.bits_per_weight(b), 3) for b in plan.bits] == [2.502, 3.502, 4.502, 8.502]
    # with rows this short ratios would leave most of a page empty before every field
    few = small_plan(llama_spec(layers=4, hidden=256, inter=512), group_size=64, shared=True)
    weights = sum(entry.out * entry.columns for entry in few.entries.values())
    for b in few.bits:
        files = sum(few.files[file].size for file in few.files_at(b)[1:])
        assert 8 * files / weights < few.bits_per_weight(b) + 0.06 * (few.bits.index(b) + 1)


def test_grids_in_bytes_cost_half_and_a_byte_a_row() -> None:
    plan = small_plan(SPEC, group_size=64, grid_bits=8)
    assert rungs(plan, ".scale.") == rungs(plan, ".zero.") == [0.125] * 4
    assert [round(more, 3) for more in rungs(plan, ".unit.")] == [0.002] * 4
    shared = small_plan(SPEC, group_size=64, grid_bits=8, shared=True)
    assert [round(shared.bits_per_weight(b), 3) for b in shared.bits] == [2.253, 3.253, 4.253, 8.253]


def test_a_table_costs_its_bytes_over_the_columns() -> None:
    wide = {"layers.0.mlp.down_proj": 14336, "layers.0.attn.q_proj": 4096}
    plan = small_plan(SPEC, tables=(2, 3, 4))
    for name, columns in wide.items():
        for b in (2, 3, 4):
            slot, entry = plan.slot(f"{name}.table.{b}"), plan.entries[name]
            assert 8 * (slot.end - slot.begin) / (entry.out * entry.columns) == 8 * 2**b / columns


def test_an_outlier_costs_four_bytes_and_a_row_two_in_the_first_rung() -> None:
    plan = small_plan(SPEC, group_size=64, outliers=0.005)
    plain = small_plan(SPEC, group_size=64)
    weights = sum(entry.out * entry.columns for entry in plan.entries.values())
    cost = sum(32 * entry.outliers + 16 * entry.out for entry in plan.entries.values()) / weights
    assert rungs(plan, ".outlier.") == pytest.approx([cost, 0, 0, 0])
    assert [plan.bits_per_weight(b) - plain.bits_per_weight(b) for b in plan.bits] == pytest.approx([cost] * 4)
    assert 0.16 < cost < 0.164
    for name, entry in plan.entries.items():
        more = stored_bytes(entry, 2) - stored_bytes(plain.entries[name], 2)
        assert more == stored_bytes(entry) - stored_bytes(plain.entries[name]) == 4 * entry.outliers + 2 * entry.out
