"""Where the tensors of a model stand in the files of its checkpoint: the spellings and layouts of an architecture."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from lilliput.core.errors import InputCorrupt, InputMissing, Unsupported
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec
from lilliput.models.architecture import Architecture, Key, Source, modules
from lilliput.models.encoder_architecture import EncoderArchitecture, encoder_modules

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """dtype as safetensors spells it ("F32", "F16", "BF16"); shape in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.size * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Origin:
    """Where a canonical tensor comes from: stored tensors, and the rows of them that are ours.

    Row r of the canonical tensor is row `start + (r // run) * step + r % run` of the stored one.
    """

    stored: tuple[str, ...]
    info: TensorInfo
    start: int = 0
    run: int = 0
    step: int = 0
    flat: bool = False
    """The stored tensor has more axes, of which those behind the first are one here."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    file: str
    info: TensorInfo


def origins_of(
    arch: Architecture | EncoderArchitecture,
    spec: AnySpec,
    config: dict[str, Any],
    stored: dict[str, Stored],
    where: str,
) -> dict[str, Origin]:
    """Return where each canonical tensor comes from. Raises InputMissing or InputCorrupt for what does not fit."""
    found: dict[str, Origin] = {}
    missing: list[str] = []
    for name, shape in modules_of(spec):
        layer, template = _template(name)
        source = arch.modules[template]
        names = _candidates(arch, source, layer)
        bias = source.bias.of(config) if isinstance(source.bias, Key) else source.bias
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            if kind == "bias" and not bias:
                continue
            heads = range(shape[0]) if "{h}" in names[0] else None
            spelled = [(n,) for n in names] if source.bare else [_spell(n, kind, heads) for n in names]
            there = next((s for s in spelled if all(part in stored for part in s)), None)
            if there is None:
                missing.append(next(part for part in spelled[0] if part not in stored))
            else:
                found[f"{name}.{kind}"] = _origin(there, stored, size, template, source, spec, where)
    if missing:
        fix = "Download the checkpoint again, or check that config.json belongs to it"
        raise InputMissing(f"the weight files lack {some(missing)}", where=where, fix=fix)
    return found


def _origin(
    there: tuple[str, ...],
    stored: dict[str, Stored],
    shape: tuple[int, ...],
    template: str,
    source: Source,
    spec: AnySpec,
    where: str,
) -> Origin:
    """Return the origin of one tensor of `shape`, after checking the stored shape and dtype."""
    start = run = step = 0
    expected = shape[1:] if "{h}" in source.names[0] else shape
    if source.fused:
        sizes = {n.rsplit(".", 1)[1]: s[0] for n, s in spec.linears(0).items()}
        own = source.fused.index(template.rsplit(".", 1)[1])
        # "heads" lays out one head of each part in turn, so there a part's run is a head and the step all parts' heads
        runs = [sizes[part] if source.layout == "rows" else spec.head_dim for part in source.fused]
        start, run, step = sum(runs[:own]), runs[own], sum(runs)
        expected = (sum(sizes[part] for part in source.fused), *shape[1:])
    for name in there:
        info, file = stored[name].info, stored[name].file
        if (info.shape[0], prod(info.shape[1:])) != expected if source.flat else info.shape != expected:
            what = f"{name} has shape {info.shape} where config.json implies {expected}"
            raise InputCorrupt(what, where=f"{where}/{file}", fix="Check that config.json belongs to these weights")
        if info.dtype not in DTYPE_BYTES:
            what = f"{name} is stored as {info.dtype}"
            raise Unsupported(what, where=f"{where}/{file}", fix=f"Only {', '.join(DTYPE_BYTES)} weights are served")
    return Origin(there, TensorInfo(stored[there[0]].info.dtype, shape), start, run, step, source.flat)


def no_leftovers(
    arch: Architecture | EncoderArchitecture,
    spec: AnySpec,
    origins: dict[str, Origin],
    stored: dict[str, Stored],
    where: str,
) -> None:
    """Raise Unsupported where the files hold tensors that the architecture does not account for."""
    used = {name for origin in origins.values() for name in origin.stored}
    if isinstance(arch, Architecture) and isinstance(spec, ModelSpec) and spec.tied_head:
        used |= set(heads_of(arch))
    left = [name for name in stored if name not in used and not arch.skips(name)]
    if left:
        what = f"the weight files hold {some(left)}, which {spec.family} as config.json describes it has no place for"
        raise Unsupported(what, where=where, fix="Check that config.json belongs to these weights")


def heads_of(arch: Architecture) -> list[str]:
    """Return all names the head's matrix may have."""
    return [f"{name}.weight" for name in _candidates(arch, arch.modules["lm_head"], 0)]


def _candidates(arch: Architecture | EncoderArchitecture, source: Source, layer: int) -> list[str]:
    """Return all names a source may have in a checkpoint, `{h}` left standing."""
    made = [n.replace("{p}", p).replace("{i}", str(layer)) for p in arch.prefixes for n in source.names]
    return list(dict.fromkeys(made))


def modules_of(spec: AnySpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the canonical modules that a spec has and the shape of each one's weight, in order of use."""
    return encoder_modules(spec) if isinstance(spec, EncoderSpec) else modules(spec)


def _template(name: str) -> tuple[int, str]:
    """Split a canonical module name into its layer and the name with `{i}`."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, rest = name.split(".", 2)
    return int(layer), "layers.{i}." + rest


def _spell(name: str, kind: str, heads: range | None) -> tuple[str, ...]:
    full = f"{name}.{kind}"
    return (full,) if heads is None else tuple(full.replace("{h}", str(h)) for h in heads)


def some(names: list[str]) -> str:
    """The first three of these names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
