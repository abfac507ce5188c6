"""Outliers from a recipe to the engine: stored, counted, trained around, and taken up again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.engine import load
from lilliput.methods.outliers import solve
from lilliput.methods.quantize.rtn import RTN
from lilliput.models import Checkpoint, load_decoder
from lilliput.numerics.nested import Quantized
from lilliput.pipeline import compress
from lilliput.pipeline.tune import Store

SHARE = 0.02
GPTQ = {"gptq": {"bits": [2, 4], "group_size": 32, "end_bits": [4], "outliers": SHARE}}


@pytest.mark.parametrize("tuned", [False, True])
def test_the_engine_says_what_the_stored_weights_say(
    tuned: bool, llama: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    recipe = [GPTQ, *([{"tune": {"steps": 3, "batch": 2}}] if tuned else [])]
    compress(llama, tmp_path / "out", recipe=recipe, **given)
    assert verify(tmp_path / "out").ok
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.manifest.schema_version == "1.6"
    for name, entry in artifact.manifest.entries.items():
        assert entry.outliers == (round(SHARE * entry.out * entry.columns) if name.startswith("layers.") else 0)
    decoder = load_decoder(Checkpoint.open(llama))
    tokens = [3, 17, 44, 91, 12, 60, 5, 8]
    for bits in (2, 4):
        state = {f"{n}.weight": torch.from_numpy(artifact.dequantize(n, bits)) for n in artifact.quantized}
        decoder.load_state_dict(decoder.state_dict() | state)
        with torch.no_grad():
            expected = decoder(torch.tensor([tokens]))[0].numpy()
        said = load(tmp_path / "out", activations="float").logits(tokens, bits=bits)
        np.testing.assert_allclose(said, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_share_of_less_than_one_weight_is_none(llama: Path, tmp_path: Path) -> None:
    recipe = [{"rtn": {"bits": [2, 4], "group_size": 32, "outliers": 1e-5}}]
    compress(llama, tmp_path / "out", recipe=recipe, gate=False)
    assert not any(entry.outliers for entry in Artifact.open(tmp_path / "out").manifest.entries.values())


def test_training_leaves_the_outliers_as_they_were(llama: Path, given: dict[str, Any], tmp_path: Path) -> None:
    compress(llama, tmp_path / "plain", recipe=[GPTQ], **given)
    compress(llama, tmp_path / "tuned", recipe=[GPTQ, {"tune": {"steps": 3, "batch": 2}}], **given)
    plain, tuned = (Artifact.open(tmp_path / name) for name in ("plain", "tuned"))
    moved = 0
    for name in plain.quantized:
        before, after = plain.linear(name), tuned.linear(name)
        moved += not np.array_equal(before.dequantize(2), after.dequantize(2))
        for part in ("counts", "columns", "values"):
            one, other = (getattr(m.outliers, part, None) for m in (before, after))
            assert one is other is None or np.array_equal(one, other)
    assert moved


def test_a_budget_counts_them(llama: Path, given: dict[str, Any], tmp_path: Path) -> None:
    recipe = [{"gptq": GPTQ["gptq"] | {"bits": [2, 3, 4], "end_bits": [2, 4]}}]
    weights = load_file(llama / "model.safetensors")
    for name, weight in weights.items():  # long tails, which outliers take away
        if "_proj" in name:
            weight.view(-1)[::97] *= 20
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = compress(folder, tmp_path / "out", recipe=recipe, target_bits=4.6, **given)
    plain = [{"gptq": recipe[0]["gptq"] | {"outliers": 0.0}}]
    other = compress(folder, tmp_path / "other", recipe=plain, target_bits=4.6, **given)
    kl = [[row.predicted_kl for row in r.frontier if row.uniform == 2] for r in (report, other)]
    assert kl[0][0] < 0.7 * kl[1][0]  # what a layer loses was measured with its outliers
    plan = Artifact.open(tmp_path / "out").plan
    assert any(entry.outliers for entry in plan.entries.values())
    assert plan.bits_per_weight(plan.bits[0]) <= 4.6
    assert report.rows[0].bits_per_weight == pytest.approx(plan.bits_per_weight(plan.bits[0]), abs=1e-3)


def test_work_put_aside_is_taken_up_with_them(tmp_path: Path) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    made = solve(RTN(bits=(2, 4), group_size=32, outliers=SHARE), weight, None)
    assert isinstance(made, Quantized)
    store = Store(tmp_path / "kept")
    store.quantized("layers.0.mlp.up_proj", made, weight)
    store.settle(whole=True)
    again = Store(tmp_path / "kept").coded()["layers.0.mlp.up_proj"]
    for bits in (2, 4):
        assert torch.equal(again.dequantize(bits), made.dequantize(bits))
