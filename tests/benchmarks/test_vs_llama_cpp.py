"""The parts of the comparison that need no peer: order, ratios, table, models, the worker's protocol."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.engine import Engine

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


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
        if name.split(".")[0] in ("peers", "job", "gguf_random", "run_lilliput"):
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
    assert (row["median"], row["least"], row["largest"], row["rounds"]) == (2.0, 1.0, 3.0, 3)
    assert not row["marked"]


def test_disturbed_rounds_count_only_where_others_are_too_few_and_are_marked_then(load: Any) -> None:
    table = load("peers.table")
    noisy = [record("lilliput 4", n, v, disturbed=n == 3) for n, v in enumerate([10.0, 11.0, 12.0, 90.0])]
    (row,) = table.rows(noisy)
    assert (row["decode_tokens_per_s"], row["used"], row["rounds"], row["marked"]) == (11.0, 3, 4, False)
    (row,) = table.rows(noisy[1:])
    assert (row["decode_tokens_per_s"], row["used"], row["rounds"], row["marked"]) == (12.0, 3, 3, True)
    mixed = noisy + [record("llama.cpp q4_0", n, 5.0, disturbed=n == 0) for n in range(4)]
    (pair,) = table.ratios(mixed, "decode_tokens_per_s")
    assert (pair["used"], pair["rounds"], pair["marked"]) == (4, 4, True)  # two clean pairs are not enough


def test_share_of_bandwidth_is_what_decoding_read_over_what_plain_reads_reached(load: Any) -> None:
    table = load("peers.table")
    assert table.share_of_bandwidth(record("lilliput 2", 0, 50.0)) == pytest.approx(0.5)
    assert table.share_of_bandwidth(record("lilliput 2", 0, 50.0, weight_bytes_per_token=None)) is None


def test_the_report_shows_every_contender_ratio_mark_and_absence(load: Any) -> None:
    table = load("peers.table")
    records = [record(c, n, v) for n in range(3) for c, v in (("lilliput 4", 20.0), ("llama.cpp q4_0", 10.0))]
    text = table.text([*records, record("lilliput 2", 0, 80.0, disturbed=True)], {"openvino": "does not install here"})
    assert "## 110m, 2 threads" in text
    assert "| lilliput 4 (3/3) | 20 | 200 | 0.5 | 0.1 | 3 (1) | 1 | 20% |" in text
    assert "| lilliput 4 / llama.cpp q4_0 | 2.00 (2.00 to 2.00, 3 rounds) | 2.00 (2.00 to 2.00, 3 rounds) |" in text
    assert "| lilliput 2~ (1/1) | 80 |" in text
    assert "disturbed ones too" in text
    assert "Not run: openvino: does not install here" in text
    assert table.text([], {"x": "y"}) == "Not run: x: y"


def test_pairs_run_side_by_side_and_take_turns_in_going_first(load: Any) -> None:
    turn = load("peers.turns").turn
    kinds = ("lilliput 8", "lilliput 4", "lilliput 2", "llama.cpp q4_0", "llama.cpp q8_0", "onnxruntime int4")
    orders = [[c["contender"] for c in turn([{"contender": k} for k in kinds], n)] for n in range(-1, 4)]
    for order in orders:
        assert sorted(order) == sorted(kinds)
        assert abs(order.index("lilliput 4") - order.index("llama.cpp q4_0")) == 1
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
    assert models.reason_not_to(big, ["q4_0"], 200 << 30, 64 << 30) is None
    assert "of disk" in models.reason_not_to(big, ["q4_0"], 10 << 30, None)
    assert "of memory" in models.reason_not_to(big, ["q4_0"], None, 8 << 30)


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


def test_memory_is_unknown_where_the_system_does_not_tell(load: Any, tmp_path: Path) -> None:
    job = load("peers.job")
    assert job.memory(str(tmp_path / "none")) == {"peak_rss_bytes": None, "anonymous_bytes": None}
    (tmp_path / "status").write_text("VmHWM:\t    12 kB\nRssAnon:\t 5 kB\n")
    assert job.memory(str(tmp_path / "status")) == {"peak_rss_bytes": 12288, "anonymous_bytes": 5120}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_gguf_has_the_shape_and_its_bytes_are_counted(load: Any, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf", reason="the gguf package is in the peers' environment")
    gguf_random, shape = load("peers.gguf_random"), load("peers.models").SHAPES["tiny"]
    gguf_random.write(tmp_path / "x.gguf", shape, kind)
    facts = gguf_random.facts(tmp_path / "x.gguf")
    matrices = load("peers.models").parameters(shape) - shape["vocab"] * shape["hidden"]
    each = {"f16": 2.0, "q8_0": 34 / 32}[kind]
    assert facts["weight_bytes_per_token"] == matrices * each + 4 * shape["hidden"] * (2 * shape["layers"] + 1)
    assert facts["head"] == kind.upper()
