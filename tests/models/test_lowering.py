"""From a decoder, codes and grids to an integer graph: what is refused, and with which words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.graph import Grid, Linear
from lilliput.models import Checkpoint, Decoder
from lilliput.models.decoder import ACTIVATIONS
from lilliput.models.lowering import FUNCTIONS, lower
from lilliput.models.sites import PROBABILITIES, site_policy, sites
from lilliput.numerics import fixed
from lilliput.numerics.nested import Quantized
from support.encoders import write_encoder
from support.integers import observed, row_codes, some_tokens, tiny_decoder

Parts = tuple[dict[str, Grid], dict[str, Tensor], dict[str, Quantized]]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(tmp_path_factory.mktemp("llama"), "llama", attention_bias=True)


@pytest.fixture
def parts(decoder: Decoder) -> Parts:
    state = {name: value.clone() for name, value in decoder.state_dict().items()}
    codes = {name: row_codes(state[f"{name}.weight"], 8) for name in decoder.spec.matrices()}
    return observed(decoder, some_tokens(12), site_policy(decoder.spec, {})), state, codes


def test_the_same_input_gives_the_same_graph_whose_edges_are_the_sites(decoder: Decoder, parts: Parts) -> None:
    (graph, constants), (again, same) = (lower(decoder.spec, *parts) for _ in range(2))
    assert graph == again
    assert all(np.array_equal(constants[name], same[name]) for name in constants)
    inside = ("scores", PROBABILITIES.split(".")[1])
    assert set(graph.edges) == {name for name in sites(decoder.spec) if not name.endswith(inside)}
    assert {type(value.dtype.type(0)) for value in constants.values()} == {np.int8, np.int16, np.int32, np.int64}
    assert [node.matrix for node in graph.nodes if isinstance(node, Linear)][-1] == "lm_head"


def broken(name: str) -> Callable[[Parts], None]:
    """Something wrong with `name`, by the case's own name."""

    def grid(parts: Parts) -> None:
        del parts[0]["layers.1.mlp.inner"]

    def floor(parts: Parts) -> None:
        parts[0]["layers.0.attn.q"] = Grid(bits=8, scale=1e-40, zero=0)

    def narrow_scores(parts: Parts) -> None:
        parts[0]["layers.0.attn.scores"] = Grid(bits=8, scale=1.0, zero=0)

    def far(parts: Parts) -> None:
        parts[0]["layers.0.middle"] = Grid(bits=16, scale=1e-30, zero=0)

    def codes(parts: Parts) -> None:
        del parts[2]["lm_head"]

    def ladder(parts: Parts) -> None:
        coded = parts[2]["lm_head"]
        parts[2]["lm_head"] = replace(coded, bits=(4, 8), scale={4: coded.scale[8], 8: coded.scale[8]})

    def zero(parts: Parts) -> None:
        coded = parts[2]["layers.0.mlp.up_proj"]
        parts[2]["layers.0.mlp.up_proj"] = replace(coded, zero={8: torch.zeros_like(coded.zero[8])})

    def bias(parts: Parts) -> None:
        parts[1]["layers.0.attn.v_proj.bias"][3] = 1e12

    def nan(parts: Parts) -> None:
        parts[1]["layers.1.mlp_norm.weight"][0] = torch.nan

    def norm(parts: Parts) -> None:
        del parts[1]["final_norm.weight"]

    def nothing(parts: Parts) -> None:
        parts[2]["layers.0.attn.k_proj"].scale[8][2] = 0

    found: dict[str, Any] = locals()
    breaks: Callable[[Parts], None] = found[name]
    return breaks


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("grid", r"^layers\.1\.mlp\.inner: this site has no range\."),
        ("floor", r"^layers\.0\.attn\.q: its scale is 1e-40, .* levels would be lost\."),
        ("narrow_scores", r"^layers\.0\.attn\.scores: scores have 16 bits, not 8\."),
        ("far", r"^layers\.0\.middle: no whole numbers hold its constants: .*\. Its range is far"),
        ("codes", r"^lm_head: it has no codes\."),
        ("ladder", r"^lm_head: its codes are of widths \[4, 8\], 1 groups a row\."),
        ("zero", r"^layers\.0\.mlp\.up_proj: a zero is none of its codes\."),
        ("bias", r"^layers\.0\.attn\.v_proj: the bias of row 3 is .* steps of its sum"),
        ("nan", r"^layers\.1\.mlp_norm\.weight: a value is not finite\."),
        ("norm", r"^final_norm\.weight: the model has no such tensor\."),
        ("nothing", r"^layers\.0\.attn\.k_proj: row 2 has a scale of 0 for weights that are not\."),
    ],
)
def test_what_cannot_be_lowered_is_named(what: str, told: str, decoder: Decoder, parts: Parts) -> None:
    broken(what)(parts)
    with pytest.raises(ConfigError, match=told):
        lower(decoder.spec, *parts)


def test_an_encoder_of_pictures_is_refused(tmp_path: Path, parts: Parts) -> None:
    write_encoder(tmp_path, "clip")
    with pytest.raises(Unsupported, match="an encoder of pictures has no integer graph"):
        lower(Checkpoint.open(tmp_path, tower="vision").spec, *parts)


def test_a_row_without_weights_keeps_its_bias(decoder: Decoder, parts: Parts) -> None:
    name = "layers.0.attn.v_proj"
    coded = parts[2][name]
    coded.codes[5], coded.scale[8][5] = 128, 0
    graph, constants = lower(decoder.spec, *parts)
    assert constants[f"{name}.multiplier"][5] / 2.0 ** int(constants[f"{name}.shift"][5]) == 2.0**-8
    to, bias = graph.edges[name].grid, parts[1][f"{name}.bias"][5]
    assert constants[f"{name}.bias"][5] == round(float(bias.double()) / to.scale * 2**8)


def test_tables_hold_the_activation_of_every_code(decoder: Decoder, parts: Parts) -> None:
    graph, constants = lower(decoder.spec, *parts)
    own, to = (graph.edges[f"layers.0.mlp.{kind}"].grid for kind in ("gate_proj", "act"))
    real = torch.nn.functional.silu(torch.from_numpy(fixed.values(np.arange(-128, 128), own))).numpy()
    found = fixed.values(constants["layers.0.mlp.act.table"], to)
    inside = (real >= to.scale * (to.low - to.zero)) & (real <= to.scale * (to.high - to.zero))
    assert inside.sum() > 200
    assert np.abs(found - real)[inside].max() <= to.scale / 2 * (1 + 1e-9)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activations_are_those_of_the_decoder(kind: Any) -> None:
    x = np.linspace(-60, 60, 4001)
    assert np.abs(FUNCTIONS[kind](x) - ACTIVATIONS[kind](torch.from_numpy(x)).numpy()).max() < 1e-12


def test_probabilities_of_eight_bits_are_asked_for_by_their_grid(decoder: Decoder, parts: Parts) -> None:
    parts[0][f"layers.1.{PROBABILITIES}"] = Grid(bits=8, scale=1 / 255, zero=-128)
    shares = [node.probability for node in lower(decoder.spec, *parts)[0].nodes if node.op == "attend"]
    assert shares == [65535, 255]
