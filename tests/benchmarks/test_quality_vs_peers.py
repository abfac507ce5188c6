"""The parts of the comparison of quality that need no peer: the model they share, bytes, figures, table, plot."""

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lilliput.artifact.read import Artifact
from lilliput.data.streams import Batches
from lilliput.measure.reference import open_original
from lilliput.models import Checkpoint, load_decoder
from lilliput.pipeline import compress
from support.families import write_checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HERE = FOLDER / "peers" / "quality"
TEXT = "the sun and the moon, and the stars over the hill and the sea. " * 200
ROW = np.arange(40, dtype=np.int32)
NAMES = ("harness", "names", "peers", "quality_vs_peers", "run_lilliput", "worker")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module as the programs in benchmarks do; forgotten again after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in NAMES:
            del sys.modules[name]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama whose feed-forward of 96 is no multiple of 256."""
    write_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    return tmp_path / "source"


def line(contender: str, bits: int, kl: float, seed: int | None = 0, **more: Any) -> dict[str, Any]:
    fields = {"contender": contender, "bits": bits, "seed": seed, "kl": kl, "linear_bits": bits + 0.5}
    fields |= {"model_bits": bits + 1.5, "perplexity": 20.0, "top1_agreement": 0.9, "cpu_seconds": 30.0}
    return fields | {"peak_rss_bytes": 1 << 20, "original_perplexity": 19.5} | more


def test_the_widened_model_is_the_same_function(load: Any, source: Path, tmp_path: Path) -> None:
    model = load("peers.quality.model")
    wide = model.prepare(source, tmp_path / "wide")
    weights = load_file(wide / "model.safetensors")
    assert weights["model.layers.1.mlp.gate_proj.weight"].shape == (256, 64)
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (64, 256)
    before, after = (open_original(folder).logits(ROW) for folder in (source, wide))
    # the zeros change nothing but the order of the sums of 96 products
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_what_is_no_llama_in_one_file_is_refused(load: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "qwen", "qwen2")
    with pytest.raises(SystemExit, match="a Llama in one model"):
        load("peers.quality.model").prepare(tmp_path / "qwen", tmp_path / "wide")


def test_names_cover_a_llama_and_a_gguf(load: Any, source: Path) -> None:
    names = load("peers.quality.names")
    stored = set(load_file(source / "model.safetensors"))
    assert {names.hf_of_ours(name) for name in Checkpoint.open(source).names()} == stored
    ggufs = {names.gguf_of_hf(name) for name in stored}
    assert len(ggufs) == len(stored)
    assert {"blk.1.ffn_down.weight", "blk.0.attn_output.weight", "blk.0.ffn_norm.weight", "token_embd.weight"} <= ggufs
    assert names.hf_of_ours("layers.11.attn.q_proj.plane.0") == "model.layers.11.self_attn.q_proj.plane.0"


def test_every_byte_of_a_matrix_counts(load: Any) -> None:
    bits_per_weight = load("peers.quality.accounting").bits_per_weight
    name = "model.layers.0.mlp.up_proj"
    weights = {f"{name}.weight": 1000, "model.embed_tokens.weight": 500, "model.layers.0.input_layernorm.weight": 10}
    stored = {f"{name}.qweight": 500, f"{name}.scales": 30, f"{name}.g_idx": 20, "model.embed_tokens.weight": 1000}
    stored |= {"model.layers.0.input_layernorm.weight": 20, "lm_head.weight": 1000}
    found = bits_per_weight(stored, weights)
    assert found.linears == 8 * 550 / 1000
    assert found.model == 8 * 2570 / 1510  # a head stored twice is stored twice


def test_a_matrix_without_bytes_is_an_error(load: Any) -> None:
    bits_per_weight = load("peers.quality.accounting").bits_per_weight
    weights = {f"model.layers.{n}.mlp.up_proj.weight": 10 for n in (1, 11)}
    with pytest.raises(ValueError, match=r"nothing is stored for model\.layers\.1\.mlp\.up_proj"):
        bits_per_weight({"model.layers.11.mlp.up_proj.weight": 20}, weights)


def test_an_artifact_is_charged_for_every_byte_of_the_files_it_opens(load: Any, source: Path, tmp_path: Path) -> None:
    worker, accounting = load("run_lilliput"), load("peers.quality.accounting")
    out = tmp_path / "a.lilliput"
    compress(source, out, recipe=[{"rtn": {"bits": [2, 4], "group_size": 32, "embeddings": False}}], gate=False)
    weights = {name: value.numel() for name, value in load_file(source / "model.safetensors").items()}
    with Artifact.open(out) as artifact:
        for bits in (2, 4):
            sizes = worker.stored(artifact, bits)
            assert sum(sizes.values()) == sum(
                max(slot.end for slot in artifact.plan.files[file].slots.values())
                for file in artifact.plan.files_at(bits)
            )
            found = accounting.bits_per_weight(sizes, weights)
            assert artifact.plan.bits_per_weight(bits) < found.linears  # alignment, and at 4 the scales of 2 bits
            assert found.model > found.linears  # a float32 embedding


def test_a_recipe_is_filled_in(load: Any) -> None:
    filled = load("run_lilliput").filled
    recipe = [{"rtn": {"bits": ["$bits"], "group_size": "$group_size", "exclude": ["layers.0.*"]}}]
    assert filled(recipe, {"bits": 3, "group_size": 64}) == [
        {"rtn": {"bits": [3], "group_size": 64, "exclude": ["layers.0.*"]}}
    ]


def test_every_recipe_of_ours_can_be_planned(load: Any, source: Path, tmp_path: Path) -> None:
    contenders, filled = load("peers.quality.contenders"), load("run_lilliput").filled
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    wide = load("peers.quality.model").prepare(source, tmp_path / "wide")
    ours = {name: c for name, c in contenders.CONTENDERS.items() if c.peer == contenders.OURS}
    assert {f"lilliput {m}" for m in ("leanquant", "awq", "any_precision", "omniquant")} <= ours.keys()
    for contender in ours.values():
        for bits, width in contender.widths.items():
            recipe = filled(contender.options["recipe"], {"bits": bits, "group_size": 64, "steps": 3})
            target = {**contender.options, **width}.get("target_bits")
            if target:  # rows as short as these have more overhead
                target = [most + 0.5 for most in target] if isinstance(target, list) else target + 0.5
            report = compress(
                wide,
                tmp_path / "a.lilliput",
                recipe=recipe,
                calibration=[text],
                samples=4,
                length=16,
                target_bits=target,
                dry_run=True,
            )
            assert {layer.name for layer in report.layers if layer.method} >= {"layers.0.mlp.up_proj"}
            if isinstance(target, list):
                assert any("it will serve 2, 3, 4 bits" in warning for warning in report.warnings)
            elif not target:
                assert bits in {row.bits for row in report.rows}


@pytest.mark.parametrize("kind", ["own", "shared", "mixed"])
def test_our_worker_answers_as_the_peers_do(
    load: Any,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    worker, ours = load("worker"), load("run_lilliput")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    contenders, model = load("peers.quality.contenders"), load("peers.quality.model")
    wide = model.prepare(source, tmp_path / "wide")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    data = model.calibration(wide, text, length=16, samples=4, seed=3)
    contender = contenders.CONTENDERS["lilliput rtn" if kind == "own" else "lilliput rtn nested"]
    if kind == "mixed":
        stage = {"rtn": {"bits": [2, 3, 4, 5], **contenders.NESTED}}
        contender = contenders.ours(stage, shared=True, targets=[3.2, 5.3])
    assert contender.options["shared"] == (kind != "own")
    cut = model.held_out(wide, text, length=32, limit=5)
    original = model.Remembered(open_original(wide))
    divergences = []
    for bits in (4, 2):
        keep, out = tmp_path / (kind if contender.options["shared"] else f"own-{bits}"), tmp_path / f"out-{bits}"
        keep.mkdir(exist_ok=True)
        job = {
            "model": str(wide),
            "bits": bits,
            "group_size": 32,
            "seed": 3,
            "threads": torch.get_num_threads(),
            "keep": str(keep),
        }
        job |= {"out": str(out), "options": dict(contender.options)}
        job |= {"draw": {"text": str(text), "length": 16, "samples": 4, "sha256": data.sha256}}
        monkeypatch.setattr(sys, "argv", ["run_lilliput.py", json.dumps(job)])
        worker.main(ours.quantize, ours.dump, ("lilliput",))
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["seconds"] > 0
        assert record["cpu_seconds"] > 0
        assert record["peer_versions"]["torch"] == torch.__version__
        weights = load_file(out / "weights.safetensors")
        given = load_file(wide / "model.safetensors")
        assert weights.keys() == given.keys()
        assert torch.equal(weights["model.embed_tokens.weight"], given["model.embed_tokens.weight"])  # blocks only
        assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], given["model.layers.0.mlp.up_proj.weight"])
        row, alone = model.measure(model.assemble(wide, weights, out / "model"), original, cut)
        divergences.append(row.kl)
        assert np.mean(alone) == pytest.approx(row.kl, rel=1e-4)  # windows are of one length
    assert 0 < divergences[0] < divergences[1]


def test_the_same_weights_have_no_divergence_and_the_original_runs_once(
    load: Any, source: Path, tmp_path: Path
) -> None:
    model = load("peers.quality.model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    cut = model.held_out(source, text, length=32, limit=4)
    assert len(cut) == 4
    assert len(model.held_out(source, text, length=32, limit=None)) > 4
    runner = open_original(source)
    calls: list[int] = []
    counted = SimpleNamespace(logits=lambda tokens, *, bits=None: calls.append(len(tokens)) or runner.logits(tokens))
    original = model.Remembered(counted)
    given = load_file(source / "model.safetensors")
    folder = model.assemble(source, {k: v for k, v in given.items() if "mlp" in k}, tmp_path / "same")
    rows = [model.measure(folder, original, cut)[0] for _ in range(2)]
    assert len(calls) == len(cut)
    assert rows[0].kl == rows[1].kl == pytest.approx(0, abs=1e-12)
    assert rows[0].top1_agreement == 1
    assert rows[0].perplexity == pytest.approx(model.perplexity(original, cut))


def test_weights_that_do_not_fit_are_refused(load: Any, source: Path, tmp_path: Path) -> None:
    assemble = load("peers.quality.model").assemble
    with pytest.raises(ValueError, match="is not a tensor of the model"):
        assemble(source, {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is not finite"):
        assemble(source, {"model.norm.weight": torch.full((64,), torch.nan)}, tmp_path / "x")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    both = {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding}
    with pytest.raises(ValueError, match="differs from the embedding"):
        assemble(source, both, tmp_path / "x")


def test_importance_is_the_mean_of_squared_inputs(load: Any, source: Path) -> None:
    rows = np.random.default_rng(0).integers(3, 300, (3, 12), dtype=np.int32)
    found = load("peers.quality.model").importance(source, Batches(rows, batch_size=2))
    decoder = load_decoder(Checkpoint.open(source))
    with torch.inference_mode():
        inputs = decoder.blocks[0].attn_norm(decoder.embed(torch.from_numpy(rows.astype(np.int64))))
    expected = inputs.square().mean(dim=(0, 1)).numpy()
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj"], expected, rtol=1e-5)
    assert len(found) == 14
    assert found["model.layers.1.mlp.down_proj"].shape == (96,)


def test_seeds_are_for_what_learns(load: Any) -> None:
    program = load("quality_vs_peers")
    asked = SimpleNamespace(methods=["lilliput rtn", "llm-compressor gptq"], bits=[4, 2], seeds=[0, 1], steps=9)
    found = [(t.name, t.bits, t.seed) for t in program.tasks(asked)]
    assert found == [
        ("lilliput rtn", 4, None),
        ("lilliput rtn", 2, None),
        ("llm-compressor gptq", 4, 0),
        ("llm-compressor gptq", 2, 0),
        ("llm-compressor gptq", 4, 1),
        ("llm-compressor gptq", 2, 1),
    ]


def test_steps_are_in_the_options_that_are_run_and_recorded(load: Any) -> None:
    program = load("quality_vs_peers")
    asked = SimpleNamespace(methods=["lilliput tuned", "lilliput tuned nested"], bits=[2], seeds=[0], steps=9)
    for task in program.tasks(asked):
        assert task.options["recipe"][1] == {"tune": {"steps": 9, "written": True}}
        assert task.options["recipe"][0]["gptq"]["group_size"] == "$group_size"  # the worker fills these in


def test_only_finished_lines_of_the_same_setup_are_left_out(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("quality_vs_peers")
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    assert program.done("s") == []
    lines = [line("a", 4, 0.1, options={"x": 60}), line("b", 4, 0.1), line("d", 4, 0.1)]
    lines.append({"contender": "c", "bits": 4, "seed": 0, "error": "no"})
    text = [json.dumps(one | {"setup": "other" if one["contender"] == "b" else "s"}) for one in lines]
    (tmp_path / "quality_vs_peers.jsonl").write_text("\n".join(text) + "\n")
    finished = program.done("s")
    assert [one["contender"] for one in finished] == ["a", "d"]
    contender = SimpleNamespace(options={"x": "$steps"}, widths={})
    assert program.Task("a", contender, 4, 0, steps=60).gave(finished[0])
    assert not program.Task("a", contender, 4, 0, steps=61).gave(finished[0])
    assert not program.Task("a", contender, 4, 1, steps=60).gave(finished[0])
    assert program.Task("d", contender, 4, 0, steps=61).gave(finished[1])


def test_lines_of_what_a_contender_once_meant_are_no_longer_shown(load: Any) -> None:
    program = load("quality_vs_peers")
    task = program.Task("lilliput tuned", program.CONTENDERS["lilliput tuned"], 4, 0, steps=300)
    told = line("lilliput tuned", 4, 0.1, options=task.options)
    assert program.meant(told)
    assert program.meant(line("lilliput tuned", 4, 0.1))  # the oldest lines do not say
    before = [task.options["recipe"][0], {"tune": {"steps": 300}}]
    assert not program.meant(told | {"options": {**task.options, "recipe": before}})
    assert not program.meant(told | {"contender": "nobody"})


def test_rows_are_means_over_seeds_of_the_newest_lines(load: Any) -> None:
    report = load("peers.quality.report")
    lines = [line("a", 4, 9.0), line("a", 4, 0.1), line("a", 4, 0.3, seed=1), line("b", 4, 0.05, seed=None)]
    first, second = report.rows([*lines, {"contender": "c", "bits": 4, "seed": 0, "error": "no CPU"}])
    assert (first["contender"], second["contender"]) == ("b", "a")
    assert second["kl"] == pytest.approx(0.2)
    assert (second["least_kl"], second["largest_kl"], second["seeds"]) == (0.1, 0.3, 2)
    told = [line("a", 4, 0.1, options={"x": 1}), line("a", 4, 0.3, seed=1, options={"x": 2})]
    (row,) = report.rows(told)  # what was run otherwise is no other seed of the same
    assert (row["kl"], row["seeds"]) == (0.3, 1)


def test_the_table_shows_every_figure_and_every_failure(load: Any) -> None:
    lines = [line("a", 4, 0.1), line("a", 4, 0.3, seed=1), {"contender": "c", "bits": 2, "seed": 0, "error": "no CPU"}]
    text = load("peers.quality.report").table(lines)
    assert "float model: perplexity 19.500" in text
    assert "| 4 | a | 4.500 | 5.500 | 0.2000 | 0.1000 .. 0.3000 | 20.000 | 0.9000 | 0.50 | 1 |" in text
    assert "- c, 2 bits: `no CPU`" in text


def test_two_are_compared_window_by_window(load: Any) -> None:
    report = load("peers.quality.report")
    hard = np.linspace(0.01, 0.2, 20)  # windows differ twentyfold, the two nearly not
    half = 0.5 * hard * np.where(np.arange(20) % 2, 1.02, 0.98)
    told = [line("peer", 2, float(hard.mean()), kl_windows=hard.tolist(), kl_ci95=[0.05, 0.15])]
    told += [line("ours", 2, float(half.mean()), s, kl_windows=half.tolist()) for s in (0, 1)]
    told += [line("ours", 3, 0.01), line("peer", 3, 0.02), line("old", 2, 0.3)]
    rows = report.rows(told)
    (found,) = report.beside(rows, "peer")[2:]  # but for those that have no figures of single windows
    assert found.startswith("| 2 | ours |")
    ratio, low, high = map(float, re.findall(r"0\.\d{3}", found))
    assert ratio == pytest.approx(half.sum() / hard.sum(), abs=6e-4)
    assert low < ratio < high
    assert high - low < 0.02
    assert "| 0.1050 ± 0.0500 |" in report.table(told)


def test_the_plot_puts_less_divergence_lower_and_fewer_bits_further_left(load: Any, tmp_path: Path) -> None:
    report = load("peers.quality.report")
    lines = [
        line(name, bits, kl)
        for name, base in (("lilliput x", 1.0), ("peer y", 3.0))
        for bits, kl in ((4, base / 100), (2, base))
    ]
    report.plot(tmp_path / "q.svg", lines)
    root = ElementTree.parse(tmp_path / "q.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    dots = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{space}circle")]
    (x2, y2), (x4, y4), (_, their2), (_, their4) = dots
    assert x2 < x4
    assert their2 < y2 < y4  # SVG counts from the top
    assert their4 < y4
    assert y4 - y2 == pytest.approx(their4 - their2, abs=0.2)  # the same factor is the same height
    assert {"lilliput x", "peer y"} <= {t.text for t in root.iter(f"{space}text")}
    with pytest.raises(ValueError, match="no figures"):
        report.plot(tmp_path / "empty.svg", [{"contender": "c", "bits": 2, "seed": 0, "error": "x"}])


def test_the_last_error_of_a_log_is_the_line_that_says_why(load: Any) -> None:
    last_error = load("peers.quality.environments").last_error
    assert last_error("Traceback\n  File x\nValueError: no kernel for CPU\n\n") == "ValueError: no kernel for CPU"
    assert last_error("ERROR: no wheel\nnotice: a newer pip\n") == "ERROR: no wheel"
    assert last_error("it ended\n") == "it ended"
    assert last_error("") == "it says nothing"


def test_every_contender_has_a_worker_and_an_environment(load: Any) -> None:
    contenders, environments = load("peers.quality.contenders"), load("peers.quality.environments")
    for contender in contenders.CONTENDERS.values():
        assert (HERE / contender.worker).is_file()
        assert contender.peer == contenders.OURS or contender.peer in environments.REQUIREMENTS
        assert contender.peer == contenders.OURS or contender.peer in environments.MODULES
