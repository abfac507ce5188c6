from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, Unsupported
from lilliput.engine import Engine
from lilliput.methods.quantize.hadamard import Hadamard
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.numerics.grids import nearest
from lilliput.numerics.hadamard import Rotation
from lilliput.pipeline import compress
from support.families import FAMILIES, VOCAB, Case, each, write_checkpoint

CASES: list[Case] = [
    *((family, {}) for family in FAMILIES if family != "gemma2"),
    ("llama", {"hidden_size": 48, "head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 40, "head_dim": 6, "tie_word_embeddings": True}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
]


def decoder_of(folder: Path, family: str, changes: dict[str, Any]) -> Decoder:
    write_checkpoint(folder, family, seed=3, **changes)
    return load_decoder(Checkpoint.open(folder)).eval()


def logits(decoder: Decoder) -> torch.Tensor:
    tokens = torch.randint(3, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = decoder(tokens)
    return found


@each(CASES)
def test_the_rotated_model_says_what_the_original_says(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    original = decoder_of(tmp_path, family, changes)
    expected, announced = logits(original), Hadamard().respec(original.spec, original.tensors())
    rotated = Hadamard().apply(deepcopy(original), None)
    assert (rotated.spec, rotated.tensors()) == announced
    assert rotated.spec.norm.kind == "rms"
    assert not rotated.spec.tied_head
    norms = {n: w + rotated.spec.norm.offset for n, w in rotated.state_dict().items() if n.endswith("_norm.weight")}
    assert all((w == 1).all() for n, w in norms.items() if n.rpartition(".")[0][-6:] not in ("q_norm", "k_norm"))
    before = original.state_dict()
    for name, after in rotated.state_dict().items():
        if name.endswith(("_proj.weight", "embed_tokens.weight", "embed_positions.weight")):
            assert (after - before[name]).norm() > 0.5 * before[name].norm(), f"{name} was left as it was"
    assert (logits(rotated) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_alone_change_no_tensor_but_values_and_outputs(family: str, tmp_path: Path) -> None:
    original = decoder_of(tmp_path, family, {})
    rotated = Hadamard(hidden=False).apply(deepcopy(original), None)
    assert rotated.spec == original.spec
    before = original.state_dict()
    changed = {n.split(".", 2)[2] for n, t in rotated.state_dict().items() if not torch.equal(t, before[n])}
    assert changed - {"attn.v_proj.bias"} == {"attn.v_proj.weight", "attn.o_proj.weight"}
    expected = logits(original)
    assert (logits(rotated) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_norms_behind_the_writers_are_refused_before_any_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "gemma2")
    with pytest.raises(
        Unsupported,
        match=r"^hadamard\.hidden: gemma2 has norms behind its writers, which do not commute with a rotation\. "
        r"Set hidden: false to rotate the heads alone\.$",
    ):
        compress(tmp_path / "model", tmp_path / "out", recipe=[{"hadamard": {}}, {"rtn": {}}], dry_run=True)


def test_nothing_to_rotate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^hadamard: it rotates nothing\. Set hidden or heads, or leave it out\.$"):
        Hadamard(hidden=False, heads=False)


def test_the_seed_decides(tmp_path: Path) -> None:
    original = decoder_of(tmp_path, "llama", {})
    name = "layers.1.mlp.down_proj.weight"
    one, same, other = (Hadamard(seed=s).apply(deepcopy(original), None).state_dict()[name] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gemma"])  # a tied head and biases; layer norms; an offset
def test_the_artifact_carries_the_new_model_and_the_engine_runs_it(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", family, seed=3)
    recipe = [{"hadamard": {}}, {"rtn": {"bits": [4, 8], "group_size": 32, "exclude": ["layers.0.mlp.up_proj"]}}]
    report = compress(tmp_path / "model", tmp_path / "out", recipe=recipe, gate=False)
    artifact, engine = Artifact.open(tmp_path / "out"), Engine(tmp_path / "out", activations="float")
    assert not engine.spec.tied_head
    assert "lm_head" in artifact.manifest.entries
    original = load_decoder(Checkpoint.open(tmp_path / "model")).eval()
    rotated = Hadamard().apply(deepcopy(original), None)
    tokens = torch.arange(5, 40)
    for bits in (4, 8):
        with torch.no_grad():
            for name in artifact.manifest.entries:
                rotated.get_submodule(name).weight.copy_(torch.from_numpy(artifact.dequantize(name, bits)))  # type: ignore[operator,union-attr]
            expected = rotated(tokens[None])[0]
        found = torch.from_numpy(engine.logits(tokens.tolist(), bits=bits))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    kl = {row.bits: row.kl for row in report.rows}
    assert kl[8] is not None
    assert kl[8] < 0.05  # measured against the original, not the rotated model


def test_outliers_are_spread_and_four_bits_lose_less() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[:, [5, 77, 200]] *= 20
    turned = Rotation.draw(256, torch.Generator().manual_seed(1)).right(weight).float()

    def kurtosis(w: torch.Tensor) -> float:
        centred = w - w.mean()
        return float(centred.pow(4).mean() / centred.square().mean() ** 2)

    def error(w: torch.Tensor) -> float:
        return float((nearest(w, (4,), 64, sym=False).dequantize(4) - w).norm() / w.norm())

    assert kurtosis(weight) > 30
    assert kurtosis(turned) < 4
    assert error(turned) < 0.8 * error(weight)
