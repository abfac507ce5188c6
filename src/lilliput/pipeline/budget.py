"""From budgets in bits or bytes, and what every layer loses at every width, to a recipe that names each layer's widths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real

from lilliput.artifact.container import PAGE
from lilliput.artifact.entries import QuantEntry
from lilliput.artifact.plan import Plan, stored_bytes
from lilliput.core.errors import ConfigError
from lilliput.core.recipe import Recipe
from lilliput.methods.base import Quantizer, build_stage
from lilliput.pipeline.allocate import Choice, Frontier, falling, fit, spread
from lilliput.pipeline.plan import Work, entry_of, last_quantizer
from lilliput.pipeline.report import BudgetRow
from lilliput.pipeline.rungs import Stair, climb, labels_of, limit_of, up

POINTS = 13
"""Points of the frontier that a report shows."""


@dataclass(frozen=True)
class Target:
    """The most an artifact may take: `bits` a quantized weight, all its tensors counted, or `size` bytes of tensor files.

    bits: of each width that it serves, ascending; () where `size` is given.
    """

    bits: tuple[float, ...] = ()
    size: int | None = None

    @classmethod
    def of(cls, bits: float | Sequence[float] | None, size: int | None) -> "Target | None":
        """What was asked for, None for neither.

        Raises ConfigError for both, for what is not above zero, for several sizes and for bits that do not ascend.
        """
        if bits is None and size is None:
            return None
        if bits is not None and size is not None:
            what = f"both a target of {_told(bits)} bits and one of {_told(size)} bytes are given"
            raise ConfigError(what, where="target", fix="Give one of the two")
        if bits is None:
            if not _positive(size):
                raise ConfigError(f"the target is {_told(size)}", where="target", fix="Give one size such as 1.1GB")
            return cls((), size)
        every = tuple(bits) if isinstance(bits, Sequence) else (bits,)
        if not every or not all(map(_positive, every)) or list(every) != sorted(set(every)):
            fix = "Give 3.2 bits, 1.1GB, or ascending bits such as 2.8,3.6,4.6"
            raise ConfigError(f"the target is {_told(bits)}", where="target", fix=fix)
        return cls(every, None)

    @property
    def text(self) -> str:
        """As it was given."""
        return f"{', '.join(map(repr, self.bits))} bits" if self.bits else f"{self.size} bytes"


def check_target(work: Work, target: Target) -> None:
    """Raise ConfigError when nothing the recipe may choose is inside the target, naming the smallest that is."""
    options = _options(work)
    if not options:
        what = "a target needs layers to choose widths for, and no stage of the recipe quantizes any"
        raise ConfigError(what, where="target", fix="Use a recipe with a quantizer such as nested")
    if len(target.bits) > 1:
        labels_for(work, target)
        return
    least = {name: min(entries, key=lambda b: stored_bytes(entries[b])) for name, entries in options.items()}
    entries = {name: options[name][bits] for name, bits in least.items()}
    if target.bits:
        (budget,), weights = target.bits, _weights(work)
        smallest = 8 * sum(map(stored_bytes, entries.values()))
        if smallest > budget * weights:
            what = f"{budget:g} bits a weight is below the {up(smallest / weights)} of every layer at its narrowest"
            raise ConfigError(what, where="--target-bits", fix="Give at least that, narrower --bits or larger groups")
    else:
        size = _size(work, entries, _label(work, least))
        if size > (target.size or 0):
            what = f"{target.size:,} bytes is below the {size:,} of every layer at its narrowest"
            raise ConfigError(what, where="--target-size", fix="Give at least that, narrower --bits or larger groups")


def largest(work: Work, target: Target) -> int:
    """The most bytes of tensor files that an artifact inside the target may have."""
    if len(target.bits) > 1:  # all widths are there, so nothing chosen of them has more fields or files
        plan = work.plan
        return _within(target.bits[-1], work, plan.entries, plan.total_bytes())
    options = _options(work)
    most = {name: max(entries, key=lambda b: stored_bytes(entries[b])) for name, entries in options.items()}
    entries = {name: options[name][bits] for name, bits in most.items()}
    whole = _size(work, entries, _label(work, most))
    if target.size is not None:
        return min(whole, target.size)
    return _within(target.bits[0], work, entries, whole)


def _within(bits: float, work: Work, entries: Mapping[str, QuantEntry], whole: int) -> int:
    """The most of `whole` bytes, of an artifact with these entries, when their codes keep to so many bits a weight."""
    coded = sum(map(stored_bytes, entries.values()))
    # Fields begin on pages, and other widths than these may leave other gaps between them.
    gaps = PAGE * sum(len(entry.fields) for entry in entries.values())
    return whole - coded + min(coded, limit_of(bits, _weights(work))) + gaps


def allocate(
    recipe: Recipe, work: Work, target: Target, losses: Mapping[str, Mapping[int, float]]
) -> tuple[Recipe, list[BudgetRow]]:
    """Return the recipe with the width of every layer that is predicted to lose least inside the target; the frontier.

    Of a target with several budgets, the ladder of every layer, and rows only for what was chosen and for one width for
    all. work: what the recipe means, the ladder of every layer being what may be chosen. losses: nats by layer and width.
    """
    options, weights = _options(work), _weights(work)
    smooth = {
        name: dict(zip(entries, falling([losses[name][bits] for bits in entries]), strict=True))
        for name, entries in options.items()
    }
    layers = [
        [Choice(bits, stored_bytes(entry), smooth[name][bits]) for bits, entry in entries.items()]
        for name, entries in options.items()
    ]
    rows = _uniform(work, options, layers)
    if len(target.bits) > 1:
        named, chosen = _nested(recipe, work, target, smooth)
        return named, _by_size(rows + chosen)
    frontier = Frontier(layers)

    def at(point: int) -> tuple[dict[str, int], int]:
        widths = dict(zip(options, frontier.widths(point), strict=True))
        entries = {name: options[name][bits] for name, bits in widths.items()}
        return widths, _size(work, entries, _label(work, widths))

    if target.size is None:
        picked = frontier.best(limit_of(target.bits[0], weights))
    else:
        picked = fit(frontier, target.size, lambda point: at(point)[1])
    assert picked is not None, "seen to before any work"
    for point in sorted({*spread(frontier, POINTS), picked}):
        rows.append(
            BudgetRow(
                bits_per_weight=round(8 * int(frontier.cost[point]) / weights, 4),
                size_bytes=at(point)[1],
                predicted_kl=float(f"{frontier.loss[point]:.4g}"),
                chosen=point == picked,
            )
        )
    widths = at(picked)[0]
    own = {name: (bits,) for name, bits in widths.items()}
    return _named(recipe, own, (_label(work, widths),)), _by_size(rows)


def _nested(
    recipe: Recipe, work: Work, target: Target, losses: Mapping[str, Mapping[int, float]]
) -> tuple[Recipe, list[BudgetRow]]:
    """The recipe with the ladder of every layer, and what each rung is predicted to lose. losses: as `climb` wants them."""
    weights, labels, stairs = _weights(work), labels_for(work, target), _stairs(work)
    rungs = climb(stairs, losses, labels, [limit_of(bits, weights) for bits in target.bits])
    ladders = rungs[-1].ladders
    entries = {n: entry_of(s.shape, replace(s.quantizer, bits=ladders[n])) for n, s in stairs.items()}
    plan = Plan(work.plan.spec, entries, work.plan.floats, labels)
    rows = [
        BudgetRow(
            bits_per_weight=round(8 * rung.cost / weights, 4),
            size_bytes=plan.bytes_at(rung.label),
            predicted_kl=float(f"{rung.loss:.4g}"),
            chosen=True,
            rung=rung.label,
        )
        for rung in rungs
    ]
    return _named(recipe, ladders, labels), rows


def _by_size(rows: Sequence[BudgetRow]) -> list[BudgetRow]:
    return sorted(rows, key=lambda row: (row.size_bytes, row.uniform or 0))


def _uniform(
    work: Work, options: Mapping[str, Mapping[int, QuantEntry]], layers: list[list[Choice]]
) -> list[BudgetRow]:
    """What it would be with one width for all, or the nearest wider one of a layer that does not have it."""
    rows = []
    for bits in _widths(options):
        taken = [next((c for c in choices if c.bits >= bits), choices[-1]) for choices in layers]
        entries = {name: options[name][c.bits] for name, c in zip(options, taken, strict=True)}
        rows.append(
            BudgetRow(
                bits_per_weight=round(8 * sum(c.cost for c in taken) / _weights(work), 4),
                size_bytes=_size(work, entries, bits),
                predicted_kl=float(f"{sum(c.loss for c in taken):.4g}"),
                uniform=bits,
            )
        )
    return rows


def _named(recipe: Recipe, ladders: Mapping[str, Sequence[int]], labels: Sequence[int]) -> Recipe:
    """The recipe with every layer's ladder in the options of the quantizer that solves it, and the widths served."""
    stages, methods = list(recipe.stages), [build_stage(stage) for stage in recipe.stages]
    for index, method in enumerate(methods):
        if isinstance(method, Quantizer):
            later = [m for m in methods[index + 1 :] if isinstance(m, Quantizer)]
            own = {
                name: list(ladder)
                for name, ladder in ladders.items()
                if method.covers(name) and not any(m.covers(name) for m in later)
            }
            if own:
                given = {k: v for k, v in stages[index].options.items() if k != "end_bits"}
                stages[index] = replace(stages[index], options={**given, "bits": list(labels), "layer_bits": own})
    return replace(recipe, stages=tuple(stages))


def _options(work: Work) -> dict[str, dict[int, QuantEntry]]:
    """How every quantized matrix would be stored at each width of its ladder alone."""
    return {
        name: {bits: entry_of(stair.shape, replace(stair.quantizer, bits=(bits,))) for bits in stair.quantizer.bits}
        for name, stair in _stairs(work).items()
    }


def _stairs(work: Work) -> dict[str, Stair]:
    shapes = {name: (entry.out, entry.columns) for name, entry in work.plan.entries.items()}
    return {name: Stair(shapes[name], q) for name, chain in work.methods.items() if (q := last_quantizer(chain))}


def _widths(of: Mapping[str, Iterable[int]]) -> list[int]:
    """Widths that any layer of a block may have."""
    return sorted({bits for name, own in of.items() if name.startswith("layers.") for bits in own})


def labels_for(work: Work, target: Target) -> tuple[int, ...]:
    """The width that each of several budgets is served under. Raises ConfigError as `labels_of` does."""
    stairs = _stairs(work)
    own = {name: stair.quantizer.bits for name, stair in stairs.items()}
    widths = _widths(own) or sorted({bits for ladder in own.values() for bits in ladder})
    return labels_of(list(stairs.values()), widths, target.bits, _weights(work))


def _weights(work: Work) -> int:
    return sum(entry.out * entry.columns for entry in work.plan.entries.values())


def _label(work: Work, widths: Mapping[str, int]) -> int:
    """The width the artifact is said to serve: the mean over all weights, to the nearest."""
    shapes = work.plan.entries
    total = sum(bits * shapes[name].out * shapes[name].columns for name, bits in widths.items())
    return round(total / _weights(work))


def _size(work: Work, entries: Mapping[str, QuantEntry], label: int) -> int:
    return Plan(work.plan.spec, entries, work.plan.floats, (label,)).total_bytes()


def _positive(value: object) -> bool:
    return isinstance(value, Real) and isfinite(value) and float(value) > 0


def _told(value: object) -> str:
    """As it was given, in a few characters."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_told, value))[:80] or "an empty list"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else repr(value)[:80]
