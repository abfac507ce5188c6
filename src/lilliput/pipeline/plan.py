"""From a recipe and a checkpoint to everything known before the first weight is read: layers, sizes, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain as joined
from itertools import groupby

from torch import Tensor

from lilliput.artifact.entries import FloatEntry, QuantEntry
from lilliput.artifact.plan import Plan
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.core.recipe import Recipe
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec
from lilliput.methods.base import (
    BlockMethod,
    BlockQuantizer,
    IntegerMethod,
    LayerMethod,
    Method,
    ModelMethod,
    Quantizer,
    Statistic,
    Tuner,
    build_stage,
)
from lilliput.models import Checkpoint, TensorInfo
from lilliput.models.sites import refuse_pictures
from lilliput.numerics.grids import group_count, in_bytes
from lilliput.numerics.nested import Quantized
from lilliput.numerics.packing import serving_width
from lilliput.pipeline.report import LayerPlan

INTERPRETER_BYTES = 600 << 20
"""Python with torch loaded and the engine's buffers, before any weight; see docs/log.md."""
COPIES = 6
"""Float32 copies of a block alive at the worst moment: itself, its codes and the temporaries of a solve."""


@dataclass(frozen=True)
class Work:
    """What is to be done.

    runs: the recipe's methods, neighbours of one kind together; the last run is of those of a sweep, maybe empty.

    blocks, methods: for the last run, what changes every block, and every layer's methods with its own widths.
    tuners: what comes after it. maker: what makes an integer model instead; the last run is empty then. plan: the
    artifact to be. tensors: of the model that the last run meets, by full name.
    """

    runs: list[list[Method]]
    blocks: Sequence[BlockMethod]
    methods: Mapping[str, Sequence[LayerMethod]]
    tuners: Sequence[Tuner]
    maker: IntegerMethod | None
    plan: Plan
    tensors: Mapping[str, TensorInfo]
    layers: list[LayerPlan]
    needs_calibration: bool

    @property
    def parameters(self) -> int:
        """Weights of the model that the last run meets, those of an untied head among them."""
        return sum(info.size for info in self.tensors.values())

    @property
    def sensitive(self) -> bool:
        """Whether a method needs the sensitivity of every weight, which takes the whole model in memory."""
        return any(isinstance(m, LayerMethod) and m.needs is Statistic.FISHER for m in joined.from_iterable(self.runs))


def plan_work(checkpoint: Checkpoint, recipe: Recipe) -> Work:
    """Decide what happens to every tensor.

    Raises ConfigError for what cannot be, naming the layer, and Unsupported for a model that a method cannot treat.
    """
    runs = [list(group) for _, group in groupby(map(build_stage, recipe.stages), _kind)]
    tuners = [m for m in runs.pop() if isinstance(m, Tuner)] if _kind(runs[-1][0]) is Tuner else []
    for early in (m for run in runs for m in run if isinstance(m, Tuner)):
        raise ConfigError(f"{early.name} is not the last stage", f"recipe {recipe.name}", "Put it at the end")
    maker = take_maker(runs, recipe.name)
    if maker and tuners:
        what = f"{tuners[0].name} would change the codes that {maker.name} has made a graph of"
        raise ConfigError(what, f"recipe {recipe.name}", f"Leave {tuners[0].name} out")
    if isinstance(checkpoint.spec, EncoderSpec):
        for method in (*tuners, *joined.from_iterable(runs)):
            sensitive = isinstance(method, LayerMethod) and method.needs is Statistic.FISHER
            if not sensitive and not isinstance(method, ModelMethod | Tuner):
                continue
            what = f"{method.name} learns from predicting tokens, which a {checkpoint.family} encoder does not do"
            raise Unsupported(what, where=f"recipe {recipe.name}", fix="Use methods of layers and blocks")
        if maker and (other := next(joined.from_iterable(runs), None)):
            what = (
                f"{other.name} stands before {maker.name}, which makes an encoder's integer model from its checkpoint"
            )
            raise Unsupported(what, where=f"recipe {recipe.name}", fix=f"Leave {other.name} out")
        if maker:
            refuse_pictures(checkpoint.spec)
        if maker and checkpoint.spec.projection is not None:
            what = "an encoder's last projection is stored in float, and an integer model has none such"
            raise Unsupported(what, where=checkpoint.family, fix="Use methods of layers and blocks")
    if not runs or (runs[-1] and _kind(runs[-1][0]) is ModelMethod):
        runs.append([])
    blocks, final = in_sweep(runs[-1])
    if maker:
        final = [WholeRows(bits=(maker.bits,), end_bits=(maker.end_bits,), group_size=-1, maker=maker.name)]
    for layer_method in final if blocks else ():
        if layer_method.needs is Statistic.FISHER:
            what = f"{layer_method.name} needs the sensitivity of weights that {blocks[-1].name} changes before it"
            raise ConfigError(what, where=f"recipe {recipe.name}", fix="Leave one of the two out")
    if tuners and not any(isinstance(m, Quantizer) for m in final):
        what = f"{tuners[0].name} improves codes, and no stage before it makes any"
        raise ConfigError(what, where=f"recipe {recipe.name}", fix="Put a quantizer such as rtn before it")
    spec: AnySpec = checkpoint.spec
    tensors: Mapping[str, TensorInfo] = {name: checkpoint.info(name) for name in checkpoint.names()}
    for changer in (m for run in runs for m in run if isinstance(m, ModelMethod)):
        assert isinstance(spec, ModelSpec), "refused for encoders"
        spec, tensors = changer.respec(spec, tensors)
    matrices = spec.matrices()
    wide = assign(final, matrices)
    ladders = [quantizer.bits for methods in wide.values() if (quantizer := last_quantizer(methods))]
    blocks_only = [name for name in matrices if name.startswith("layers.")]
    inner = [m.bits for m in final if isinstance(m, Quantizer) and any(map(m.covers, blocks_only))]
    widths = tuple(sorted({b for ladder in inner or ladders for b in ladder}))
    methods = {name: narrow(chain, widths) for name, chain in wide.items()}
    entries, floats = {}, {}
    for name, (out, columns) in matrices.items():
        if quantizer := last_quantizer(methods.get(name, ())):
            entries[name] = entry_of((out, columns), quantizer)
    for name, info in tensors.items():
        if name.removesuffix(".weight") not in entries:
            floats[name] = FloatEntry(dtype=info.dtype if len(info.shape) > 1 else "F32", shape=info.shape)
    layers = [describe(name, shape, methods.get(name, ()), tensors) for name, shape in matrices.items()]
    stages = (*joined.from_iterable(runs), *tuners, *((maker,) if maker else ()))
    needs = any(m.reads_text for m in stages)
    return Work(runs, blocks, methods, tuners, maker, Plan(spec, entries, floats, widths), tensors, layers, needs)


@dataclass(frozen=True, kw_only=True)
class WholeRows(Quantizer):
    """How an IntegerMethod's codes are stored: stands in a plan for it. maker: its name."""

    maker: str

    @property
    def name(self) -> str:
        """That of the method."""
        return self.maker

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Never asked: the method makes the codes of all matrices together."""
        raise AssertionError("an IntegerMethod makes the codes")


def take_maker(runs: list[list[Method]], recipe: str) -> IntegerMethod | None:
    """Take the IntegerMethod off the end of `runs`, if one is there, and leave an empty last run.

    Raises ConfigError where it is not the last stage or not the only one that makes codes.
    """
    makers = [m for run in runs for m in run if isinstance(m, IntegerMethod)]
    if not makers:
        return None
    maker = makers[0]
    if not runs or runs[-1] != [maker]:
        what = f"{maker.name} makes the whole integer model and is not the last stage, or not alone there"
        raise ConfigError(what, f"recipe {recipe}", "Put it at the end, with nothing behind it")
    runs[-1] = []
    for other in joined.from_iterable(runs):
        if isinstance(other, Quantizer):
            what = f"{other.name} makes codes, and {maker.name} makes its own"
            raise ConfigError(what, f"recipe {recipe}", f"Leave {other.name} out")
    return maker


def entry_of(shape: tuple[int, int], quantizer: Quantizer) -> QuantEntry:
    """How a matrix of that shape, (out, in), is stored when that quantizer has solved it."""
    return QuantEntry(
        out=shape[0],
        columns=shape[1],
        bits=quantizer.bits,
        group_size=quantizer.group_size,
        sym=quantizer.sym,
        tables=quantizer.tables,
        shared=quantizer.shared and len(quantizer.bits) > 1,
        grid_bits=8 if in_bytes(group_count(shape[1], quantizer.group_size)) else 16,
        outliers=quantizer.kept(*shape),
    )


def _kind(method: Method) -> type[Method]:
    return next((kind for kind in (ModelMethod, Tuner, IntegerMethod) if isinstance(method, kind)), LayerMethod)


def in_sweep(run: Sequence[Method]) -> tuple[list[BlockMethod], list[LayerMethod]]:
    """What one sweep does to every block and then to its layers. Raises ConfigError for another order."""
    blocks = [m for m in run if isinstance(m, BlockMethod)]
    for method in run[: run.index(blocks[-1])] if blocks else ():
        if isinstance(method, LayerMethod):
            what = f"{blocks[-1].name} changes whole blocks, and comes after {method.name}, which treats their layers"
            raise ConfigError(what, where="recipe", fix=f"Put {blocks[-1].name} first")
    return blocks, [m for m in run if isinstance(m, LayerMethod)]


def assign(methods: Sequence[LayerMethod], matrices: Mapping[str, tuple[int, int]]) -> dict[str, Sequence[LayerMethod]]:
    """The methods of each layer that any covers, in order, each as it is at that layer."""
    found: dict[str, Sequence[LayerMethod]] = {}
    for name, (out, columns) in matrices.items():
        chain = [method.at(name) for method in methods if method.covers(name)]
        for index, method in enumerate(chain):
            method.check(name, out, columns)
            if isinstance(method, Quantizer) and index + 1 < len(chain):
                what = f"{method.name} is followed by {chain[index + 1].name}"
                raise ConfigError(what, where=name, fix="Quantize last, or exclude this layer from one of them")
        if len({method.needs for method in chain if method.needs.streamed}) > 1 and name == "lm_head":
            what = "its methods want different statistics"
            raise ConfigError(what, where=name, fix="Exclude lm_head from one of them")
        if chain:
            found[name] = chain
    return found


def last_quantizer(chain: Sequence[LayerMethod]) -> Quantizer | None:
    """The Quantizer that ends a layer's methods, if one does."""
    return chain[-1] if chain and isinstance(chain[-1], Quantizer) else None


def narrow(chain: Sequence[LayerMethod], widths: tuple[int, ...]) -> Sequence[LayerMethod]:
    """Drop from a layer's own widths those that no width of the artifact would use."""
    quantizer = last_quantizer(chain)
    if quantizer is None:
        return chain
    used = tuple(sorted({serving_width(quantizer.bits, b) for b in widths}))
    return [*chain[:-1], replace(quantizer, bits=used)]


def describe(
    name: str, shape: tuple[int, int], chain: Sequence[LayerMethod], tensors: Mapping[str, TensorInfo]
) -> LayerPlan:
    """One line of the plan."""
    if not chain:
        dtype = tensors[f"{name}.weight"].dtype
        return LayerPlan(name=name, shape=shape, method=f"- stays {dtype}, no stage covers it")
    method = "+".join(m.name for m in chain)
    quantizer = last_quantizer(chain)
    return LayerPlan(name=name, shape=shape, method=method, bits=quantizer.bits if quantizer else ())


@dataclass(frozen=True)
class Budget:
    """slice_rows: rows of a tall matrix solved at a time; batch: calibration rows run at a time; ram_bytes: expected peak."""

    slice_rows: int
    batch: int
    ram_bytes: int


def budget(work: Work, *, max_ram: int | None, length: int, whole: bool) -> Budget:
    """Choose slices that fit `max_ram` bytes (None: no limit) and say what peak to expect.

    length: tokens of a calibration row. whole: the recipe has a method that needs all of the model in memory.
    Raises OutOfResource when even the smallest slices do not fit, or a Tuner does not.
    """
    spec = work.plan.spec
    block = 4 * sum(out * columns for out, columns in spec.linears(0).values())
    raw = {"F32": 4, "F16": 2, "BF16": 2}[work.tensors[f"{spec.entrance}.weight"].dtype]
    out, columns = spec.matrices()[spec.entrance]
    ends = out * columns * (raw + 2)
    gram = sum(4 * columns**2 for _, columns in spec.linears(0).values()) if work.needs_calibration else 0
    row = 4 * length * (6 * spec.hidden_size + 3 * spec.intermediate_size + spec.num_heads * length)
    fixed = INTERPRETER_BYTES + (4 * work.parameters if whole or work.sensitive else 0)
    if work.sensitive:  # the sums beside the model, and one row through all of it with what its gradient needs
        fixed += 4 * work.parameters + spec.num_layers * row + 3 * 4 * length * out

    first = {name: work.plan.entries[name] for name in spec.linears(0) if name in work.plan.entries}
    trained = {q for name in first for q in work.methods[name] if isinstance(q, BlockQuantizer)}

    def peak(slice_rows: int, batch: int) -> int:
        ends_now = ends + 8 * 4 * min(slice_rows, out) * columns
        solving = max(COPIES * block + gram, ends_now) + batch * row
        sizes = {"weights": block // 4, "grids": grids(first), "row": row, "rows": batch}
        return fixed + max([solving, *(block + q.held_bytes(**sizes) for q in trained)])

    # Training with its logits, the target's, and those that the divergence makes of them.
    tuning = tuning_bytes(work, spec.num_layers * row + 6 * 4 * length * out) if work.tuners else 0
    if max_ram is not None and tuning > max_ram:
        names = " and ".join(tuner.name for tuner in work.tuners)
        what = f"{names} on the whole model needs about {tuning / 2**30:.2f} GiB, more than --max-ram {max_ram / 2**30:.2f} GiB"
        fix = "Give more, shorten the calibration rows, or leave that stage out"
        raise OutOfResource(what, where="memory", fix=fix)

    for slice_rows, batch in ((1 << 15, 8), (1 << 13, 4), (1 << 11, 1), (1 << 9, 1)):
        expected = max(peak(slice_rows, batch), tuning)
        if max_ram is None or expected <= max_ram:
            return Budget(slice_rows, batch, expected)
    what = f"one block at a time needs about {expected / 2**30:.2f} GiB, more than --max-ram {max_ram / 2**30:.2f} GiB"  # type: ignore[operator]
    raise OutOfResource(what, where="memory", fix="Give more, shorten the calibration rows, or use a smaller model")


def tuning_bytes(work: Work, row: int) -> int:
    """Peak while the Tuners of a recipe run. row: bytes of one row in training, through the whole model."""
    copies = 3 + bool(work.runs[:-1])  # the original, what the last sweep reads, the Tuner's own; the stages' before
    entries = work.plan.entries
    coded, count = sum(entry.out * entry.columns for entry in entries.values()), grids(entries)
    held = max(t.held_bytes(weights=coded, grids=count, row=row, rows=1) for t in work.tuners)
    return INTERPRETER_BYTES + 4 * copies * work.parameters + coded + 2 * count + held


def grids(entries: Mapping[str, QuantEntry]) -> int:
    """Scales and zeros of all widths, ratios and units."""
    return sum(
        entry.out * (entry.groups if kind in ("scale", "zero") else kind != "table")
        for entry in entries.values()
        for width in entry.bits
        for kind in entry.grids(width)
    )
