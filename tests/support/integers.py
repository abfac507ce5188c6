"""Integer models in memory: a model's matrices rounded row by row, the range of every edge seen on some tokens.

    model = integer_model(decoder_or_encoder, tokens)

The decoder then has the weights the integer model means, so what differs between the two is the activations alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.artifact.integer import IntegerModel
from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.core.graph import Grid
from lilliput.models import Checkpoint, Decoder, Encoder, load_decoder, load_encoder
from lilliput.models.lowering import lower
from lilliput.models.sites import PROBABILITIES, Site, plain, run_block, run_end, run_start, site_policy
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import fields_of, pack_fields, tile_groups
from lilliput.numerics.straight import coded_rows
from support.encoders import write_encoder
from support.families import VOCAB, write_checkpoint


def row_codes(weight: Tensor, bits: int) -> Quantized:
    """Whole numbers -2**(bits - 1) + 1 .. 2**(bits - 1) - 1 times one scale a row, as an artifact stores them."""
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) / most).clamp_min(2.0**-24).half()
    whole = (weight / scale.float()).round().clamp(-most, most)
    codes = (whole + 2 ** (bits - 1)).to(torch.uint8)
    return Quantized(codes, (bits,), -1, {bits: scale}, {bits: torch.full_like(scale, 0.5)})


def row_codes_with_zeros(weight: Tensor, bits: int) -> Quantized:
    """The same with a zero each, far from the middle in many."""
    share = torch.rand(len(weight), 2, generator=torch.Generator().manual_seed(len(weight)))
    return coded_rows(weight, 0.3 + 0.7 * share, bits)


def stored_linear(name: str, coded: Quantized) -> StoredLinear:
    """The same matrix as an artifact hands it out."""
    out, columns = coded.shape
    fields = fields_of(coded.bits)
    return StoredLinear(
        name=name,
        out=out,
        columns=columns,
        group_size=coded.group_size,
        groups=1,
        bits=coded.bits,
        fields=fields,
        planes=tuple(pack_fields(coded.codes.numpy(), fields)),
        scale={b: tile_groups(s.numpy()) for b, s in coded.scale.items()},
        zero={b: tile_groups(z.numpy()) for b, z in coded.zero.items()},
        bias=None,
    )


def tiny_decoder(folder: Path, family: str, seed: int = 7, **changes: Any) -> Decoder:
    """A random decoder of that family."""
    write_checkpoint(folder, family, seed, **changes)
    return load_decoder(Checkpoint.open(folder)).eval()


def tiny_encoder(folder: Path, family: str) -> Encoder:
    """A random encoder of texts, "bert" or "clip"."""
    write_encoder(folder, family)
    return load_encoder(Checkpoint.open(folder, tower="text" if family == "clip" else None)).eval()


def some_tokens(length: int, seed: int = 1, vocab: int = VOCAB) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng(seed).integers(3, vocab, length)


@torch.no_grad()
def run_sites(decoder: Decoder | Encoder, tokens: np.ndarray, site: Site = plain) -> Tensor:
    """Logits, (length, vocab), or a vector, (embedding_size,), with `site` called at every edge."""
    state = dict(decoder.state_dict())
    x = run_start(decoder.spec, state, torch.from_numpy(np.asarray(tokens))[None], site)
    for layer in range(decoder.spec.num_layers):
        at = f"layers.{layer}."
        own = {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}
        x = run_block(decoder.spec, layer, own, x, site)
    return run_end(decoder.spec, state, x, site)[0]


def span(low: float, high: float, bits: int) -> Grid:
    """The grid whose codes just hold low .. high, and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (2**bits - 1), 1e-6)
    zero = round(-low / scale) - 2 ** (bits - 1)
    return Grid(bits=bits, scale=scale, zero=min(max(zero, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))


def observed(decoder: Decoder | Encoder, tokens: np.ndarray, policy: Mapping[str, int]) -> dict[str, Grid]:
    """For every edge the grid that holds what comes by."""
    found: dict[str, Grid] = {}

    def look(name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        values = x if seen is None else x[seen.expand_as(x)]
        if not name.endswith(PROBABILITIES):
            found[name] = span(float(values.min()), float(values.max()), policy[name])
        return x

    run_sites(decoder, tokens, look)
    return found


def integer_model(
    decoder: Decoder | Encoder,
    tokens: np.ndarray,
    bits: int = 8,
    overrides: Mapping[str, int] | None = None,
    *,
    zeros: bool = True,
) -> IntegerModel:
    """Round the decoder's matrices in place and return its integer graph, with ranges seen on `tokens`.

    zeros: rows of the first block have a zero each; all others are symmetric.
    """
    spec = decoder.spec
    state = decoder.state_dict()
    rows = {
        name: row_codes_with_zeros if zeros and name.startswith("layers.0.") else row_codes for name in spec.matrices()
    }
    coded = {name: made(state[f"{name}.weight"], bits) for name, made in rows.items()}
    for name, value in coded.items():
        state[f"{name}.weight"].copy_(value.dequantize(bits))
    policy = site_policy(spec, overrides or {})
    graph, constants = lower(spec, observed(decoder, tokens, policy), state, coded)
    floats = {
        name: StoredTensor("F32", tuple(value.shape), value.numpy())
        for name, value in state.items()
        if name.removesuffix(".weight") not in coded
    }
    linears = {name: stored_linear(name, value) for name, value in coded.items()}
    return IntegerModel(spec, graph, constants, linears, floats)
