"""What passes the edges of a model on calibration text, the grids that suit it, and the edges that need 16 bits.

A range of 8 bits is what an Observer's rule picks, in front of an activation by what comes out behind it. One of 16 bits spans all that was seen and `ROOM` more, which costs a
part of a bit that is not missed; and nothing is cut off where cutting is what hurts most, in the residual stream.

Source: Tan et al., "MobileQuant", EMNLP Findings 2024, section 3, for static ranges an edge; Dong et al., "HAWQ", ICCV
2019, for choosing widths by measured sensitivity.
Deviation: sensitivity is the divergence of the whole model with one edge rounded, not curvature.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.core.errors import QualityFailed
from lilliput.core.graph import Grid
from lilliput.core.spec import AnySpec, EncoderSpec
from lilliput.models.simulate import Rounding, Simulation
from lilliput.models.sites import PROBABILITIES
from lilliput.numerics.observers import Observer, Rule

ROOM = 1.25
"""How much wider a range of 16 bits is than what was seen."""


class Loudness:
    """A Site that keeps, of every channel of the edges named, largest size, mean square and variance: (channels,) each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.peaks: dict[str, Tensor | None] = dict.fromkeys(names)
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `models.sites.Site`."""
        if name in self.peaks:
            flat = x.detach().flatten(0, -2)
            peak, old = flat.abs().amax(0), self.peaks[name]
            self.peaks[name] = peak if old is None else torch.maximum(old, peak)
            self._sums[name] = self._sums.get(name, torch.zeros(())) + flat.sum(0)
            self._squares[name] = self._squares.get(name, torch.zeros(())) + flat.square().sum(0)
            self._tokens[name] = self._tokens.get(name, 0) + len(flat)
        return x

    def peak(self, name: str) -> Tensor:
        """Largest sizes at an edge that was met."""
        found = self.peaks[name]
        assert found is not None, name
        return found

    def energy(self, name: str) -> Tensor:
        """Mean squares at an edge that was met."""
        return self._squares[name] / self._tokens[name]

    def variance(self, name: str) -> Tensor:
        """Variances over the tokens at an edge that was met."""
        return self.energy(name) - (self._sums[name] / self._tokens[name]).square()


class Ranges:
    """A Site that watches every edge, and then knows a grid for each.

    rule, share: as in Observer, for 8 bits. apart: leave the first position of every sequence out of ranges of 8 bits; it
    then saturates. through: the functions that alone read some edges, by edge. Memory is two histograms an edge.
    """

    def __init__(
        self,
        names: Iterable[str],
        rule: Rule,
        share: float,
        apart: bool,
        through: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        kept, read = [name for name in names if not name.endswith(PROBABILITIES)], through or {}
        self._fine = {n: Observer(rule, 8, share=share, apart=apart, through=read.get(n)) for n in kept}
        self._wide = {n: Observer("minmax", 16) for n in self._fine} if apart else self._fine
        self.sizes: dict[str, float] = {}
        """Numbers a position at every edge that was met."""

    def __call__(self, name: str, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `models.sites.Site`. Raises QualityFailed, naming the edge, for what is not finite."""
        self.sizes[name] = x.numel() / (len(x) * x.shape[1 if seen is None else 2])
        if name in self._fine:
            if not bool((x if seen is None else x[..., seen]).isfinite().all()):
                fix = "The weights are broken, or the text is not for this model"
                raise QualityFailed("not finite on the calibration text", where=name, fix=fix)
            rows = x.detach() if seen is None else x.detach()[..., seen].flatten()[None, :, None]
            self._wide[name].add(rows)
            if self._fine[name] is not self._wide[name]:
                self._fine[name].add(rows if seen is None else _unsunk(rows))
        return x

    def grid(self, name: str, bits: int) -> Grid:
        """The grid of an edge in 8 or 16 bits."""
        if name.endswith(PROBABILITIES):
            return Grid(bits=16 if bits == 16 else 8, scale=1 / (2**bits - 1), zero=-(2 ** (bits - 1)))
        if bits == 8:
            low, high = self._fine[name].range()
        else:
            low, high = (end * ROOM for end in (self._wide[name].low, self._wide[name].high))
        return spanning(low, high, bits)

    def grids(self, policy: Mapping[str, int]) -> dict[str, Grid]:
        """A grid for every edge of the policy."""
        return {name: self.grid(name, bits) for name, bits in policy.items()}


def _unsunk(rows: Tensor) -> Tensor:
    """Scores, behind a first position that `apart` takes away again: they have no sink of their own."""
    return F.pad(rows, (0, 0, 1, 0))


def spanning(low: float, high: float, bits: int) -> Grid:
    """The grid from low to high, which holds 0 as a code: low <= 0 <= high. Where both are 0 its step is 1.

    There is no least step but that of float32, so that a small range has as many levels as any other.
    """
    top = 2 ** (bits - 1)
    scale = max((high - low) / (2 * top - 1), torch.finfo(torch.float32).tiny) if high > low else 1.0
    zero = max(-top, min(top - 1, -top - round(low / scale)))
    return Grid(bits=16 if bits == 16 else 8, scale=scale, zero=zero)


def sensitivity(
    model: Simulation, ranges: Ranges, policy: Mapping[str, int], rows: Sequence[Tensor], tell: Callable[[], None]
) -> dict[str, float]:
    """How much the divergence from the model grows when an edge has 8 bits and all others 16, by edge; see `unlikeness`.

    model: float, whose edges `ranges` has watched. policy: the edges. rows: batches of tokens, (batch, length), without padding. tell: called
    after every edge.
    """
    wide = {name: ranges.grid(name, 16) for name in policy}
    targets = [model.run(tokens) for tokens in rows]

    def divergence(grids: Mapping[str, Grid]) -> float:
        site, total = Rounding(grids), 0.0
        for tokens, target in zip(rows, targets, strict=True):
            total += float(unlikeness(model.spec, model.run(tokens, site), target)) * len(tokens)
        return total / sum(map(len, rows))

    base, found = divergence(wide), {}
    for name in policy:
        found[name] = divergence(wide | {name: ranges.grid(name, 8)}) - base
        tell()
    return found


def unlikeness(spec: AnySpec, found: Tensor, wanted: Tensor) -> Tensor:
    """How far what a model puts out is from what it should: the mean divergence of logits, (.., vocab), in nats; of an
    encoder's vectors, (.., embedding_size), the mean of 1 - cosine.
    """
    if isinstance(spec, EncoderSpec):
        return 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
    found, wanted = torch.log_softmax(found, -1), torch.log_softmax(wanted, -1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()


def widest(found: Mapping[str, float], budget: int | float, sizes: Mapping[str, float]) -> list[str]:
    """The edges to give 16 bits, most sensitive first.

    budget: how many, or as a fraction what share of the bytes that all edges take in 8 bits; then the most divergence
    saved for a byte comes first, and what does not fit is passed over. sizes: channels by edge.
    """
    if isinstance(budget, int):
        return sorted(found, key=lambda name: -found[name])[:budget]
    left, chosen = budget * sum(sizes[name] for name in found), []
    for name in sorted(found, key=lambda n: -found[n] / sizes[n]):
        if sizes[name] <= left and found[name] > 0:
            chosen.append(name)
            left -= sizes[name]
    return chosen
