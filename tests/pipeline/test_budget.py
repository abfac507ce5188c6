"""A budget in, a recipe that names every layer's width out, and an artifact that keeps to it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.artifact.plan import Plan
from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError
from lilliput.core.progress import Silent
from lilliput.core.recipe import load_recipe
from lilliput.methods.quantize.rtn import RTN
from lilliput.models import Checkpoint
from lilliput.pipeline import compress
from lilliput.pipeline.budget import Target, allocate, check_target, largest
from lilliput.pipeline.plan import plan_work
from support.families import FAMILIES

RECIPE = [{"rtn": {"bits": [2, 3, 4, 8], "group_size": 32, "end_bits": [4, 8]}}]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    FAMILIES["llama"](tmp_path / "llama", 0)
    return tmp_path / "llama"


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "text.txt"
    file.write_text("The old man and the child went on and on, and the sea and the wind went with them. " * 60)
    return {"recipe": RECIPE, "calibration": [file], "samples": 4, "length": 32, "gate": False}


def made_up(work: Any, feels: str = "") -> dict[str, dict[int, float]]:
    """Losses that fall fourfold a bit; a layer of that name feels a thousand times as much."""
    return {n: {b: (1000.0 if n == feels else 1.0) * 4.0**-b for b in e.bits} for n, e in work.plan.entries.items()}


def test_no_budget_is_passed_and_more_of_it_never_loses_more(llama: Path) -> None:
    checkpoint, recipe = Checkpoint.open(llama), load_recipe(RECIPE)
    work = plan_work(checkpoint, recipe)
    losses, before = made_up(work, "layers.1.mlp.down_proj"), float("inf")
    for tenth in range(38, 100, 7):
        target = Target(bits=(tenth / 10,))
        named, rows = allocate(recipe, work, target, losses)
        plan = plan_work(checkpoint, named).plan
        (chosen,) = [row for row in rows if row.chosen]
        assert plan.bits_per_weight(plan.bits[0]) <= tenth / 10
        assert chosen.bits_per_weight == pytest.approx(plan.bits_per_weight(plan.bits[0]), abs=1e-4)
        assert plan.total_bytes() == chosen.size_bytes <= largest(work, target)
        assert chosen.predicted_kl <= before
        before = chosen.predicted_kl
        size = Target(size=plan.total_bytes())
        named, rows = allocate(recipe, work, size, losses)
        assert plan_work(checkpoint, named).plan.total_bytes() <= plan.total_bytes()


def test_the_layer_that_feels_most_is_served_better_than_by_one_width_for_all(llama: Path) -> None:
    recipe = load_recipe(RECIPE)
    work = plan_work(Checkpoint.open(llama), recipe)
    losses = made_up(work, "layers.1.mlp.down_proj")
    even = next(row for row in allocate(recipe, work, Target(bits=(9.0,)), losses)[1] if row.uniform == 3)
    named, rows = allocate(recipe, work, Target(bits=(even.bits_per_weight + 1e-4,)), losses)
    (chosen,) = [row for row in rows if row.chosen]
    assert chosen.predicted_kl < 0.5 * even.predicted_kl
    assert named.stages[0].options["layer_bits"]["layers.1.mlp.down_proj"][0] > 3


@pytest.mark.parametrize("unit", ["bits", "size"])
def test_a_budget_below_the_smallest_is_refused_with_the_smallest_which_is_possible(unit: str, llama: Path) -> None:
    recipe = load_recipe(RECIPE)
    work = plan_work(Checkpoint.open(llama), recipe)
    with pytest.raises(ConfigError, match=rf"^--target-{unit}: .* is below the [\d.,]+ of every layer") as caught:
        check_target(work, Target(bits=(2.0,)) if unit == "bits" else Target(size=10_000))
    least = caught.value.what.split("below the ")[1].split(" ")[0].replace(",", "")
    target = Target(bits=(float(least),)) if unit == "bits" else Target(size=int(least))
    check_target(work, target)
    named, _ = allocate(recipe, work, target, made_up(work))
    widths = {bits[0] for name, bits in named.stages[0].options["layer_bits"].items() if name.startswith("layers.")}
    assert widths == {2}


def test_both_targets_or_none_above_zero_are_refused() -> None:
    assert Target.of(None, None) is None
    with pytest.raises(ConfigError, match=r"^target: both a target of 3 bits and one of 1,000 bytes are given\."):
        Target.of(3, 1000)
    with pytest.raises(ConfigError, match=r"^target: the target is 0\."):
        Target.of(None, 0)
    with pytest.raises(ConfigError, match=r"^target: the target is nan\."):
        Target.of(float("nan"), None)


def test_a_recipe_that_quantizes_nothing_has_no_widths_to_choose(llama: Path, told: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^target: a target needs layers to choose widths for"):
        compress(llama, llama.parent / "out", **(told | {"recipe": [{"wanda": {}}]}), target_bits=3)


def test_a_layer_may_have_a_ladder_of_its_own_by_its_name(llama: Path) -> None:
    own = {"layers.0.*": [3, 4], "lm_head": [8]}
    recipe = load_recipe([{"rtn": {"bits": [2, 4], "group_size": 32, "end_bits": [4], "layer_bits": own}}])
    plan = plan_work(Checkpoint.open(llama), recipe).plan
    assert plan.bits == (2, 4)
    assert plan.entries["layers.0.attn.q_proj"].bits == (3, 4)
    assert plan.entries["layers.1.attn.q_proj"].bits == (2, 4)
    assert plan.entries["lm_head"].bits == (8,)
    assert plan.entries["embed_tokens"].bits == (4,)
    with pytest.raises(ValueError, match=r"^rtn\.layer_bits\.lm_head: layer_bits\.lm_head is \[9\]"):
        plan_work(Checkpoint.open(llama), load_recipe([{"rtn": {"layer_bits": {"lm_head": [9]}}}]))


def test_the_artifact_keeps_to_the_budget_its_recipe_repeats_it_and_a_killed_run_goes_on(
    llama: Path, told: dict[str, Any], tmp_path: Path
) -> None:
    weights = load_file(llama / "model.safetensors")
    for name, weight in weights.items():  # a layer that does next to nothing is where bits can be saved
        if name.startswith("model.layers.0.") and "proj" in name:
            weight.mul_(1e-3 if "o_proj" in name or "down_proj" in name else 1.0)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    dry = compress(llama, tmp_path / "out", **told, target_bits=5.0, dry_run=True)
    assert "no width is chosen yet" in dry.warnings[-1]
    assert not dry.rows
    report = compress(llama, tmp_path / "out", **told, target_bits=5.0)
    artifact = Artifact.open(tmp_path / "out")
    plan = Plan.of(artifact.manifest)
    assert len(artifact.bits) == 1
    assert plan.bits_per_weight(artifact.bits[0]) <= 5.0
    assert report.size_bytes == plan.total_bytes() <= dry.size_bytes
    assert sum(row.chosen for row in report.frontier) == 1
    assert {row.uniform for row in report.frontier} == {None, 2, 3, 4, 8}
    entries = artifact.manifest.entries
    assert entries["layers.0.mlp.down_proj"].bits[0] < max(e.bits[0] for e in entries.values())

    class Dies(Silent):
        left = 7

        def advance(self, units: int) -> None:
            self.left -= 1
            if not self.left:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        compress(llama, tmp_path / "again", **told, target_bits=5.0, progress=Dies())
    noted = json.loads((tmp_path / "again.partial" / "work" / "budget" / "sensitivity.json").read_text())
    assert len(noted) == 7
    assert compress(llama, tmp_path / "again", **told, target_bits=5.0).resumed
    compress(llama, tmp_path / "repeat", recipe=tmp_path / "out" / "recipe.yaml", gate=False)
    for name in [p.name for p in (tmp_path / "out").glob("*.safetensors")]:
        digests = [hashlib.sha256((tmp_path / f / name).read_bytes()).hexdigest() for f in ("out", "again", "repeat")]
        assert len(set(digests)) == 1, name


def test_predicted_losses_are_measured_one_layer_at_a_time(llama: Path, told: dict[str, Any], tmp_path: Path) -> None:
    from lilliput.methods.sources import CheckpointSource
    from lilliput.pipeline.sensitivity import Sensitivities

    checkpoint = Checkpoint.open(llama)
    work = plan_work(checkpoint, load_recipe(RECIPE))
    rows = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0)).to(torch.int32).numpy()
    source = CheckpointSource(checkpoint)
    found = Sensitivities(source, work.methods, rows, None, tmp_path / "notes", Silent()).measure()
    assert set(found) == set(work.plan.entries)
    for name in ("embed_tokens", "layers.1.attn.v_proj", "lm_head"):
        for bits, loss in found[name].items():
            model = source.whole()
            tokens = torch.tensor(rows, dtype=torch.int64)
            with torch.no_grad():
                exact = torch.log_softmax(model(tokens), -1)
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(RTN(bits=(bits,), group_size=32).solve(weight.data, None).dequantize(bits))
                other = torch.log_softmax(model(tokens), -1)
                kl = (exact.exp() * (exact - other)).sum(-1).mean()
            assert loss == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert Sensitivities(source, work.methods, rows, None, tmp_path / "notes", Silent()).measure() == found
