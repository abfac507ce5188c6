"""Which tensor stands in which file, known before the first weight is read: sizes for the user, offsets for the writer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from lilliput.artifact.consistency import inconsistencies
from lilliput.artifact.container import PAGE, Layout, Planned, Slot
from lilliput.artifact.entries import OUTLIER_PARTS, FloatEntry, QuantEntry
from lilliput.artifact.schema import FLOAT_FILE, Manifest, rung_file
from lilliput.core.errors import ConfigError
from lilliput.core.spec import AnySpec
from lilliput.numerics.packing import ROWS, field_shape, padded

_METADATA = {"format": "lilliput"}


@dataclass(frozen=True)
class Plan:
    """The tensors of an artifact and the file and offset of each. Raises ConfigError when they do not add up.

    entries: quantized matrices by module name. floats: float tensors by full name. Both in the order they are stored.
    bits: widths the artifact serves. A matrix may have a ladder of its own; at the artifact's width b it runs at its
    narrowest width of at least b, or else its widest, and its fields stand in the file of the first b that needs them.
    """

    spec: AnySpec
    entries: Mapping[str, QuantEntry]
    floats: Mapping[str, FloatEntry]
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        for problem in inconsistencies(self.spec, self.entries, self.floats, self.bits):
            raise ConfigError(problem, "artifact", "Change the recipe's widths, or report this if it did not set them")

    @classmethod
    def of(cls, manifest: Manifest) -> "Plan":
        """Return the plan that `manifest` implies."""
        return cls(manifest.spec, manifest.entries, manifest.floats, manifest.bits)

    @cached_property
    def tensors(self) -> dict[str, list[Planned]]:
        """Tensors of each file, in order; files in the order a reader needs them."""
        files: dict[str, list[Planned]] = {name: [] for name in (FLOAT_FILE, *map(rung_file, self.bits))}
        files[FLOAT_FILE] += [Planned(name, entry.dtype, entry.shape) for name, entry in self.floats.items()]
        for name, entry in self.entries.items():
            rung = {own: next(b for b in self.bits if entry.width_at(b) >= own) for own in entry.bits}
            for own, tensor in pieces(name, entry):
                files[rung_file(rung[own])].append(tensor)
        if any(entry.shared or entry.grid_bits == 8 for entry in self.entries.values()):
            # Ratios and units between two fields would cost the rest of a page.
            for bits in self.bits:
                files[rung_file(bits)].sort(key=lambda tensor: -tensor.align)
        return files

    @cached_property
    def home(self) -> dict[str, tuple[str, Planned]]:
        """File and plan of every tensor by its name."""
        return {tensor.name: (file, tensor) for file, tensors in self.tensors.items() for tensor in tensors}

    @cached_property
    def files(self) -> dict[str, Layout]:
        """Layout of every tensor file."""
        return {file: Layout.of(tensors, _METADATA) for file, tensors in self.tensors.items()}

    def total_bytes(self) -> int:
        """Bytes of all tensor files together."""
        return sum(layout.size for layout in self.files.values())

    def bytes_at(self, bits: int | None = None) -> int:
        """Bytes of the tensor files a copy needs to serve width `bits` (None: the widest) and the narrower ones."""
        return sum(self.files[name].size for name in self.files_at(bits))

    def files_at(self, bits: int | None = None) -> list[str]:
        """Tensor files a copy needs to serve width `bits` (None: the widest). Raises ConfigError for another width."""
        if bits is not None and bits not in self.bits:
            raise ConfigError(f"{bits} is not one of the widths {list(self.bits)}", "bits", "Ask for one of these")
        return [FLOAT_FILE, *(rung_file(b) for b in self.bits if bits is None or b <= bits)]

    def bits_per_weight(self, bits: int) -> float:
        """Bits read for one quantized weight at width `bits`: fields with their padding and all that stands beside them."""
        self.files_at(bits)
        read = weights = 0
        for name, entry in self.entries.items():
            width = entry.width_at(bits)
            wanted = [f"{name}.plane.{index}" for index in range(entry.fields_at(bits))]
            wanted += [f"{name}.{part}" for part in entry.parts(width)]
            read += sum(_bytes(self.slot(tensor)) for tensor in wanted)
            weights += entry.out * entry.columns
        return 8 * read / weights

    def slot(self, name: str) -> Slot:
        """Where one tensor stands in its file. Raises KeyError."""
        return self.files[self.home[name][0]].slots[name]

    def index_json(self) -> bytes:
        """Return the bytes of model.safetensors.index.json."""
        weight_map = {name: file for name, (file, _) in sorted(self.home.items())}
        data: dict[str, Any] = {"metadata": {"total_size": sum(_bytes(self.slot(name)) for name in weight_map)}}
        return (json.dumps(data | {"weight_map": weight_map}, indent=2) + "\n").encode()


def pieces(name: str, entry: QuantEntry) -> Iterator[tuple[int, Planned]]:
    """Yield the tensors of one quantized matrix in order, each with the narrowest width of its ladder that reads it."""
    tiles = padded(entry.out, ROWS) // ROWS
    below = 0
    for index, width in enumerate(entry.fields):
        below += width
        needed = next(own for own in entry.bits if own >= below)
        shape = field_shape(entry.out, entry.columns, width)
        yield needed, Planned(f"{name}.plane.{index}", "U8", shape, PAGE)
        if below in entry.bits:
            for kind in entry.grids(below):
                small = {"scale": "U8", "zero": "I8"}.get(kind) if entry.grid_bits == 8 else None
                grid = Planned(f"{name}.{kind}.{below}", small or "F16", (tiles, entry.groups, ROWS))
                if kind == "table":
                    grid = Planned(f"{name}.{kind}.{below}", "U8", (tiles, ROWS, 1 << below))
                elif kind in ("ratio", "unit"):
                    grid = Planned(f"{name}.{kind}.{below}", "U8", (tiles, ROWS))
                yield below, grid
    if entry.outliers:
        shapes = {"counts": ("U16", entry.out), "columns": ("U16", entry.outliers), "values": ("F16", entry.outliers)}
        for part in OUTLIER_PARTS:
            dtype, size = shapes[part]
            yield entry.bits[0], Planned(f"{name}.outlier.{part}", dtype, (size,))


def stored_bytes(entry: QuantEntry, width: int | None = None) -> int:
    """Bytes of the tensors of one quantized matrix: fields with their padding and all that stands beside them.

    width: of its ladder; only what a copy that serves it and the narrower ones holds. None for the widest.
    """
    size, most = {"U8": 1, "I8": 1, "F16": 2, "U16": 2}, width or entry.bits[-1]
    return sum(size[tensor.dtype] * prod(tensor.shape) for own, tensor in pieces("", entry) if own <= most)


def _bytes(slot: Slot) -> int:
    return slot.end - slot.begin
