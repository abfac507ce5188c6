"""The integer graph by its definition: against the float model, against itself token by token, and without floats."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.artifact.integer import IntegerModel
from lilliput.core.errors import ConfigError, OutOfResource
from lilliput.core.graph import Attend, Embed, Grid, Linear, Norm
from lilliput.engine.oracle import Oracle, WholeArray
from lilliput.measure.quality import evaluate
from lilliput.models import Decoder
from lilliput.numerics import fixed
from support.families import CASES, Case, each
from support.integers import integer_model, run_sites, some_tokens, tiny_decoder

EVERY: list[Case] = [*CASES, ("llama", {"attention_bias": True, "mlp_bias": True})]
TOKENS = some_tokens(20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[IntegerModel, Decoder]:
    decoder = tiny_decoder(tmp_path_factory.mktemp("llama"), "llama")
    return integer_model(decoder, TOKENS), decoder


def rounded(decoder: Decoder, model: IntegerModel) -> dict[str, np.ndarray]:
    """Codes of every edge of the float model when each edge is rounded as it is met, from the oracle's own codes on.

    Every edge is computed in float from the oracle's codes of the edges before it, so differences do not add up.
    """
    oracle = Oracle(model).sites(TOKENS, scores=True)
    grids = {name: edge.grid for name, edge in model.graph.edges.items()}
    for node in model.graph.nodes:
        if isinstance(node, Attend):
            grids[node.y.replace("mixed", "scores")] = node.scores
            if node.capped is not None:
                grids[node.y.replace("mixed", "capped")] = node.capped
    found: dict[str, np.ndarray] = {}

    def look(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        if name not in grids:
            return x  # the probabilities
        real = x[0].double().numpy()
        found[name] = fixed.codes(real, grids[name]).astype(np.int64)
        if seen is not None:
            found[name] = np.where(seen.numpy(), found[name], -(2**15))
        return torch.from_numpy(fixed.values(oracle[name], grids[name])).float()[None]

    run_sites(decoder, TOKENS, look)
    return found


@each(EVERY)
def test_every_site_is_within_a_step_of_the_rounded_float_model(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    decoder = tiny_decoder(tmp_path, family, **changes)
    model = integer_model(decoder, TOKENS)
    wanted, found = rounded(decoder, model), Oracle(model).sites(TOKENS, scores=True)
    assert wanted.keys() == found.keys()
    gaps = {name: int(np.abs(wanted[name] - found[name]).max()) for name in wanted}
    # 16 bits are finer than the 14 of cosines, the 16 of shares and the 2**-16 of exponentials: there are no more here
    assert {name: gap for name, gap in gaps.items() if gap > 1} == {}


@each(EVERY)
def test_sixteen_bits_everywhere_are_close_to_float(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    decoder = tiny_decoder(tmp_path, family, **changes)
    model = integer_model(decoder, TOKENS, overrides={"*": 16})
    with torch.no_grad():
        real = decoder(torch.from_numpy(TOKENS)[None])[0].numpy()
    said = Oracle(model).logits(TOKENS)
    assert np.abs(said - real).max() <= 1e-3 * np.abs(real).max()
    assert (said.argmax(1) == real.argmax(1)).all()


@each(EVERY)
def test_token_by_token_gives_the_integers_of_the_whole_and_no_float_is_met(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = integer_model(tiny_decoder(tmp_path, family, **changes), TOKENS, bits=4)
    oracle, strict = Oracle(model), Oracle(model, strict=True)
    whole = oracle.feed(oracle.start(), TOKENS)
    state = oracle.start()
    parts = [oracle.feed(state, TOKENS[at : at + 1]) for at in range(7)] + [oracle.feed(state, TOKENS[7:])]
    assert whole.dtype == np.int16
    assert len(np.unique(whole)) > 100
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(strict.feed(strict.start(), TOKENS), whole)


def test_guarded_arrays_refuse_floats_however_they_come() -> None:
    x = np.arange(4).view(WholeArray)
    assert isinstance(np.where(x > 1, x, 0) @ x, np.integer)
    assert isinstance(np.concatenate([x, x])[1:], WholeArray)
    for wrong in (lambda: x * 0.5, lambda: x / 2, lambda: np.sqrt(x), lambda: x.astype(float), lambda: x.mean()):
        with pytest.raises(TypeError, match="between the declared float steps"):
            wrong()


def test_an_oracle_that_slips_into_floats_is_caught(
    llama: tuple[IntegerModel, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "isqrt", lambda x: np.floor(np.sqrt(x)).astype(np.int64))
    Oracle(llama[0]).logits(TOKENS)
    with pytest.raises(TypeError, match="sqrt on float64 between the declared float steps"):
        Oracle(llama[0], strict=True).logits(TOKENS)


def test_it_runs_as_any_other_model_in_a_measurement(llama: tuple[IntegerModel, Decoder]) -> None:
    model, decoder = llama

    class Original:
        def logits(self, tokens: np.ndarray, *, bits: int | None = None) -> np.ndarray:
            return run_sites(decoder, tokens.astype(np.int64)).numpy()

    row = evaluate(Oracle(model), [TOKENS.astype(np.int32)], bits=[8], against=Original())[0]
    assert row.kl is not None
    assert 0 < row.kl < 0.5
    with pytest.raises(ConfigError, match="weights of 8 bits, not 4"):
        Oracle(model).logits(TOKENS, bits=4)


def test_what_no_sequence_may_hold_is_refused(llama: tuple[IntegerModel, Decoder]) -> None:
    oracle = Oracle(llama[0])
    with pytest.raises(OutOfResource, match="257 tokens exceed the 256 positions"):
        oracle.logits(some_tokens(257))
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        oracle.logits([3, 320])
    with pytest.raises(ConfigError, match="not a list"):
        oracle.logits([])


def test_logits_pass_their_soft_cap(tmp_path: Path) -> None:
    model = integer_model(tiny_decoder(tmp_path, "gemma2"), TOKENS)
    assert model.graph.logit_softcap == 4.0
    oracle = Oracle(model)
    grid = model.graph.edges["logits"].grid
    real = fixed.values(oracle.feed(oracle.start(), TOKENS), grid)
    assert np.abs(real).max() > 4
    assert np.abs(oracle.logits(TOKENS) - 4 * np.tanh(real / 4)).max() < 1e-5


def test_the_edges_carry_what_the_policy_says(llama: tuple[IntegerModel, Decoder]) -> None:
    edges = llama[0].graph.edges
    assert edges["layers.0.input"].grid.bits == edges["layers.1.middle"].grid.bits == edges["logits"].grid.bits == 16
    assert edges["layers.0.attn.q"].grid.bits == edges["layers.1.mlp.inner"].grid.bits == 8
    kinds = [type(node) for node in llama[0].graph.nodes]
    assert kinds[0] is Embed
    assert kinds.count(Linear) == 2 * 7 + 1
    assert kinds.count(Norm) == 2 * 2 + 1


def test_matrices_beyond_the_room_for_floats_give_the_same(
    llama: tuple[IntegerModel, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Oracle(llama[0]).logits(TOKENS)
    monkeypatch.setattr("lilliput.engine.oracle._CARRIED", 0)
    assert np.array_equal(Oracle(llama[0]).logits(TOKENS), whole)


def test_grids_hold_their_zero() -> None:
    with pytest.raises(ValueError, match="is no code of 8 bits"):
        Grid(bits=8, scale=1.0, zero=128)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the latter has a soft-cap and windows
def test_nodes_read_what_they_are_given_and_nothing_else(family: str, tmp_path: Path) -> None:
    model = integer_model(tiny_decoder(tmp_path, family), TOKENS)
    oracle = Oracle(model, strict=True)
    truth = oracle.sites(TOKENS, scores=True)
    again = oracle.sites(TOKENS, scores=True, given=truth)
    assert all(np.array_equal(again[name], codes) for name, codes in truth.items())
    last = "capped" if family == "gemma2" else "scores"
    readers = {"layers.0.attn.v_proj": {"layers.0.attn.mixed"}, f"layers.0.attn.{last}": {"layers.0.attn.mixed"}}
    if family == "gemma2":
        readers["layers.0.attn.scores"] = {"layers.0.attn.capped"}
    for name, wanted in readers.items():
        other = truth | {name: np.where(truth[name] > 0, truth[name] - 9, truth[name] + 9)}
        found = oracle.sites(TOKENS, scores=True, given=other)
        assert {site for site, codes in truth.items() if not np.array_equal(found[site], codes)} == wanted


def test_codes_are_changed_before_they_are_read(llama: tuple[IntegerModel, Decoder]) -> None:
    oracle, name = Oracle(llama[0]), "layers.1.attn_norm"
    truth = oracle.sites(TOKENS)
    changed = oracle.sites(TOKENS, change=lambda site, codes: codes // 2 if site == name else codes)
    assert np.array_equal(changed[name], truth[name] // 2)
    before = list(truth)[: list(truth).index(name)]
    assert all(np.array_equal(changed[site], truth[site]) for site in before)
    assert not np.array_equal(changed["layers.1.attn.q_proj"], truth["layers.1.attn.q_proj"])
