"""The parts of the comparison that need no peer: order, ratios, table, models, the worker's protocol."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.engine import Engine

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
WRITERS = ("onnx_random", "openvino_random")
RUNNERS = ("run_lilliput", "run_onnxruntime", "run_openvino")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/peers as the programs there do; forgotten again after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    before = set(sys.modules)

    def one(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield one
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("peers", "job", "weights", "gguf_random", *RUNNERS, *WRITERS):
            del sys.modules[name]


def record(contender: str, turn: int, decode: float, *, disturbed: bool = False, **more: Any) -> dict[str, Any]:
    fields = {"contender": contender, "round": turn, "decode_tokens_per_s": decode, "prefill_tokens_per_s": 10 * decode}
    fields |= {"first_token_s": 0.5, "load_s": 0.1, "cold_first_token_s": 0.9, "peak_rss_bytes": 3 << 20}
    fields |= {"anonymous_bytes": 1 << 20, "weight_bytes_per_token": 1_000_000, "bandwidth_bytes_per_s": 1e8}
    fields |= {"shape": "110m", "threads": 2, "bandwidth_control": "reads", "disturbed": disturbed}
    return fields | more


def test_ratios_are_of_one_round_before_they_are_medians(load: Any) -> None:
    table = load("peers.table")
    ours = [record("lilliput 4", n, v) for n, v in enumerate([10.0, 100.0, 30.0, 7.0])]
    theirs = [record("llama.cpp q4_0", n, v) for n, v in enumerate([10.0, 50.0, 10.0])]
    (row,) = table.ratios(ours + theirs, "decode_tokens_per_s")
    assert row["pair"] == "lilliput 4 / llama.cpp q4_0"
    assert (row["median"], row["least"], row["largest"]) == (2.0, 1.0, 3.0)
    assert (row["over"], row["marked"]) == ("all 3 undisturbed", False)


def test_a_figure_is_told_over_undisturbed_rounds_and_over_all_and_marked_where_too_few_are_quiet(load: Any) -> None:
    table = load("peers.table")
    noisy = [record("lilliput 4", n, v, disturbed=n == 3) for n, v in enumerate([10.0, 11.0, 12.0, 90.0])]
    told = [(r["over"], r["decode_tokens_per_s"], r["marked"]) for r in table.rows(noisy)]
    assert told == [("3 undisturbed", 11.0, False), ("all 4", 11.5, False)]
    told = [(r["over"], r["decode_tokens_per_s"], r["marked"]) for r in table.rows(noisy[1:])]
    assert told == [("2 undisturbed", 11.5, True), ("all 3", 12.0, True)]
    (row,) = table.rows(noisy[3:])
    assert (row["over"], row["marked"]) == ("all 1 disturbed", True)
    mixed = noisy + [record("llama.cpp q4_0", n, 5.0, disturbed=n == 0) for n in range(4)]
    told = [(r["over"], r["median"], r["marked"]) for r in table.ratios(mixed, "decode_tokens_per_s")]
    assert told == [("2 undisturbed", 2.3, True), ("all 4", 2.3, True)]  # a pair is quiet when both are


def test_share_of_bandwidth_is_what_decoding_read_over_what_plain_reads_reached(load: Any) -> None:
    table = load("peers.table")
    assert table.share_of_bandwidth(record("lilliput 2", 0, 50.0)) == pytest.approx(0.5)
    assert table.share_of_bandwidth(record("lilliput 2", 0, 50.0, weight_bytes_per_token=None)) is None


def test_the_report_shows_every_contender_ratio_mark_and_absence(load: Any) -> None:
    table = load("peers.table")
    records = [record(c, n, v) for n in range(3) for c, v in (("lilliput 4", 20.0), ("llama.cpp q4_0", 10.0))]
    text = table.text([*records, record("lilliput 2", 0, 80.0, disturbed=True)], {"openvino": "does not install here"})
    assert "## 110m, 2 threads" in text
    assert "| lilliput 4 | all 3 undisturbed | 20 | 200 | 0.5 | 0.1 | 3 (1) | 1 | 20% |" in text
    ratio = "2.00 (2.00 to 2.00)"
    assert f"| lilliput 4 / llama.cpp q4_0 | all 3 undisturbed | {ratio} | {ratio} |" in text
    assert "| lilliput 2 | all 1 disturbed~ | 80 |" in text
    assert "not to be quoted" in text
    assert "Not run: openvino: does not install here" in text
    assert table.text([], {"x": "y"}) == "Not run: x: y"


def test_what_is_compared_runs_side_by_side_and_take_turns_in_going_first(load: Any) -> None:
    turn = load("peers.turns").turn
    kinds = ("lilliput 8", "lilliput 4", "lilliput 2", "llama.cpp q4_0", "llama.cpp q8_0", "onnxruntime int4", "other")
    orders = [[c["contender"] for c in turn([{"contender": k} for k in kinds], n)] for n in range(-1, 4)]
    for order in orders:
        assert sorted(order) == sorted(kinds)
        places = sorted(order.index(k) for k in ("lilliput 4", "llama.cpp q4_0", "onnxruntime int4"))
        assert places[2] - places[0] == 2
        assert abs(order.index("lilliput 8") - order.index("llama.cpp q8_0")) == 1
    assert {o.index("lilliput 4") < o.index("llama.cpp q4_0") for o in orders} == {True, False}
    assert len({o[0] for o in orders}) > 2
    assert turn([], 1) == []


def test_shapes_are_those_of_the_checkpoint_writer_and_8b_asks_first(load: Any) -> None:
    models = load("peers.models")
    text = (FOLDER / "make_llama.py").read_text()
    for name in ("110m", "1.1b", "3b", "8b"):
        assert f'"{name}": {json.dumps(models.SHAPES[name])}' in text
    big = models.SHAPES["8b"]
    four = ["q4_0", "onnxruntime int4", "openvino int4"]
    assert models.reason_not_to(big, four, (2, 3, 4), 30 << 30, 20 << 30) is None
    assert "of disk" in models.reason_not_to(big, [*four, "q2_k"], (2, 3, 4), 30 << 30, None)  # a source of 8 bits
    assert "of memory" in models.reason_not_to(big, four, (2, 3, 4), None, 8 << 30)


@pytest.mark.parametrize("sym", [False, True])
def test_the_random_artifact_is_whole_runs_and_never_ends_its_text(load: Any, tmp_path: Path, sym: bool) -> None:
    models = load("peers.models")
    manifest = models.write_artifact(tmp_path / "a.lilliput", models.SHAPES["tiny"], sym=sym)
    assert verify(tmp_path / "a.lilliput").ok
    assert manifest.entries["lm_head"].bits == (4, 8)
    assert manifest.entries["layers.0.attn.q_proj"].bits == (2, 3, 4, 8)
    with Artifact.open(tmp_path / "a.lilliput") as artifact:
        weight = artifact.dequantize("layers.1.mlp.down_proj", 8)
    assert np.abs(weight.std() * weight.shape[1] ** 0.5 - 1) < 0.05
    engine = Engine(tmp_path / "a.lilliput", threads=1)
    prompt = load("peers.job").prompt(9, 1024, 1)
    assert prompt[0] == 1
    assert len(set(prompt)) == 9
    for bits in (2, 8):
        assert len(engine.generate(prompt, max_new_tokens=12, bits=bits).tokens) == 12


def test_a_worker_times_after_a_warm_up_and_repeats_what_is_short(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("peers.job")
    asked = {"path": "x", "threads": 1, "vocab": 1000, "prefill_tokens": 40, "prompt_tokens": 10, "new_tokens": 5}
    calls: list[str] = []

    class Fake(job.Runner):  # type: ignore[misc, name-defined]
        def __init__(self, given: dict[str, Any]) -> None:
            assert given["context"] == 48

        def prefill(self, tokens: list[int]) -> float:
            calls.append("prefill")
            assert len(tokens) == 40
            return 0.4

        def decode(self, tokens: list[int], count: int) -> tuple[float, float, int]:
            calls.append("decode")
            assert len(tokens) == 10
            return 0.25, 0.5, count - 1

        def facts(self) -> dict[str, Any]:
            return {"weight_bytes_per_token": 7}

    found = job.measure(asked, Fake)
    assert calls == ["decode", "prefill", "prefill", "prefill", "decode", "decode"]
    assert found["prefill_tokens_per_s"] == pytest.approx(100)
    assert found["decode_tokens_per_s"] == pytest.approx(8)
    assert (found["first_token_s"], found["weight_bytes_per_token"]) == (0.25, 7)
    assert found["cold_first_token_s"] == pytest.approx(found["load_s"] + 0.25)
    assert found["peak_rss_bytes"] is None or found["peak_rss_bytes"] > found["anonymous_bytes"] > 0


def test_an_engine_that_gives_logits_is_led_greedily_from_a_fresh_sequence(load: Any) -> None:
    calls: list[list[int] | None] = []

    class Next(load("peers.job").Stepped):  # type: ignore[misc]
        """Says that what follows a token is the token after it."""

        def read(self, tokens: list[int]) -> Any:
            calls.append(list(tokens))
            return np.eye(10)[tokens[-1] + 1]

        def clear(self) -> None:
            calls.append(None)

    first, others, count = Next().decode([1, 5], 4)
    assert calls == [None, [1, 5], [6], [7], [8]]
    assert (first > 0, others > 0, count) == (True, True, 3)
    calls.clear()
    assert Next().prefill([3, 4]) > 0
    assert calls == [None, [3, 4]]


def test_memory_is_unknown_where_the_system_does_not_tell(load: Any, tmp_path: Path) -> None:
    job = load("peers.job")
    assert job.memory(str(tmp_path / "none")) == {"peak_rss_bytes": None, "anonymous_bytes": None}
    (tmp_path / "status").write_text("VmHWM:\t    12 kB\nRssAnon:\t 5 kB\n")
    assert job.memory(str(tmp_path / "status")) == {"peak_rss_bytes": 12288, "anonymous_bytes": 5120}


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_gguf_has_the_shape_and_its_bytes_are_counted(load: Any, tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the peers' environment")
    gguf_random, shape = load("peers.gguf_random"), load("peers.models").SHAPES["tiny"]
    gguf_random.write(tmp_path / "x.gguf", shape, kind)
    facts = gguf_random.facts(tmp_path / "x.gguf")
    head = shape["vocab"] * shape["hidden"]
    blocks = load("peers.models").parameters(shape) - 2 * head
    each, end = {"f16": (2.0, 2.0), "q8_0": (34 / 32, 34 / 32), "q4_0": (18 / 32, 210 / 256)}[kind]
    norms = 4 * shape["hidden"] * (2 * shape["layers"] + 1)
    assert facts["weight_bytes_per_token"] == blocks * each + head * end + norms
    assert facts["head"] == ("Q6_K" if kind == "q4_0" else kind.upper())
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name in ("blk.1.ffn_down.weight", "output.weight"):
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.std() * values.shape[1] ** 0.5 == pytest.approx(1, rel=0.08)


def test_the_direct_gguf_has_the_types_of_the_quantizer(load: Any, tmp_path: Path) -> None:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason=f"the {package} package is in the peers' environment")
    gguf_random, shape = load("peers.gguf_random"), load("peers.models").SHAPES["tiny"]
    gguf_random.write(tmp_path / "f16.gguf", shape, "f16")
    gguf_random.convert(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", "q4_0", 1)
    gguf_random.write(tmp_path / "ours.gguf", shape, "q4_0")
    ours, theirs = (gguf_random.facts(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert ours == theirs


def reference(weights: ModuleType, shape: dict[str, int], get: Callable[..., Any], tokens: list[int]) -> Any:
    """(length, vocab) float64 logits of a Llama whose matrices are get(name, size): the equations, nothing else."""
    w = {name: get(name, size).values().astype(np.float64) for name, size in weights.matrices(shape)}
    hidden, heads, kv, length = shape["hidden"], shape["heads"], shape["kv"], len(tokens)
    dim = hidden // heads
    cos, sin = (part[:, None] for part in weights.rotation(shape, length))

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + weights.EPS) * weights.gains(shape, name)

    def split(x: Any, count: int, *, turn: bool) -> Any:
        x = x.reshape(length, count, dim)
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        x = np.concatenate(turned, axis=-1) if turn else x
        return np.repeat(x, heads // count, axis=1)

    x = w["embed"][tokens]
    for layer in range(shape["layers"]):
        at = f"layers.{layer}"
        parts = np.split(norm(x, f"{at}.attn_norm") @ w[f"{at}.qkv"].T, [hidden, hidden + kv * dim], axis=-1)
        q, k, v = (split(p, n, turn=t) for p, n, t in zip(parts, (heads, kv, kv), (True, True, False), strict=True))
        scores = np.einsum("thd,shd->hts", q, k) * dim**-0.5
        scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf) - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(length, hidden)
        x = x + mixed @ w[f"{at}.o"].T
        y = norm(x, f"{at}.mlp_norm")
        gate, up = y @ w[f"{at}.gate"].T, y @ w[f"{at}.up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.down"].T
    return norm(x, "final_norm") @ w["head"].T


@pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_what_is_timed_of_a_peer_is_a_llama(load: Any, tmp_path: Path, peer: str, bits: int) -> None:
    for package in {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}[peer]:
        pytest.importorskip(package, reason=f"the {package} package is in the peers' environment")
    weights, shape = load("weights"), load("peers.models").SHAPES["tiny"]
    tokens, job = load("job").prompt(24, shape["vocab"], 3), {"threads": 1, "context": 64}
    if peer == "onnxruntime":
        writer, runner, path = load("onnx_random"), load("run_onnxruntime").OnnxRuntime, tmp_path / "x.onnx"
        facts = writer.write(path, shape, bits, 128)
        get = lambda name, size: weights.blocks(name, *size, bits, writer.GROUP)  # noqa: E731
    else:
        writer, runner, path = load("openvino_random"), load("run_openvino").OpenVino, tmp_path / "x.xml"
        facts = writer.write(path, shape, bits)
        get = lambda name, size: writer.matrix(name, size, bits)  # noqa: E731
    matrices = load("peers.models").parameters(shape) - shape["vocab"] * shape["hidden"]
    assert bits / 8 < facts["weight_bytes_per_token"] / matrices < (bits + 4) / 8
    want, engine = reference(weights, shape, get, tokens), runner(job | {"path": str(path)})

    def off(got: Any, place: int) -> float:
        return float(np.linalg.norm(got - want[place]) / np.linalg.norm(want[place]))

    assert off(engine.read(tokens[:20]), 19) < 0.04  # activations of 8 bits, keys and values too
    for place in range(20, 24):
        assert off(engine.read([tokens[place]]), place) < 0.04
    engine.clear()
    assert off(engine.read(tokens[:5]), 4) < 0.04
    first, others, count = engine.decode(tokens, 4)
    assert (first > 0, others > 0, count) == (True, True, 3)
