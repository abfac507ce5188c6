"""Integer graphs from files: what is written comes back, and what a runner could not follow is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.container import Container
from lilliput.artifact.integer import (
    CONSTANTS_FILE,
    GRAPH_FILE,
    IntegerModel,
    parse_graph,
    read_constants,
    write_graph,
)
from lilliput.core.errors import InputCorrupt
from lilliput.core.graph import Graph
from support.integers import integer_model, some_tokens, tiny_decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> IntegerModel:
    decoder = tiny_decoder(tmp_path_factory.mktemp("gemma2"), "gemma2", num_hidden_layers=1)
    return integer_model(decoder, some_tokens(12))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> IntegerModel:
    decoder = tiny_decoder(tmp_path_factory.mktemp("opt"), "opt", num_hidden_layers=1)
    return integer_model(decoder, some_tokens(12))


def test_what_is_written_comes_back(model: IntegerModel, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over what is there
        write_graph(tmp_path, model.graph, model.constants)
    raw = (tmp_path / GRAPH_FILE).read_bytes()
    assert parse_graph(raw, "here") == model.graph
    found = read_constants(Container.open(tmp_path / CONSTANTS_FILE))
    assert found.keys() == model.constants.keys()
    for name, value in model.constants.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: raw.replace(b'"heads": 4', b'"heads": "4"', 1), "not in its canonical form"),
        (lambda raw: raw.replace(b'"op": "attend"', b'"op": "run"', 1), "does not match any of the expected tags"),
        (lambda raw: raw.replace(b'"scale": ', b'"scale": -', 1), "greater than 0"),
        (lambda raw: raw.replace(b'"scale": ', b'"scale": NaN, "x": ', 1), "NaN is not JSON"),
        (lambda raw: raw[:-2], "not strict JSON"),
        (lambda raw: raw.replace(b"{", b"{ ", 1), "not in its canonical form"),
        (lambda raw: b"[" * 100_000, "nested too deeply"),
    ],
)
def test_graphs_in_another_spelling_are_refused(
    change: Callable[[bytes], bytes], told: str, model: IntegerModel, tmp_path: Path
) -> None:
    write_graph(tmp_path, model.graph, model.constants)
    raw = (tmp_path / GRAPH_FILE).read_bytes()
    assert change(raw) != raw
    with pytest.raises(InputCorrupt, match=told):
        parse_graph(change(raw), "here")


def test_constants_of_floats_are_refused(model: IntegerModel, tmp_path: Path) -> None:
    write_graph(tmp_path, model.graph, model.constants)
    raw = (tmp_path / CONSTANTS_FILE).read_bytes()
    (tmp_path / CONSTANTS_FILE).write_bytes(raw.replace(b'"I32"', b'"F32"'))
    with pytest.raises(InputCorrupt, match="is F32, not whole numbers"):
        read_constants(Container.open(tmp_path / CONSTANTS_FILE))


def node(graph: dict[str, Any], op: str, y: str = "") -> dict[str, Any]:
    """The first node of that kind, or the one that writes y."""
    found: dict[str, Any] = next(n for n in graph["nodes"] if n["op"] == op and y in n["y"])
    return found


def swap(graph: dict[str, Any], constants: dict[str, Any]) -> None:
    graph["nodes"][2], graph["nodes"][1] = graph["nodes"][1], graph["nodes"][2]


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def constant(name: str, value: Any, at: int | None = 0) -> Change:
    """Another value in a constant, or another constant."""

    def change(graph: dict[str, Any], constants: dict[str, Any]) -> None:
        if at is None:
            constants[name] = value
        else:
            constants[name] = constants[name].copy()
            constants[name][at] = value

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "too long": (lambda g, c: g.update(positions=10**9), r"positions for a model of 256"),
    "order": (swap, r"is read before it is written"),
    "written twice": (lambda g, c: g["nodes"].append(g["nodes"][-1]), "logits: it is written twice"),
    "no such edge": (lambda g, c: g["edges"].pop("final_norm"), "final_norm: there is no such edge"),
    "spare edge": (lambda g, c: g["edges"].update(spare=g["edges"]["logits"]), "spare is written by no node"),
    "no output": (lambda g, c: g.update(output="final_norm"), "final_norm is not 320 logits"),
    "no embedding": (lambda g, c: g["nodes"].pop(0), "the embedding is not the first node"),
    "another table": (lambda g, c: node(g, "embed").update(matrix="lm_head"), "does not look up embed_tokens"),
    "factor": (lambda g, c: node(g, "embed").update(factor=1e300), "factor is not finite"),
    "positions": (lambda g, c: node(g, "embed").update(positions="embed_positions"), "does not have 256 rows"),
    "edge width": (lambda g, c: g["edges"]["logits"].update(width=7), "between 64 and 7 channels"),
    "edge scale": (lambda g, c: g["edges"]["logits"]["grid"].update(scale=1e-300), "is beyond float32"),
    "matrix": (lambda g, c: node(g, "linear").update(matrix="none"), "none is not a quantized matrix"),
    "other matrix": (lambda g, c: node(g, "linear").update(matrix="layers.0.mlp.down_proj"), "between 64 and 128"),
    "bias": (constant("layers.0.attn.q_proj.bias", 2**31), r"a bias is outside"),
    "multiplier": (constant("layers.0.attn.q_proj.multiplier", -1), r"a multiplier is outside"),
    "shift": (constant("layers.0.attn.q_proj.shift", 63), r"a shift is outside 1 \.\. 62"),
    "no constant": (lambda g, c: c.pop("layers.0.attn.q_proj.shift"), "there is no constant"),
    "short": (constant("logits.bias", np.zeros(3, np.int64), None), r"logits.bias is int64 \(3,\), not int64 \(320,\)"),
    "dtype": (constant("logits.bias", np.zeros(320, np.int32), None), "is int32"),
    "spare constant": (constant("spare", np.zeros(1, np.int8), None), "spare belongs to no node"),
    "runs": (lambda g, c: node(g, "norm").update(heads=7), "7 runs do not divide 64"),
    "no runs": (lambda g, c: node(g, "norm").update(heads=0), "0 runs do not divide"),
    "half a head": (lambda g, c: node(g, "rotate").update(head_dim=0), "heads of 0 do not divide"),
    "odd rotation": (lambda g, c: node(g, "rotate").update(dim=3), "3 channels of 32 cannot be turned"),
    "short turns": (constant("rotary.cos", np.zeros((2, 16), np.int16), None), r"rotary.cos is int16 \(2, 16\)"),
    "rotation": (lambda g, c: node(g, "rotate").update(plain_shift=0), "a shift is outside"),
    "huge": (lambda g, c: node(g, "rotate").update(multiplier=10**30), "a multiplier is outside"),
    "groups": (lambda g, c: node(g, "attend").update(kv_heads=3), "4 heads do not share 3"),
    "no heads": (lambda g, c: node(g, "attend").update(kv_heads=0), "do not share 0"),
    "head size": (lambda g, c: node(g, "attend").update(head_dim=16), "are not 4 heads of 16"),
    "window": (lambda g, c: node(g, "attend").update(window=-1), "its window, scale or soft-cap"),
    "far window": (lambda g, c: node(g, "attend").update(window=10**30), "its window, scale or soft-cap"),
    "one cache": (lambda g, c: node(g, "attend").update(v="layers.0.attn.k"), "keys or values of two"),
    "cap": (lambda g, c: node(g, "attend").update(softcap=None), "a soft-cap goes with a grid"),
    "no cap": (lambda g, c: c.pop("layers.0.attn.mixed.cap"), "there is no constant"),
    "no one": (constant("layers.0.attn.mixed.hi", 0), "hi does not begin with 65536"),
    "beyond one": (constant("layers.0.attn.mixed.lo", 1 << 17, 5), r"lo is outside 0 \.\. 65536"),
    "entry": (constant("layers.0.mlp.act.table", 200), "an entry is outside -128"),
    "table": (constant("layers.0.mlp.act.table", np.zeros(16, np.int16), None), r"table is int16 \(16,\)"),
    "product": (lambda g, c: node(g, "multiply").update(shift=64), "a shift is outside"),
    "summands": (lambda g, c: node(g, "sum").update(multipliers=[1]), "1 multipliers for 2 edges"),
    "sum": (lambda g, c: node(g, "sum").update(multipliers=[1, 2**30]), "a multiplier is outside"),
    "mixed widths": (lambda g, c: node(g, "sum").update(x=["layers.0.input", "layers.0.attn.q"]), "must agree"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_graph_no_runner_could_follow_is_refused(case: str, model: IntegerModel) -> None:
    change, told = HOSTILE[case]
    data, constants = json.loads(model.graph.model_dump_json()), dict(model.constants)
    change(data, constants)
    with pytest.raises(InputCorrupt, match=told):
        IntegerModel(model.spec, Graph.model_validate(data), constants, model.linears, model.floats)


def test_the_offsets_of_norms_and_of_positions_are_bounded(opt: IntegerModel) -> None:
    for change, told in [
        (constant("layers.0.attn_norm.offset", 2**60), "an offset is outside"),
        (lambda g, c: node(g, "embed").update(offset=3), "does not have 259 rows"),
        (lambda g, c: node(g, "embed").update(offset=-1), "does not look up embed_positions"),
    ]:
        data, constants = json.loads(opt.graph.model_dump_json()), dict(opt.constants)
        change(data, constants)
        with pytest.raises(InputCorrupt, match=told):
            IntegerModel(opt.spec, Graph.model_validate(data), constants, opt.linears, opt.floats)


def test_codes_that_are_not_whole_numbers_are_refused(model: IntegerModel) -> None:
    name = "layers.0.mlp.up_proj"
    linear = model.linears[name]
    for changed, told in [
        (replace(linear, zero={8: linear.zero[8] + np.float16(0.25)}), "a zero of .* is none of its codes"),
        (replace(linear, zero={8: linear.zero[8] + np.float16(128)}), "a zero of .* is none of its codes"),
        (replace(linear, zero={8: linear.zero[8] * np.float16(np.nan)}), "a zero of .* is none of its codes"),
        (replace(linear, zero={}), "a zero of .* is none of its codes"),
        (replace(linear, bits=(4, 8)), "has not one width of 4 or 8 bits and one group a row"),
        (replace(linear, groups=2), "has not one width of 4 or 8 bits and one group a row"),
    ]:
        with pytest.raises(InputCorrupt, match=told):
            IntegerModel(model.spec, model.graph, model.constants, dict(model.linears) | {name: changed}, model.floats)


def test_rows_of_embeddings_are_those_of_the_whole_matrix(model: IntegerModel, opt: IntegerModel) -> None:
    index = np.array([5, 300, 5, 0, 319])
    whole = model.linears["embed_tokens"].dequantize(8)
    assert np.array_equal(model.rows("embed_tokens", index), whole[index])
    learned = opt.floats["embed_positions.weight"].to_float32()
    assert np.array_equal(opt.rows("embed_positions", index % 200), learned[index % 200])
