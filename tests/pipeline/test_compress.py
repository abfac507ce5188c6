"""From a checkpoint to an artifact, through everything in between."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.core.progress import Silent
from lilliput.engine import Engine
from lilliput.methods.base import ModelMethod
from lilliput.methods.quantize.any_precision import AnyPrecision
from lilliput.methods.quantize.gptq import GPTQ
from lilliput.methods.quantize.leanquant import LeanQuant
from lilliput.models import Checkpoint, Decoder
from lilliput.numerics.nested import Quantized
from lilliput.pipeline import compress
from support.families import FAMILIES, write_checkpoint

TALES = Path(__file__).resolve().parents[2] / "assets" / "tales7m"
TEXT = "The old man and the child went on and on, and the sea and the wind went with them. " * 60


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    FAMILIES["llama"](folder, 0)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def wanda(text: Path) -> dict[str, object]:
    return {"recipe": "wanda-nested", "calibration": [text], "samples": 6, "length": 32, "gate": False}


def test_an_artifact_comes_out_verified_measured_and_described(llama: Path, tmp_path: Path) -> None:
    report = compress(llama, tmp_path / "out", gate=False)
    out = tmp_path / "out"
    assert verify(out).ok
    artifact = Artifact.open(out)
    assert artifact.bits == (2, 3, 4, 8)
    assert [row.bits for row in report.rows] == [2, 3, 4, 8]
    kl = [row.kl for row in report.rows]
    assert all(k is not None for k in kl)
    assert kl == sorted(kl, reverse=True)  # type: ignore[type-var]
    assert [q.bits for q in artifact.manifest.quality] == [2, 3, 4, 8]
    assert artifact.manifest.source.sha256 == Checkpoint.open(llama).fingerprint()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "lilliput"
    assert "wanda" not in (out / "recipe.yaml").read_text()
    assert "base_model: llama" in (out / "README.md").read_text()
    assert {r.name for r in artifact.manifest.layers} == set(artifact.manifest.entries)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out"]  # nothing is left behind


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_equals_transformers_on_the_same_dequantized_weights(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "model", family, 1)
    recipe = [{"rtn": {"bits": [3, 6], "group_size": 32, "shared": True}}]
    compress(tmp_path / "model", tmp_path / "out", recipe=recipe, gate=False)
    checkpoint, artifact = Checkpoint.open(tmp_path / "model"), Artifact.open(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(3, 300, 40)
    engine = Engine(tmp_path / "out", activations="float")
    for bits in (3, 6):
        copy = tmp_path / f"dequantized-{bits}"
        shutil.copytree(tmp_path / "model", copy)
        weights = load_file(copy / "model.safetensors")
        for name in artifact.manifest.entries:
            origin = checkpoint._origins[f"{name}.weight"]
            out, _ = origin.info.shape
            run = origin.run or out
            rows = torch.tensor([origin.start + r // run * origin.step + r % run for r in range(out)])
            weights[origin.stored[0]][rows] = torch.from_numpy(artifact.dequantize(name, bits))
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = model(torch.tensor(tokens)[None]).logits[0].numpy()
        found = engine.logits(tokens.tolist(), bits=bits)
        # Sums of n <= 128 products of float32 err by n * 2^-24 of their absolute sum; over a few layers whose
        # gains are of order one this stays below a thousandth of a percent of the largest logit, times ten to be safe.
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_same_run_twice_gives_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compress(llama, tmp_path / name, **wanda(text))  # type: ignore[arg-type]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    compress(llama, tmp_path / "c", **(wanda(text) | {"seed": 1}))  # type: ignore[arg-type]
    assert digests(tmp_path / "a")["bits-2.safetensors"] != digests(tmp_path / "c")["bits-2.safetensors"]


class Dies(Silent):
    """Ends the run, as a kill would, when so many steps are done."""

    class Now(BaseException):
        pass

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, units: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Dies.Now


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_dies_between_steps_goes_on_to_the_same_bytes(
    after: int, llama: Path, text: Path, tmp_path: Path
) -> None:
    compress(llama, tmp_path / "whole", **wanda(text))  # type: ignore[arg-type]
    with pytest.raises(Dies.Now):
        compress(llama, tmp_path / "out", progress=Dies(after), **wanda(text))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    report = compress(llama, tmp_path / "out", **wanda(text))  # type: ignore[arg-type]
    assert report.resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_run_that_dies_amid_a_step_or_while_finishing_goes_on_to_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(llama, tmp_path / "whole", **wanda(text))  # type: ignore[arg-type]
    from lilliput.pipeline import run as module
    from lilliput.pipeline.run import Tensors

    calls = iter(range(10**6))
    put = Tensors.quantized

    def dying(self: Tensors, *arguments: object) -> None:
        if next(calls) == 9:  # in the middle of the second block
            raise Dies.Now
        put(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensors, "quantized", dying)
    with pytest.raises(Dies.Now):
        compress(llama, tmp_path / "out", **wanda(text))  # type: ignore[arg-type]
    monkeypatch.setattr(Tensors, "quantized", put)

    def dead(*_: object, **__: object) -> None:
        raise Dies.Now

    for name in ("measure", "publish"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, dead)
        with pytest.raises(Dies.Now):
            compress(llama, tmp_path / "out", **wanda(text))  # type: ignore[arg-type]
        monkeypatch.setattr(module, name, real)
    compress(llama, tmp_path / "out", **wanda(text))  # type: ignore[arg-type]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_kill_nine_in_the_middle_then_the_same_command_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    model = tmp_path / "deep"
    write_checkpoint(model, "llama", 0, num_hidden_layers=10)
    compress(model, tmp_path / "whole", **wanda(text))  # type: ignore[arg-type]
    code = (
        "import sys; from lilliput.pipeline import compress; "
        "compress(sys.argv[1], sys.argv[2], recipe='wanda-nested', calibration=[sys.argv[3]], samples=6, length=32, "
        "gate=False)"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out"), str(text)]
    hidden = tmp_path / "out.partial" / "work"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not (hidden / "hidden-1.f32").exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_dying_at_any_rename_never_publishes_a_part_and_never_blocks_the_next_run(
    overwrite: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    compress(llama, whole, bits=[4], gate=False)
    old = whole
    if overwrite:
        old = tmp_path / "old"
        compress(llama, old, bits=[2], gate=False)
    real = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "rmdir")}
    count, reached = 0, 0
    for fatal in range(200):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        if overwrite:
            shutil.copytree(old, out)
        count = 0

        def dying(name: str, fatal: int = fatal) -> object:
            def call(*arguments: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count == fatal + 1:
                    raise Dies.Now
                return real[name](*arguments, **named)

            return call

        for name in real:
            monkeypatch.setattr(os, name, dying(name))
        try:
            compress(llama, out, bits=[4], gate=False, overwrite=overwrite)
            finished = True
        except Dies.Now:
            finished = False
        monkeypatch.undo()
        if finished:
            reached = fatal
            break
        if out.exists() and any(out.iterdir()):
            found = {k: v for k, v in digests(out).items() if not k.startswith(".")}
            assert found in (digests(old), digests(whole))
        compress(llama, out, bits=[4], gate=False, overwrite=True)
        assert digests(out) == digests(whole)
        assert not (tmp_path / "out.partial").exists()
    assert reached > 10  # it did die in many places before it came through


def test_a_folder_that_happens_to_have_the_name_of_ours_is_left_alone(llama: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"out\.partial: holds thesis\.txt, which is not ours\. Move it away"):
        compress(llama, tmp_path / "out", gate=False)
    assert (partial / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(partial)
    (tmp_path / "elsewhere").mkdir()
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is in the way and is not a folder of ours"):
        compress(llama, tmp_path / "out", gate=False)


def test_the_model_is_never_the_folder_where_the_work_is_done(llama: Path, tmp_path: Path) -> None:
    model = llama.rename(tmp_path / "out.partial")
    before = digests(model)
    with pytest.raises(ValueError, match=r"is the model's own or one is inside the other"):
        compress(model, tmp_path / "out", gate=False)
    assert digests(model) == before


def test_two_runs_do_not_work_in_one_place(llama: Path, tmp_path: Path) -> None:
    from lilliput.pipeline.workspace import Workspace

    with Workspace(tmp_path / "out"), pytest.raises(ValueError, match=r"another run is working there\. Wait for it"):
        compress(llama, tmp_path / "out", gate=False, resume=False)


@pytest.mark.parametrize("name", ["run.json", "state.safetensors"])
def test_damaged_notes_of_an_earlier_run_can_be_thrown_away(name: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Dies.Now):
        compress(llama, tmp_path / "out", gate=False, progress=Dies(2))
    (tmp_path / "out.partial" / "work" / name).write_bytes(b"")
    if name == "state.safetensors":
        with pytest.raises(ValueError, match=r"was damaged .*--no-resume"):
            compress(llama, tmp_path / "out", gate=False)
    compress(llama, tmp_path / "out", gate=False, resume=False)
    assert verify(tmp_path / "out").ok


def test_a_resume_asks_only_for_the_space_that_is_still_missing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Dies.Now):
        compress(llama, tmp_path / "out", gate=False, progress=Dies(2))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    compress(llama, tmp_path / "out", gate=False)
    assert verify(tmp_path / "out").ok


def test_ctrl_c_says_how_far_it_is_and_how_to_go_on(llama: Path, tmp_path: Path) -> None:
    class Stops(Dies):
        def advance(self, units: int) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match=r"stopped after 2 of 4 steps; .*Repeat the same command to go on") as caught:
        compress(llama, tmp_path / "out", gate=False, progress=Stops(2))
    assert caught.value.exit_code == 130  # type: ignore[attr-defined]


def test_unfinished_work_of_another_run_is_not_mixed_in(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Dies.Now):
        compress(llama, tmp_path / "out", gate=False, progress=Dies(2))
    with pytest.raises(ValueError, match=r"holds unfinished work with another recipe\. .*--no-resume"):
        compress(llama, tmp_path / "out", bits=[4], gate=False)
    compress(llama, tmp_path / "out", bits=[4], gate=False, resume=False)
    assert Artifact.open(tmp_path / "out").bits == (4,)


def test_an_existing_output_is_kept_unless_told_and_then_replaced_whole(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(llama, out, bits=[4], gate=False)
    before = digests(out)
    with pytest.raises(ValueError, match=r"out: already exists\. Give --overwrite"):
        compress(llama, out, bits=[8], gate=False)
    with pytest.raises(Dies.Now):
        compress(llama, out, bits=[8], gate=False, overwrite=True, progress=Dies(2))
    assert digests(out) == before
    compress(llama, out, bits=[8], gate=False, overwrite=True)
    assert Artifact.open(out).bits == (8,)
    assert verify(out).ok


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_model_is_never_the_output(where: str, llama: Path) -> None:
    before = digests(llama)
    with pytest.raises(ValueError, match=r"(is the model's own|already exists|not part of an artifact)"):
        compress(llama, llama / where, overwrite=True)
    assert digests(llama) == before


def test_a_broken_width_fails_the_gate_and_its_work_is_not_lost(llama: Path, tmp_path: Path) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setitem(__import__("lilliput.pipeline.gate", fromlist=["LIMITS"]).LIMITS, 2, 1e-6)
    try:
        with pytest.raises(RuntimeError, match=r"^quality gate: 2 bits: KL .* above 1e-06.*--no-gate") as caught:
            compress(llama, tmp_path / "out")
        assert caught.value.exit_code == 6  # type: ignore[attr-defined]
        assert not (tmp_path / "out").exists()
        report = compress(llama, tmp_path / "out", gate=False)
        assert report.resumed
        assert any("2 bits: KL" in line for line in report.warnings)
    finally:
        monkey.undo()


def test_a_damaged_artifact_is_caught_before_it_is_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lilliput.pipeline.run import Tensors

    put = Tensors.quantized

    def swapped(self: Tensors, name: str, value: object, weight: object) -> None:
        codes = value.codes.clone()  # type: ignore[attr-defined]
        if name == "layers.1.mlp.up_proj":
            codes[[0, 1]] = codes[[1, 0]]
        put(self, name, replace(value, codes=codes), weight)  # type: ignore[type-var,arg-type]

    monkeypatch.setattr(Tensors, "quantized", swapped)
    with pytest.raises(RuntimeError, match=r"logits differ from the intended ones"):
        compress(llama, tmp_path / "out", gate=False)
    assert not (tmp_path / "out").exists()


def test_what_stays_in_float_is_stored_as_it_was(llama: Path, tmp_path: Path) -> None:
    recipe = [{"rtn": {"bits": [4], "embeddings": False, "head": False, "exclude": ["layers.0.*"], "group_size": 32}}]
    compress(llama, tmp_path / "out", recipe=recipe, gate=False)
    artifact, checkpoint = Artifact.open(tmp_path / "out"), Checkpoint.open(llama)
    assert all(name.startswith("layers.1.") for name in artifact.manifest.entries)
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.0.mlp.down_proj.weight", "final_norm.weight"):
        assert np.array_equal(artifact.tensor(name).data, checkpoint.read(name).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_pass_through_float_parts_bit_for_bit(
    dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    weights = {k: v.to(dtype) for k, v in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    recipe = [{"rtn": {"bits": [8], "group_size": 32, "embeddings": False, "head": False}}]
    compress(llama, tmp_path / "out", recipe=recipe, gate=False)
    stored = Artifact.open(tmp_path / "out").tensor("embed_tokens.weight")
    assert stored.dtype == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert stored.data.tobytes() == weights["model.embed_tokens.weight"].view(torch.int16).numpy().tobytes()


def test_pruning_alone_gives_a_float_artifact_with_the_zeros(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = [{"wanda": {"sparsity": 0.5}}]
    report = compress(llama, tmp_path / "out", **(wanda(text) | {"recipe": recipe}))  # type: ignore[arg-type]
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.bits == ()
    assert (artifact.tensor("layers.1.mlp.up_proj.weight").data == 0).mean() == 0.5
    assert report.rows[0].bits == 32
    assert len(Engine(tmp_path / "out").generate("the", max_new_tokens=4).tokens) == 4


class Doubles(ModelMethod):
    """Scales a weight by a power of two: a change that can be followed bit for bit."""

    def apply(self, model: Decoder, batches: object) -> Decoder:
        assert sum(len(b) for b in batches) == 6  # type: ignore[attr-defined]
        with torch.no_grad():
            model.blocks[0].mlp.up_proj.weight.mul_(2)  # type: ignore[union-attr,operator]
        return model


@pytest.fixture
def doubles() -> Iterator[None]:
    from lilliput.methods import METHODS

    sys.modules["doubles_for_test"] = sys.modules[__name__]
    METHODS["doubles"] = "doubles_for_test:Doubles"
    yield
    del METHODS["doubles"]


@pytest.mark.usefixtures("doubles")
def test_stages_run_in_order_whole_model_and_layer_methods_mixed(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = [{"wanda": {"sparsity": 0.25}}, {"doubles": {}}, {"rtn": {"bits": [8], "group_size": 32}}]
    report = compress(llama, tmp_path / "out", **(wanda(text) | {"recipe": recipe}))  # type: ignore[arg-type]
    name = "layers.0.mlp.up_proj"
    made = torch.from_numpy(Artifact.open(tmp_path / "out").dequantize(name, 8))
    original = Checkpoint.open(llama).read(f"{name}.weight")
    alive = made.abs() > 0.05
    assert 0.6 < alive.float().mean() < 0.8
    assert torch.allclose(made[alive], 2 * original[alive], atol=0.05)
    assert report.rows[0].kl is not None
    assert report.rows[0].kl > 0.01  # measured against the checkpoint, not against what the stages made of it


def test_a_rotated_model_is_planned_resumed_and_told_of(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, "opt", 0, tie_word_embeddings=True)  # becomes rms, untied, with a bias at the head
    recipe = [{"rtn": {"bits": [4, 8], "exclude": ["layers.*.mlp.*"]}}]
    turned = [{"hadamard": {}}, *recipe]
    planned = compress(model, tmp_path / "whole", recipe=turned, dry_run=True)
    made = compress(model, tmp_path / "whole", recipe=turned, gate=False)
    assert [r.size_bytes for r in planned.rows] == [r.size_bytes for r in made.rows]
    plain = compress(model, tmp_path / "plain", recipe=recipe, dry_run=True)
    assert made.size_bytes > plain.size_bytes  # by the head
    artifact = Artifact.open(tmp_path / "whole")
    assert {"lm_head", "embed_tokens"} <= artifact.manifest.entries.keys()
    assert "lm_head.bias" in artifact.manifest.floats
    assert artifact.manifest.spec.norm.kind == "rms"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(Dies.Now):
        compress(model, tmp_path / "out", recipe=turned, gate=False, progress=Dies(2))
    assert compress(model, tmp_path / "out", recipe=turned, gate=False).resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.usefixtures("doubles")
def test_layers_are_treated_between_a_rotation_and_the_end(tmp_path: Path, text: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, "qwen2", 0)
    recipe = [{"hadamard": {}}, {"wanda": {"sparsity": 0.5, "head": True}}, {"doubles": {}}]
    recipe.append({"rtn": {"bits": [8], "group_size": 32}})
    compress(model, tmp_path / "out", **(wanda(text) | {"recipe": recipe}))  # type: ignore[arg-type]
    head = Artifact.open(tmp_path / "out").dequantize("lm_head", 8)
    assert 0.45 < (np.abs(head) < 0.02 * np.abs(head).max()).mean() < 0.75  # pruned, although the model had none


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (GPTQ, {"bits": [2, 4], "shared": True}),
        (LeanQuant, {"bits": [2, 4], "nonuniform": True, "exponents": [2.0], "damps": [], "starts": ["tree"]}),
        (AnyPrecision, {"bits": [2, 4]}),
    ],
    ids=["gptq", "leanquant", "any_precision"],
)
def test_layers_that_a_method_makes_worse_are_rounded_and_the_manifest_says_so(
    method: Any, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = method.solve

    def careless(self: Any, weight: torch.Tensor, stat: torch.Tensor | None) -> Quantized:
        made: Quantized = solve(self, weight, stat)
        return replace(made, codes=torch.zeros_like(made.codes))

    monkeypatch.setattr(method, "solve", careless)
    recipe = [{method(bits=(4,)).name: {**options, "group_size": 32, "embeddings": False}}]
    compress(llama, tmp_path / "out", **(wanda(text) | {"recipe": recipe}))  # type: ignore[arg-type]
    assert verify(tmp_path / "out").ok
    records = Artifact.open(tmp_path / "out").manifest.layers
    assert {"lm_head", "layers.1.mlp.down_proj"} <= {r.name for r in records}
    for record in records:
        assert "was worse than rounding to nearest" in record.note
        assert 0 < record.error[4] < record.error[2] < 1


def test_on_a_trained_model_methods_that_look_at_inputs_beat_rounding(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": [3], "group_size": 64, "ragged": True, "embeddings": False, "head": False}
    options["exclude"] = ["layers.[1-6].*"]  # two of eight blocks tell the same in a quarter of the time
    draw: dict[str, Any] = {"calibration": [TALES / "calibration.txt"], "samples": 16, "length": 128, "gate": False}
    lost = {}
    for name, own in (
        ("rtn", {}),
        ("gptq", {"rounds": 1}),
        ("leanquant", {"rounds": 1, "exponents": [2.0], "damps": []}),
    ):
        recipe = [{name: options | own}]
        report = compress(TALES, tmp_path / name, recipe=recipe, **(draw if own else {"gate": False}))
        lost[name] = report.rows[0].kl or 0.0
    assert 0 < lost["gptq"] < 0.7 * lost["rtn"]
    assert 0 < lost["leanquant"] < 0.7 * lost["rtn"]


class Liar(Doubles):
    """Says it unties the head, and does not."""

    def respec(self, spec, tensors):  # type: ignore[no-untyped-def]
        told = spec.model_copy(update={"tied_head": False})
        return told, {**tensors, "lm_head.weight": tensors["embed_tokens.weight"]}


def test_a_method_that_makes_another_model_than_it_said_is_named(
    text: Path, tmp_path: Path, doubles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model", "qwen2", 0)
    monkeypatch.setattr(sys.modules["doubles_for_test"], "Doubles", Liar)
    recipe = [{"doubles": {}}, {"rtn": {"bits": [8], "group_size": 32}}]
    with pytest.raises(ValueError, match=r": it made another kind of model than it announced\. Correct its respec\.$"):
        compress(tmp_path / "model", tmp_path / "out", **(wanda(text) | {"recipe": recipe}))  # type: ignore[arg-type]


def test_a_dry_run_tells_sizes_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    planned = compress(llama, tmp_path / "out", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]
    made = compress(llama, tmp_path / "out", gate=False)
    assert [r.size_bytes for r in planned.rows] == [r.size_bytes for r in made.rows]
    files = [p for p in (tmp_path / "out").iterdir() if p.suffix == ".safetensors"]
    assert planned.size_bytes == sum(p.stat().st_size for p in files)


def test_too_little_memory_is_said_before_any_work(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"memory: one block at a time needs about .* GiB, more than --max-ram") as e:
        compress(llama, tmp_path / "out", max_ram=1 << 20)
    assert e.value.exit_code == 5  # type: ignore[attr-defined]


def test_a_full_disk_is_said_and_leaves_no_artifact(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RuntimeError, match=r"bytes are needed and 1,000 are free\. Free some space") as caught:
        compress(llama, tmp_path / "out", gate=False)
    assert caught.value.exit_code == 5  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(bad: float, llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity") as caught:
        compress(llama, tmp_path / "out")
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()


def test_calibration_text_that_is_missing_empty_or_short_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has a method that learns from text, and none is given\. Give --calib"):
        compress(llama, tmp_path / "out", recipe="wanda-nested")
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Too short.")
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        compress(llama, tmp_path / "out", recipe="wanda-nested", calibration=[empty])
    with pytest.raises(ValueError, match=r"calibration text: \d+ tokens are fewer than the 128 x 256 asked for"):
        compress(llama, tmp_path / "out", recipe="wanda-nested", calibration=[short])


def test_quantizing_twice_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens: rtn is followed by rtn\. Quantize last"):
        compress(llama, tmp_path / "out", recipe=[{"rtn": {}}, {"rtn": {}}])


def test_end_widths_that_no_width_uses_are_not_stored(llama: Path, tmp_path: Path) -> None:
    compress(llama, tmp_path / "out", bits=[2, 3], gate=False)
    entries = Artifact.open(tmp_path / "out").manifest.entries
    assert entries["embed_tokens"].bits == (4,)
    assert entries["layers.0.attn.q_proj"].bits == (2, 3)
