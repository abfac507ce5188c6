"""Opens an artifact and hands out read-only views of its tensors, mapped, nothing copied.

Opening checks the manifest against its own digest and every file's presence and size. Each tensor file is opened at
its first use, and then its header is held against the manifest: names, dtypes, shapes, alignment. Contents are not
hashed here; `verify` does that.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lilliput.artifact.container import Container
from lilliput.artifact.entries import OUTLIER_PARTS, QuantEntry
from lilliput.artifact.folder import Folder
from lilliput.artifact.integer import GRAPH_LIMIT, IntegerModel, parse_graph, read_constants
from lilliput.artifact.plan import Plan
from lilliput.artifact.schema import (
    CONSTANTS_FILE,
    FLOAT_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    MANIFEST_LIMIT,
    Manifest,
    load_manifest,
    rung_file,
)
from lilliput.artifact.stored import StoredLinear as StoredLinear
from lilliput.artifact.stored import StoredOutliers
from lilliput.artifact.stored import StoredTensor as StoredTensor
from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing
from lilliput.core.graph import Graph

SCHEDULE_LIMIT = 256 << 20
"""Bytes of the largest file of a learned schedule we read."""

_FIX = "Copy the artifact again from its source, or make it again"


class Artifact:
    """An artifact folder, open for reading."""

    def __init__(self, folder: Folder, manifest: Manifest, plan: Plan, bits: tuple[int, ...], size_bytes: int) -> None:
        self.path, self.manifest, self.plan = folder.path, manifest, plan
        self._folder, self._bits, self._size_bytes = folder, bits, size_bytes
        self._containers: dict[str, Container] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Artifact":
        """Open the artifact at `path`. A copy without its widest rung files opens and serves the narrower widths.

        Raises InputMissing when the folder or a file it needs is not there, InputCorrupt when a file is not what the
        manifest says, Unsupported when a newer lilliput wrote it.
        """
        folder = Folder(Path(path))
        try:
            raw = folder.read(MANIFEST_FILE, MANIFEST_LIMIT)
            manifest = load_manifest(raw, folder.where(MANIFEST_FILE))
            bits, size = _present(folder, manifest)
            artifact = cls(folder, manifest, Plan.of(manifest), bits, size + len(raw))
            artifact._container(FLOAT_FILE)
        except BaseException:
            folder.close()
            raise
        return artifact

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths this copy serves, ascending; empty when nothing is quantized."""
        return self._bits

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the quantized matrices, in the order they were stored."""
        return tuple(self.manifest.entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of this copy."""
        return self._size_bytes

    def bytes_at(self, bits: int | None = None) -> int:
        """Bytes of the tensor files that serving width `bits` opens (None: the widest here). Raises ConfigError."""
        if bits is None and self.manifest.bits:
            bits = self.bits[-1]
        return sum(self.manifest.files[name].size for name in self.plan.files_at(bits))

    def has(self, name: str) -> bool:
        """Whether a tensor, or a quantized matrix, of this name is stored."""
        return name in self.plan.home or name in self.manifest.entries

    def tensor(self, name: str) -> StoredTensor:
        """Return one tensor by its full name. Raises InputMissing when it, or its file, is not there."""
        if name not in self.plan.home:
            raise InputMissing(
                f"there is no tensor {name!r}", str(self.path), "See `entries` and `floats` in manifest.json"
            )
        file, planned = self.plan.home[name]
        return StoredTensor(planned.dtype, planned.shape, self._container(file).view(name))

    def linear(self, name: str, max_bits: int | None = None) -> StoredLinear:
        """Return one quantized matrix, as far as the artifact's width `max_bits` (None: the widest here) needs it.

        No file of a wider width is opened. Raises ConfigError for a width the artifact does not have, InputMissing
        for a name it does not have or a width this copy lacks.
        """
        if name not in self.manifest.entries:
            raise InputMissing(f"{name!r} is not a quantized matrix", str(self.path), "See `entries` in manifest.json")
        entry, max_bits = self.manifest.entries[name], self._served(max_bits)
        count = entry.fields_at(max_bits)
        bits = tuple(own for own in entry.bits if own <= entry.width_at(max_bits))
        grids = {(kind, own) for own in bits for kind in entry.grids(own)}

        def stored(kind: str) -> dict[int, npt.NDArray[Any]]:
            return {own: self.tensor(f"{name}.{kind}.{own}").data for own in bits if (kind, own) in grids}

        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.manifest.floats else None
        return StoredLinear(
            name=name,
            out=entry.out,
            columns=entry.columns,
            group_size=entry.group_size,
            groups=entry.groups,
            bits=bits,
            fields=entry.fields[:count],
            planes=tuple(self.tensor(f"{name}.plane.{index}").data for index in range(count)),
            scale=stored("scale"),
            zero=stored("zero"),
            bias=bias,
            table=stored("table"),
            ratio=stored("ratio"),
            unit=stored("unit"),
            outliers=self._outliers(name, entry),
        )

    def _outliers(self, name: str, entry: QuantEntry) -> StoredOutliers | None:
        if not entry.outliers:
            return None
        return StoredOutliers(*(self.tensor(f"{name}.outlier.{part}").data for part in OUTLIER_PARTS))

    def read_ahead(self, bits: int | None = None) -> None:
        """Ask the system to have in memory soon what a runner reads at `bits` (None: the widest here).

        That is every field, all of the grid and the table of that width, outliers and the float tensors, in the order they are
        used, and no byte of a wider width. Raises as `linear` does.
        """
        names = list(self.manifest.floats)
        for name, entry in self.manifest.entries.items():
            width = entry.width_at(served := self._served(bits))
            names += [f"{name}.plane.{index}" for index in range(entry.fields_at(served))]
            names += [f"{name}.{part}" for part in entry.parts(width)]
        for name in names:
            self._container(self.plan.home[name][0]).read_ahead(name)

    def schedule_tensors(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
        """Return what the stored schedule learned, by name, own memory, and the file's metadata; empty without a file.

        Raises InputCorrupt when the file is not what `files` says or no safetensors file.
        """
        entry = self.manifest.schedule
        if entry is None or entry.file is None:
            return {}, {}
        where = self._folder.where(entry.file)
        raw = self._folder.read(entry.file, SCHEDULE_LIMIT)
        if hashlib.sha256(raw).hexdigest() != self.manifest.files[entry.file].sha256:
            raise InputCorrupt("the contents do not match their SHA-256", where, _FIX)
        container = Container(*self._folder.open(entry.file), where)
        header = container.header
        found = {name: container.view(name).copy() for name, slot in header.slots.items() if not slot.padding}
        return found, dict(header.metadata)

    def dequantize(self, name: str, bits: int | None = None) -> npt.NDArray[np.float32]:
        """Return a matrix or a float tensor in float32: the reference every runner is held against.

        name: a quantized matrix, then (out, columns) at the artifact's width `bits` (None: the widest here); a float
        matrix by the same kind of name; or any float tensor by its full name.
        """
        if name in self.manifest.entries:
            return self.linear(name, bits).dequantize(self._served(bits))
        return self.tensor(name if name in self.manifest.floats else f"{name}.weight").to_float32()

    def graph(self) -> Graph | None:
        """Return the integer graph by itself, None where the artifact has none. Raises InputCorrupt."""
        if self.manifest.integer is None:
            return None
        return parse_graph(self._folder.read(GRAPH_FILE, GRAPH_LIMIT), self._folder.where(GRAPH_FILE))

    def integer(self) -> IntegerModel | None:
        """Return the integer graph with its constants and matrices, None where the artifact has none.

        Raises InputCorrupt for a graph that a runner could not follow, InputMissing when this copy lacks a width.
        """
        manifest, graph = self.manifest, self.graph()
        if graph is None:
            return None
        self._served(manifest.bits[-1])
        handle, size = self._folder.open(CONSTANTS_FILE)
        constants = read_constants(Container(handle, size, self._folder.where(CONSTANTS_FILE)))
        linears = {name: self.linear(name) for name in manifest.entries}
        floats = {name: self.tensor(name) for name in manifest.floats}
        return IntegerModel(manifest.spec, graph, constants, linears, floats)

    def close(self) -> None:
        """Let go of the folder. Views handed out before stay valid."""
        self._containers.clear()
        self._folder.close()

    def _served(self, bits: int | None) -> int:
        if bits is None:
            return self.bits[-1]
        if bits not in self.manifest.bits:
            what = f"{bits} is not one of the widths {list(self.manifest.bits)}"
            raise ConfigError(what, str(self.path), "Ask for one of these, or make an artifact with this width")
        if bits not in self.bits:
            what = f"{rung_file(bits)} is not there, so this copy serves only {list(self.bits)} bits"
            raise InputMissing(what, str(self.path), "Copy that file from the whole artifact into the folder")
        return bits

    def _container(self, file: str) -> Container:
        if file not in self._containers:
            handle, size = self._folder.open(file)
            self._containers[file] = open_tensors(self.plan, file, handle, size, self._folder.where(file))
        return self._containers[file]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_tensors(plan: Plan, file: str, handle: int, size: int, where: str) -> Container:
    """Map one tensor file and hold its header against the plan. Takes over `handle`. Raises InputCorrupt."""
    container = Container(handle, size, where)
    header = container.header
    found = {name: slot for name, slot in header.slots.items() if not slot.padding}
    wanted = {tensor.name: tensor for tensor in plan.tensors[file]}
    if found.keys() != wanted.keys():
        name = sorted(found.keys() ^ wanted.keys())[0]
        what = "is in the manifest but not in the file" if name in wanted else "is in the file but not in the manifest"
        raise InputCorrupt(what, f"{where}: {name}", _FIX)
    for name, slot in found.items():
        planned = wanted[name]
        if (slot.dtype, slot.shape) != (planned.dtype, planned.shape):
            what = f"is {slot.dtype} {slot.shape} where the manifest says {planned.dtype} {planned.shape}"
            raise InputCorrupt(what, f"{where}: {name}", _FIX)
        if (header.start + slot.begin) % planned.align:
            what = f"begins at byte {header.start + slot.begin}, which is not a multiple of {planned.align}"
            raise InputCorrupt(what, f"{where}: {name}", _FIX)
    return container


def _present(folder: Folder, manifest: Manifest) -> tuple[tuple[int, ...], int]:
    """Return the widths whose files are all there, and the bytes of all files that are. Raises InputMissing, InputCorrupt."""
    sizes = {name: folder.size(name) for name in manifest.files}
    bits: tuple[int, ...] = ()
    for b in manifest.bits:
        if sizes[rung_file(b)] is None:
            break
        bits += (b,)
    optional = {rung_file(b) for b in manifest.bits if bits and b > bits[-1]}
    for name, size in sizes.items():
        expected = manifest.files[name].size
        if size is None and name not in optional:
            raise InputMissing("the manifest lists this file but it is not there", folder.where(name), _FIX)
        if size is not None and name in optional:
            gap = rung_file(manifest.bits[len(bits)])
            what = f"{gap} is not there, and {name} is of no use without it"
            raise InputMissing(what, str(folder.path), f"Copy {gap} from the whole artifact, or delete {name}")
        if size is not None and size != expected:
            kind = "cut off" if size < expected else "too long"
            raise InputCorrupt(f"{size} bytes instead of {expected}: the file is {kind}", folder.where(name), _FIX)
    return bits, sum(size for size in sizes.values() if size is not None)
