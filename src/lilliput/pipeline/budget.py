"""From a budget in bits or bytes, and what every layer loses at every width, to a recipe that names each layer's width."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lilliput.artifact.container import PAGE
from lilliput.artifact.entries import QuantEntry
from lilliput.artifact.plan import Plan, stored_bytes
from lilliput.core.errors import ConfigError
from lilliput.core.recipe import Recipe
from lilliput.methods.base import Quantizer, build_stage
from lilliput.pipeline.allocate import Choice, Frontier, falling, fit, spread
from lilliput.pipeline.plan import Work, entry_of, last_quantizer
from lilliput.pipeline.report import BudgetRow

POINTS = 13
"""Points of the frontier that a report shows."""


@dataclass(frozen=True)
class Target:
    """The most an artifact may take: `bits` a quantized weight, all its tensors counted, or `size` bytes of tensor files."""

    bits: float | None = None
    size: int | None = None

    @classmethod
    def of(cls, bits: float | None, size: int | None) -> "Target | None":
        """What was asked for, None for neither. Raises ConfigError for both, and for what is not above zero."""
        if bits is None and size is None:
            return None
        if bits is not None and size is not None:
            what = f"both a target of {bits:g} bits and one of {size:,} bytes are given"
            raise ConfigError(what, where="target", fix="Give one of the two")
        value = size if bits is None else bits
        if not value > 0:  # type: ignore[operator]  # so that NaN does not pass
            raise ConfigError(f"the target is {value:g}", where="target", fix="Give 3.2 bits, or 1.1GB")
        return cls(bits, size)

    @property
    def text(self) -> str:
        """As it was given."""
        return f"{self.size} bytes" if self.bits is None else f"{self.bits!r} bits"


def check_target(work: Work, target: Target) -> None:
    """Raise ConfigError when nothing the recipe may choose is inside the target, naming the smallest that is."""
    options = _options(work)
    if not options:
        what = "a target needs layers to choose widths for, and no stage of the recipe quantizes any"
        raise ConfigError(what, where="target", fix="Use a recipe with a quantizer such as nested")
    least = {name: min(entries, key=lambda b: stored_bytes(entries[b])) for name, entries in options.items()}
    entries = {name: options[name][bits] for name, bits in least.items()}
    if target.bits is not None:
        weights = _weights(work)
        smallest = 8 * sum(map(stored_bytes, entries.values()))
        if smallest > target.bits * weights:
            what = (
                f"{target.bits:g} bits a weight is below the {_up(smallest / weights)} of every layer at its narrowest"
            )
            raise ConfigError(what, where="--target-bits", fix="Give at least that, narrower --bits or larger groups")
    else:
        size = _size(work, entries, _label(work, least))
        if size > (target.size or 0):
            what = f"{target.size:,} bytes is below the {size:,} of every layer at its narrowest"
            raise ConfigError(what, where="--target-size", fix="Give at least that, narrower --bits or larger groups")


def largest(work: Work, target: Target) -> int:
    """The most bytes of tensor files that an artifact inside the target may have."""
    options = _options(work)
    most = {name: max(entries, key=lambda b: stored_bytes(entries[b])) for name, entries in options.items()}
    entries = {name: options[name][bits] for name, bits in most.items()}
    whole = _size(work, entries, _label(work, most))
    if target.size is not None:
        return min(whole, target.size)
    coded = sum(map(stored_bytes, entries.values()))
    assert target.bits is not None, "one of the two is given"
    # Fields begin on pages, and other widths than these may leave other gaps between them.
    gaps = PAGE * sum(len(entry.fields) for entry in entries.values())
    return whole - coded + min(coded, int(target.bits * _weights(work) / 8)) + gaps


def allocate(
    recipe: Recipe, work: Work, target: Target, losses: Mapping[str, Mapping[int, float]]
) -> tuple[Recipe, list[BudgetRow]]:
    """Return the recipe with the width of every layer that is predicted to lose least inside the target; the frontier.

    work: what the recipe means, the ladder of every layer being what may be chosen. losses: nats by layer and width.
    """
    options, weights = _options(work), _weights(work)
    layers = []
    for name, entries in options.items():
        smooth = falling([losses[name][bits] for bits in entries])
        layers.append([Choice(b, stored_bytes(e), x) for (b, e), x in zip(entries.items(), smooth, strict=True)])
    frontier = Frontier(layers)

    def at(point: int) -> tuple[dict[str, int], int]:
        widths = dict(zip(options, frontier.widths(point), strict=True))
        entries = {name: options[name][bits] for name, bits in widths.items()}
        return widths, _size(work, entries, _label(work, widths))

    if target.bits is not None:
        chosen = frontier.best(int(target.bits * weights / 8))
    else:
        assert target.size is not None, "one of the two is given"
        chosen = fit(frontier, target.size, lambda point: at(point)[1])
    assert chosen is not None, "seen to before any work"
    rows = []
    for point in sorted({*spread(frontier, POINTS), chosen}):
        rows.append(
            BudgetRow(
                bits_per_weight=round(8 * int(frontier.cost[point]) / weights, 4),
                size_bytes=at(point)[1],
                predicted_kl=float(f"{frontier.loss[point]:.4g}"),
                chosen=point == chosen,
            )
        )
    rows += _uniform(work, options, layers)
    widths = at(chosen)[0]
    return _named(recipe, widths, _label(work, widths)), sorted(rows, key=lambda r: (r.size_bytes, r.uniform or 0))


def _uniform(
    work: Work, options: Mapping[str, Mapping[int, QuantEntry]], layers: list[list[Choice]]
) -> list[BudgetRow]:
    """What it would be with one width for all, or the nearest wider one of a layer that does not have it."""
    rows = []
    for bits in sorted({b for n, entries in options.items() if n.startswith("layers.") for b in entries}):
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


def _named(recipe: Recipe, widths: Mapping[str, int], label: int) -> Recipe:
    """The recipe with every layer's width in the options of the quantizer that solves it, and one width served."""
    stages, methods = list(recipe.stages), [build_stage(stage) for stage in recipe.stages]
    for index, method in enumerate(methods):
        if isinstance(method, Quantizer):
            later = [m for m in methods[index + 1 :] if isinstance(m, Quantizer)]
            own = {n: [b] for n, b in widths.items() if method.covers(n) and not any(m.covers(n) for m in later)}
            if own:
                given = {k: v for k, v in stages[index].options.items() if k != "end_bits"}
                stages[index] = replace(stages[index], options={**given, "bits": [label], "layer_bits": own})
    return replace(recipe, stages=tuple(stages))


def _quantizers(work: Work) -> dict[str, Quantizer]:
    return {name: q for name, chain in work.methods.items() if (q := last_quantizer(chain))}


def _options(work: Work) -> dict[str, dict[int, QuantEntry]]:
    """How every quantized matrix would be stored at each width of its ladder alone."""
    shapes = {name: (entry.out, entry.columns) for name, entry in work.plan.entries.items()}
    return {
        name: {bits: entry_of(shapes[name], replace(q, bits=(bits,))) for bits in q.bits}
        for name, q in _quantizers(work).items()
    }


def _weights(work: Work) -> int:
    return sum(entry.out * entry.columns for entry in work.plan.entries.values())


def _label(work: Work, widths: Mapping[str, int]) -> int:
    """The width the artifact is said to serve: the mean over all weights, to the nearest."""
    shapes = work.plan.entries
    total = sum(bits * shapes[name].out * shapes[name].columns for name, bits in widths.items())
    return round(total / _weights(work))


def _size(work: Work, entries: Mapping[str, QuantEntry], label: int) -> int:
    return Plan(work.plan.spec, entries, work.plan.floats, (label,)).total_bytes()


def _up(bits: float) -> str:
    """Two digits, not below what it was."""
    return f"{-(-bits * 100 // 1) / 100:.2f}"
