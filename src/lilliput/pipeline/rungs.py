"""Several budgets, one artifact: ladders built rung by rung, so that every width served keeps to a budget of its own.

At the rung of a label, which is a width the artifact serves, a layer stays at the width it has where that is at least
the label, and takes a wider one of its recipe where it is not: `numerics.packing.serving_width` read backwards. What
they take is the knapsack's answer for the loss at that rung. Narrow rungs choose first; of a wider one they only see to
it that its budget can still be kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lilliput.artifact.plan import stored_bytes
from lilliput.core.errors import ConfigError
from lilliput.methods.base import Quantizer
from lilliput.pipeline.allocate import Choice, Frontier, fit
from lilliput.pipeline.plan import entry_of

Ladder = tuple[int, ...]


@dataclass(frozen=True)
class Stair:
    """One matrix, (out, in), and the quantizer that solves it, with all widths that its ladder may have."""

    shape: tuple[int, int]
    quantizer: Quantizer
    _known: dict[Ladder, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def climbs(self, ladder: Ladder, label: int) -> list[Ladder]:
        """What a ladder, () at first, may be from the rung of that label on: the widest first."""
        widest = self.quantizer.bits[-1]
        if ladder and (ladder[-1] >= label or ladder[-1] == widest):
            return [ladder]
        wide = [bits for bits in reversed(self.quantizer.bits) if bits >= label]
        return [(*ladder, bits) for bits in wide or [widest]]

    def held(self, ladder: Ladder, top: int) -> int:
        """Bytes in a copy that serves the widest of `ladder` and what is narrower. top: the label of the last rung.

        A later rung leaves these bytes as they are but for one thing: a shared grid has ratios, also at its narrowest
        width, once there is a second. Whether there will be one is known: a width below `top` is left for a wider one.
        """
        widest = self.quantizer.bits[-1]
        whole = (*ladder, widest) if ladder[-1] < min(top, widest) else ladder
        # Of the ladder with a width more only what its narrower widths read is counted, whatever that width will be.
        key = (*ladder, 0) if whole is ladder else ladder
        if key not in self._known:
            self._known[key] = stored_bytes(entry_of(self.shape, replace(self.quantizer, bits=whole)), ladder[-1])
        return self._known[key]

    def least(self, ladder: Ladder, labels: Sequence[int], top: int) -> list[int]:
        """Bytes at the rungs of the labels when the cheapest width is taken at each."""
        found = []
        for label in labels:
            ladder = min(self.climbs(ladder, label), key=lambda to: self.held(to, top))
            found.append(self.held(ladder, top))
        return found


@dataclass(frozen=True)
class Rung:
    """What was chosen for one label. ladders: so far, by layer; cost: bytes in a copy that serves it; loss: in nats."""

    label: int
    ladders: dict[str, Ladder]
    cost: int
    loss: float


def limit_of(bits: float, weights: int) -> int:
    """Bytes that so many weights may take at `bits` bits each."""
    return int(bits * weights / 8)


def up(bits: float) -> str:
    """Two digits, not below what it was."""
    return f"{-(-bits * 100 // 1) / 100:.2f}"


def labels_of(stairs: Sequence[Stair], widths: Sequence[int], budgets: Sequence[float], weights: int) -> Ladder:
    """The width that each budget is served under: the widest of `widths` that fits it for every layer.

    What narrower rungs need beside it, grids of their own or ratios, is counted. widths, budgets: ascending, these in
    bits a weight. Raises ConfigError where no width above that of the budget before fits.
    """
    labels: Ladder = ()
    for at, budget in enumerate(budgets):
        wider = [bits for bits in widths if not labels or bits > labels[-1]]
        if not wider:
            what = (
                f"{budget:g} bits a weight has no width to be served under, as {labels[-1]} bits is the widest there is"
            )
            raise ConfigError(what, "--target-bits", fix="Leave it out, or give wider --bits")
        # Ladders end at the last label; before it, whatever has a wider width goes on to one.
        need = {
            bits: sum(
                stair.least((), (*labels, bits), bits if at + 1 == len(budgets) else widths[-1])[-1] for stair in stairs
            )
            for bits in wider
        }
        fitting = [bits for bits in wider if need[bits] <= limit_of(budget, weights)]
        if not fitting:
            smallest = f"{up(8 * need[wider[0]] / weights)} of every layer at {wider[0]} bits"
            fix = "Give at least that, narrower --bits or larger groups"
            if labels:
                smallest += f" beside {' and '.join(map(str, labels))}"
                fix = "Give at least that, or leave it out"
                if not all(stair.quantizer.shared for stair in stairs):
                    fix += ", or set shared: true, so that all widths have one grid"
            raise ConfigError(f"{budget:g} bits a weight is below the {smallest}", "--target-bits", fix)
        labels = (*labels, fitting[-1])
    return labels


def climb(
    stairs: Mapping[str, Stair], losses: Mapping[str, Mapping[int, float]], labels: Ladder, limits: Sequence[int]
) -> list[Rung]:
    """Choose every layer's ladder, the narrowest rung first.

    losses: nats by layer and width, none above that of a narrower width. labels, limits: of each rung, ascending, and
    the bytes that a copy serving it may hold; what `labels_of` lets pass.
    """
    ladders: dict[str, Ladder] = dict.fromkeys(stairs, ())
    rungs: list[Rung] = []
    for at, (label, limit) in enumerate(zip(labels, limits, strict=True)):
        offers = {name: stair.climbs(ladders[name], label) for name, stair in stairs.items()}
        choices = [
            [Choice(to[-1], stairs[name].held(to, labels[-1]), losses[name][to[-1]]) for to in offer]
            for name, offer in offers.items()
        ]
        later = [
            {to[-1]: stairs[name].least(to, labels[at + 1 :], labels[-1]) for to in offer}
            for name, offer in offers.items()
        ]
        frontier = Frontier(choices)
        point = _choose(frontier, limit, later, limits[at + 1 :])
        assert point is not None, "the cheapest of every rung fits, and stays within reach"
        widths = dict(zip(stairs, frontier.widths(point), strict=True))
        ladders = {name: next(to for to in offer if to[-1] == widths[name]) for name, offer in offers.items()}
        rungs.append(Rung(label, ladders, int(frontier.cost[point]), float(frontier.loss[point])))
    return rungs


def _choose(
    frontier: Frontier, limit: int, later: Sequence[Mapping[int, Sequence[int]]], limits: Sequence[int]
) -> int | None:
    """The least loss that costs at most `limit` and leaves the later rungs inside theirs; None where nothing does.

    later: of each layer by its width, the least bytes at those rungs.
    """

    def size(point: int) -> int:
        held = zip(*(then[bits] for then, bits in zip(later, frontier.widths(point), strict=True)), strict=True)
        over = max((sum(each) - most for each, most in zip(held, limits, strict=True)), default=0)
        return max(int(frontier.cost[point]), limit + over)

    return fit(frontier, limit, size)
