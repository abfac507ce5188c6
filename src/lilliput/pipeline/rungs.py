"""Several budgets, one artifact: ladders built rung by rung, so that every width served keeps to a budget of its own.

At the rung of a label, which is a width the artifact serves, a layer stays at the width it has where that is at least
the label, and takes a wider one of its recipe where it is not: `numerics.packing.serving_width` read backwards. Narrow
rungs choose first, and what they choose binds the wider ones: a layer that takes 3 bits at the rung of 2 is at 3 at the
rung of 3 as well, where it would rather have 4. So every rung is a knapsack of the loss there and of what the layer is
expected to lose at the later ones, their bytes being paid for at the price they have there; see `Price`.

Source: for prices of bytes, Everett, "Generalized Lagrange Multiplier Method", Operations Research 1963. Deviation: they
are those of a rung by itself and not sought again for all rungs together, which could gain a percent or two (the tests
hold what is chosen to a bound that no choice can pass); budgets are kept by the knapsacks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lilliput.artifact.plan import stored_bytes
from lilliput.core.errors import ConfigError
from lilliput.methods.base import Quantizer
from lilliput.pipeline.allocate import Choice, Frontier, fit
from lilliput.pipeline.plan import entry_of

Ladder = tuple[int, ...]
Labels = tuple[int, ...]
Losses = Mapping[str, Mapping[int, float]]

NEAR = 0.02
"""Share of a budget, to both sides of it, over which the price of a byte is taken: single steps are uneven."""
TINY = 1e-12
"""The least loss that shares are taken of."""


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
        """Bytes at the rungs of the labels when the cheapest width is taken at each, whatever the next one then costs."""
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


def labels_of(stairs: Sequence[Stair], widths: Sequence[int], budgets: Sequence[float], weights: int) -> Labels:
    """The width that each budget is served under: the widest of `widths` that fits it for every layer.

    What narrower rungs need beside it, grids of their own or ratios, is counted. widths, budgets: ascending, these in
    bits a weight. Raises ConfigError where no width above that of the budget before fits.
    """
    labels: Labels = ()
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


@dataclass(frozen=True)
class Price:
    """What the losses and bytes of a rung count: as shares of the least loss the rung would have if it were the only one.

    loss: of a nat. byte: of a byte, what one more would save there.
    """

    loss: float
    byte: float


def price(stairs: Mapping[str, Stair], losses: Losses, label: int, limit: int, top: int) -> Price:
    """The price at one rung. losses, limit: as `climb` wants them; top: the label of the last rung."""
    frontier = Frontier(
        [
            [Choice(to[-1], stair.held(to, top), losses[name][to[-1]]) for to in stair.climbs((), label)]
            for name, stair in stairs.items()
        ]
    )
    ends = [frontier.best(int(limit * (1 + side * NEAR))) or 0 for side in (-1, 0, 1)]
    (low, least, high), (fewer, _, more) = frontier.loss[ends], frontier.cost[ends]
    share = 1 / max(float(least), TINY)
    return Price(share, share * float(low - high) / max(1, int(more - fewer)))


def climb(stairs: Mapping[str, Stair], losses: Losses, labels: Labels, limits: Sequence[int]) -> list[Rung]:
    """Choose every layer's ladder, the narrowest rung first.

    losses: nats by layer and width, none above that of a narrower width. labels, limits: of each rung, ascending, and
    the bytes that a copy serving it may hold; what `labels_of` lets pass.
    """
    top = labels[-1]
    prices = [price(stairs, losses, label, limit, top) for label, limit in zip(labels, limits, strict=True)]

    def ahead(name: str, ladder: Ladder, at: int) -> float:
        """The least that a layer is expected to cost at the rungs from `at` on, all in all."""
        if at == len(labels):
            return 0.0
        stair, own, now = stairs[name], losses[name], prices[at]
        return min(
            now.loss * own[to[-1]] + now.byte * stair.held(to, top) + ahead(name, to, at + 1)
            for to in stair.climbs(ladder, labels[at])
        )

    ladders: dict[str, Ladder] = dict.fromkeys(stairs, ())
    rungs: list[Rung] = []
    for at, (label, limit) in enumerate(zip(labels, limits, strict=True)):
        offers = {name: stair.climbs(ladders[name], label) for name, stair in stairs.items()}
        choices, later = [], []
        for name, offer in offers.items():
            stair, own = stairs[name], losses[name]
            expected = {to[-1]: prices[at].loss * own[to[-1]] + ahead(name, to, at + 1) for to in offer}
            choices.append([Choice(to[-1], stair.held(to, top), expected[to[-1]]) for to in offer])
            later.append({to[-1]: stair.least(to, labels[at + 1 :], top) for to in offer})
        frontier = Frontier(choices)
        point = _choose(frontier, limit, later, limits[at + 1 :])
        assert point is not None, "the cheapest of every rung fits, and the narrower ones leave it within reach"
        widths = dict(zip(stairs, frontier.widths(point), strict=True))
        ladders = {name: next(to for to in offer if to[-1] == widths[name]) for name, offer in offers.items()}
        cost = sum(stairs[name].held(ladder, top) for name, ladder in ladders.items())
        rungs.append(Rung(label, ladders, cost, sum(losses[name][ladder[-1]] for name, ladder in ladders.items())))
    return rungs


def _choose(
    frontier: Frontier, limit: int, later: Sequence[Mapping[int, Sequence[int]]], limits: Sequence[int]
) -> int | None:
    """A point that costs at most `limit` and leaves the later rungs inside theirs; None where none of the frontier does.

    It has the least loss where that alone leaves them; else steps down are taken until they are, and what has less loss
    may be passed by.

    later: of each layer by its width, the least bytes at those rungs.
    """

    def size(point: int) -> int:
        held = zip(*(then[bits] for then, bits in zip(later, frontier.widths(point), strict=True)), strict=True)
        over = max((sum(each) - most for each, most in zip(held, limits, strict=True)), default=0)
        return max(int(frontier.cost[point]), limit + over)

    return fit(frontier, limit, size)
