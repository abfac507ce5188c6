"""SmoothQuant's scales, and scales that suit rounded queries and keys, folded into a float model before it is rounded.

Queries and keys meet in a product, so SmoothQuant's formula, which is of activations and weights, says nothing of them.
Their scales are those with which the roundings of the two edges disturb the scores least.

Source: Xiao et al., "SmoothQuant", ICML 2023, eq. 4.
Deviation: grouped values and the inside of the MLP get scales too; queries and keys as above, which are ours.
"""

import torch
from torch import Tensor

from lilliput.core.spec import AnySpec
from lilliput.methods.ranges import Loudness
from lilliput.models.decoder import Block, Decoder
from lilliput.models.encoder import Encoder
from lilliput.models.pairs import Pair, pairs, smoothing
from lilliput.models.sites import compared, source_of


def watched_channels(spec: AnySpec) -> list[str]:
    """The edges whose channels have to be known, those that linear layers read and queries and keys, without repeats."""
    found = {name: None for i in range(spec.num_layers) for name in compared(spec, i)}
    found |= {source_of(spec, name): None for i in range(spec.num_layers) for name in spec.linears(i)}
    return list(found)


def fold_scales(model: Decoder | Encoder, loud: Loudness, alpha: float, turned: bool) -> dict[str, Tensor]:
    """Fold scales into all legal pairs of `model`, in place, and return by what the channels of edges were divided.

    loud: what `watched_channels` names, of the float model. alpha: SmoothQuant's. turned: queries and keys too.
    """
    spec, divided = model.spec, dict[str, Tensor]()
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        own = dict(block.named_parameters())
        for pair in pairs(block):
            if pair.kind == "query_key":
                if turned:
                    pair.fold(block, balance(spec, pair, loud, layer))
                continue
            edge = source_of(spec, f"layers.{layer}.{pair.multiplied[0]}")
            weights = [own[f"{name}.weight"].data for name in pair.multiplied]
            scale = smoothing(pair, loud.peak(edge), weights, alpha)
            pair.fold(block, scale)
            divided[edge] = scale[pair.columns]
    return divided


def balance(spec: AnySpec, pair: Pair, loud: Loudness, layer: int) -> Tensor:
    """Scales between queries and keys with which their two roundings disturb the scores least: (width,).

    Of scales k**a / q**(1 - a), k and q being the peaks of channels. An edge's rounding is noise of the size of its
    largest peak in every channel, which scores see times the other side; of the keys only what differs from key to key,
    since a softmax does not see what is added to all scores of a query.
    """
    queries, keys = compared(spec, layer)
    (q, q_energy), (k, k_energy) = (
        _shared(pair.width, shared, loud.peak(edge), energy)
        for edge, shared, energy in (
            (queries, pair.columns, loud.energy(queries)),
            (keys, pair.rows, loud.variance(keys)),
        )
    )
    used = (q > 0) & (k > 0)
    best, least = torch.ones(pair.width), torch.inf
    for tenth in range(11):
        scale = torch.where(used, k ** (tenth / 10) / q ** (1 - tenth / 10), torch.ones_like(k))
        noise = (k / scale).amax().square() * (q_energy * scale.square()).sum()
        noise += (q * scale).amax().square() * (k_energy / scale.square()).sum()
        if float(noise) < least:
            best, least = scale, float(noise)
    return best


def _shared(width: int, scales: Tensor, peak: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The largest peak and all energy of the channels that share a scale: (width,) each. scales: the scale of each."""
    own = scales.expand(len(peak) // len(scales), -1).reshape(-1)  # one set may be for all heads
    most = torch.zeros(width).scatter_reduce(0, own, peak, "amax")
    return most, torch.zeros(width).scatter_reduce(0, own, energy, "sum")
