"""The forward pass with edges against the Decoder's, and the names of the edges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.core.errors import ConfigError
from lilliput.models import Checkpoint, load_decoder
from lilliput.models.decoder import Decoder
from lilliput.models.sites import Site, plain, run_block, run_end, run_start, site_policy, sites
from support.families import CASES, VOCAB, each, write_checkpoint


def decoder_of(folder: Path, family: str, changes: dict[str, Any]) -> Decoder:
    write_checkpoint(folder, family, seed=7, **changes)
    return load_decoder(Checkpoint.open(folder)).eval()


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(decoder: Decoder, site: Site) -> Tensor:
    hidden = run_start(decoder.spec, decoder.state_dict(), tokens())
    for layer, block in enumerate(decoder.blocks):
        hidden = run_block(decoder.spec, layer, dict(block.named_parameters()), hidden, site)
    return run_end(decoder.spec, decoder.state_dict(), hidden, site)


@each(CASES)
def test_without_sites_it_is_the_decoder_and_every_edge_is_met_once_in_order(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    decoder, met = decoder_of(tmp_path, family, changes), []

    def site(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        met.append(name)
        assert x.shape[:2] == (2, decoder.spec.num_heads if seen is not None else 21)
        return x

    found = run(decoder, site)
    with torch.no_grad():
        expected = decoder(tokens())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert met == list(sites(decoder.spec))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_queries_in_chunks_give_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tmp_path, family, {})
    whole = run(decoder, plain)
    monkeypatch.setattr("lilliput.models.sites.SCORES", 600)
    assert (run(decoder, plain) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_scores_behind_the_mask_are_of_no_concern(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, "gemma2", {})

    def spoilt(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        inside = seen is not None and not name.endswith("probabilities")
        return x.masked_fill(~seen, 1e30) if inside and seen is not None else x

    assert torch.equal(run(decoder, spoilt), run(decoder, plain))


def test_policy_takes_patterns_and_refuses_what_matches_nothing(tmp_path: Path) -> None:
    spec = decoder_of(tmp_path, "llama", {}).spec
    policy = site_policy(spec, {"*.mlp.inner": 16, "layers.1.mlp.inner": 8})
    assert (policy["layers.0.mlp.inner"], policy["layers.1.mlp.inner"], policy["layers.0.mlp.act"]) == (16, 8, 8)
    with pytest.raises(ConfigError, match=r"^sites: '\*\.mlp\.innr' is no edge of a llama model\. Give a name"):
        site_policy(spec, {"*.mlp.innr": 16})
    with pytest.raises(ConfigError, match=r"^sites: 'logits' is given 4 bits\. Give 8 or 16\.$"):
        site_policy(spec, {"logits": 4})
