"""Encoders as integer graphs, by the definition: against the float encoder, site by site and vector by vector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.artifact.integer import problems
from lilliput.core.errors import OutOfResource, Unsupported
from lilliput.core.graph import Attend, Embed, Norm, Sum
from lilliput.core.spec import PADDING
from lilliput.engine.oracle import Oracle
from lilliput.models import Checkpoint, load_encoder
from lilliput.models.lowering import lower
from lilliput.models.sites import PROBABILITIES, sites
from lilliput.numerics import fixed
from support.encoders import write_encoder
from support.integers import integer_model, run_sites, some_tokens, tiny_decoder, tiny_encoder

TOKENS = some_tokens(17)
each = pytest.mark.parametrize("family", ["bert", "clip"])


@each
def test_every_site_is_within_a_step_of_the_rounded_float_model(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, family)
    model = integer_model(encoder, TOKENS)
    oracle = Oracle(model).sites(TOKENS, scores=True)
    grids = {name: edge.grid for name, edge in model.graph.edges.items()}
    grids |= {n.y.replace("mixed", "scores"): n.scores for n in model.graph.nodes if isinstance(n, Attend)}
    gaps: dict[str, int] = {}

    def look(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """What float makes of the oracle's codes of the edges before, so that differences do not add up."""
        if name.endswith(PROBABILITIES):
            return x
        codes = fixed.codes(x[0].double().numpy(), grids[name]).astype(np.int64)
        gap = np.abs(codes - oracle[name])
        gaps[name] = int(gap.max() if seen is None else gap[seen.expand_as(x[0]).numpy()].max())
        return torch.from_numpy(fixed.values(oracle[name], grids[name])).float()[None]

    run_sites(encoder, TOKENS, look)
    assert gaps.keys() == oracle.keys()
    assert {name: gap for name, gap in gaps.items() if gap > 1} == {}


@each
def test_sixteen_bits_everywhere_are_close_to_float_and_eight_are_near(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, family)
    wide, narrow = (
        integer_model(encoder, TOKENS, overrides={"*": 16}),
        integer_model(tiny_encoder(tmp_path, family), TOKENS),
    )
    with torch.no_grad():
        real = encoder(torch.from_numpy(TOKENS)[None])[0].numpy()
    gaps = [np.abs(Oracle(model).embed(TOKENS) - real).max() / np.abs(real).max() for model in (wide, narrow)]
    assert gaps[0] <= 1e-3
    assert gaps[0] < gaps[1] <= 0.15


@each
def test_no_float_is_met_between_the_declared_steps(family: str, tmp_path: Path) -> None:
    model = integer_model(tiny_encoder(tmp_path, family), TOKENS, bits=4)
    assert np.array_equal(Oracle(model, strict=True).embed(TOKENS), Oracle(model).embed(TOKENS))


@each
def test_the_edges_are_the_sites_and_a_norm_behind_a_sum_feeds_two(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, family)
    graph = integer_model(encoder, TOKENS).graph
    inside = ("scores", PROBABILITIES.split(".")[1])
    assert set(graph.edges) == {name for name in sites(encoder.spec) if not name.endswith(inside)}
    assert {node.causal for node in graph.nodes if isinstance(node, Attend)} == {family == "clip"}
    start = graph.nodes[0]
    assert isinstance(start, Embed)
    assert start.types == ("embed_types" if family == "bert" else None)
    alone = [(node.x[0], node.y) for node in graph.nodes if isinstance(node, Sum) and len(node.x) == 1]
    norms = {node.y for node in graph.nodes if isinstance(node, Norm)}
    assert len(alone) == (4 if family == "bert" else 0)
    for x, y in alone:
        assert x in norms
        assert (graph.edges[x].grid.bits, graph.edges[y].grid.bits) == (16, 8)
    assert graph.output == ("layers.1.mlp_post_norm" if family == "bert" else "projection")


def test_rows_are_run_without_their_padding(tmp_path: Path) -> None:
    oracle = Oracle(integer_model(tiny_encoder(tmp_path, "bert"), TOKENS))
    rows = np.stack([np.append(TOKENS[:9], [PADDING] * 3), TOKENS[:12]])
    found = oracle.vectors(rows)
    assert np.array_equal(found[0], oracle.embed(TOKENS[:9]))
    assert np.array_equal(found[1], oracle.embed(TOKENS[:12]))
    assert not np.array_equal(oracle.embed(TOKENS[:9]), oracle.embed(TOKENS[8::-1]))  # positions count


def test_pooling_is_what_the_definition_says(tmp_path: Path) -> None:
    model = integer_model(tiny_encoder(tmp_path, "bert"), TOKENS)
    oracle, grid = Oracle(model), model.graph.edges[model.graph.output].grid
    whole = oracle.sites(TOKENS)[model.graph.output].astype(np.int64) - grid.zero
    mean = np.float32(grid.scale) * whole.sum(0).astype(np.float32) / np.float32(len(TOKENS))
    assert np.array_equal(oracle.embed(TOKENS), mean)
    object.__setattr__(oracle, "spec", oracle.spec.model_copy(update={"pooling": "first"}))
    assert np.array_equal(oracle.embed(TOKENS), np.float32(grid.scale) * whole[0].astype(np.float32))


def test_what_is_not_served_is_refused_in_one_line(tmp_path: Path) -> None:
    oracle = Oracle(integer_model(tiny_encoder(tmp_path / "bert", "bert"), TOKENS))
    with pytest.raises(Unsupported, match="a bert encoder makes vectors of whole texts"):
        oracle.logits(TOKENS)
    with pytest.raises(OutOfResource, match="49 tokens exceed the 48 positions"):
        oracle.embed(some_tokens(49))
    with pytest.raises(Unsupported, match="a llama decoder generates text"):
        Oracle(integer_model(tiny_decoder(tmp_path / "llama", "llama"), TOKENS)).embed(TOKENS)
    write_encoder(tmp_path / "clip", "clip")
    vision = load_encoder(Checkpoint.open(tmp_path / "clip", tower="vision"))
    with pytest.raises(Unsupported, match="an encoder of pictures has no integer graph"):
        lower(vision.spec, {}, vision.state_dict(), {})


def test_hostile_graphs_of_encoders_are_refused(tmp_path: Path) -> None:
    model = integer_model(tiny_encoder(tmp_path, "bert"), TOKENS)
    vision = write_encoder(tmp_path / "clip", "clip") and Checkpoint.open(tmp_path / "clip", tower="vision").spec

    def told(graph: object = None, spec: object = None) -> str:
        args = spec or model.spec, graph or model.graph, model.constants, model.linears, model.floats
        return next(problems(*args), "")  # type: ignore[arg-type]

    def start(**changes: object) -> object:
        first, *rest = model.graph.nodes
        return model.graph.model_copy(update={"nodes": (first.model_copy(update=changes), *rest)})

    assert told() == ""
    assert "does not look up embed_types" in told(start(types="embed_tokens"))
    assert "does not have" in told(start(offset=1))
    assert "49 positions for a model of 48" in told(model.graph.model_copy(update={"positions": 49}))
    assert "is not 64 numbers of a vector" in told(model.graph.model_copy(update={"output": "layers.0.mlp.act"}))
    assert told(spec=vision) == "a graph of tokens for a model of pictures"
