"""One file of named tensors: a strict safetensors reader, and a writer that places every tensor before the first byte.

A file is 8 bytes of little-endian header length, a JSON header padded with spaces, and data. Our files also promise
that data begins on a 4096-byte boundary, that each tensor begins on the boundary it asked for, and that the gaps are
tensors too, `_pad.K`, all zero, so no byte is outside a tensor. Any safetensors library reads them; ours refuses more:
holes, overlaps, offsets out of order, duplicate keys, unknown dtypes, and sizes that do not multiply out.
"""

import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lilliput.artifact import strict_json
from lilliput.core.errors import InputCorrupt, OutOfResource

PAGE = 4096
LINE = 64
HEADER_LIMIT = 100_000_000
"""Bytes of the largest header we read, as in the safetensors library."""
NUMPY: dict[str, npt.DTypeLike] = {
    "BOOL": np.uint8, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "U16": np.uint16, "I16": np.int16, "F16": np.float16, "BF16": np.uint16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64,
}  # fmt: skip
"""What NumPy sees for each dtype of the format: BF16 and the 8-bit floats come as their bits."""

_ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
_MAX_DIMS = 8
_MAX_NAME = 512
_MAX_DIM = 1 << 48
_PAD = "_pad."
_FIX = "The file is damaged or is no safetensors file; copy it again from its source"


@dataclass(frozen=True)
class Slot:
    """Where one tensor stands: bytes begin..end of the data, which starts at the header's `start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def padding(self) -> bool:
        """True for the zeros between tensors."""
        return self.name.startswith(_PAD)


@dataclass(frozen=True)
class Header:
    """A parsed header: `slots` in the order of the data, which starts at byte `start` of the file."""

    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]
    start: int


def read_header(handle: int, size: int, where: str) -> Header:
    """Parse the header of an open file of `size` bytes. Raises InputCorrupt for whatever breaks the format."""
    if size < 8:
        raise InputCorrupt(f"{size} bytes are too few for a header", where, _FIX)
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if length > HEADER_LIMIT or 8 + length > size:
        raise InputCorrupt(f"the header claims {length} bytes in a file of {size}", where, _FIX)
    raw = os.pread(handle, length, 8)
    if len(raw) != length or not raw.startswith(b"{"):
        raise InputCorrupt("the header is cut off or does not begin with '{'", where, _FIX)
    return parse_header(raw, size - 8 - length, where)


def parse_header(raw: bytes, data_bytes: int, where: str) -> Header:
    """Parse the JSON header `raw` of a file with `data_bytes` bytes behind it. Raises InputCorrupt."""
    found = strict_json.parse(raw, where, _FIX)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputCorrupt("__metadata__ is not a map of strings", where, _FIX)
    slots: dict[str, Slot] = {}
    at = 0
    for name, info in found.items():
        slot = _slot(name, info, where)
        if slot.begin != at:
            kind = "leaves a hole" if slot.begin > at else "overlaps the one before it"
            raise InputCorrupt(f"begins at {slot.begin} where {at} is next, so it {kind}", f"{where}: {name}", _FIX)
        slots[name], at = slot, slot.end
    if at != data_bytes:
        what = f"the tensors end at byte {at} of the data but the file has {data_bytes}"
        raise InputCorrupt(what, where, _FIX)
    return Header(slots, metadata, 8 + len(raw))


def _slot(name: str, info: Any, where: str) -> Slot:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise InputCorrupt(f"the tensor name {name[:40]!a} is empty, too long or not printable", where, _FIX)
    where = f"{where}: {name}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputCorrupt("the entry is not exactly dtype, shape and data_offsets", where, _FIX)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY:
        raise InputCorrupt(f"the dtype {ascii(dtype)[:40]} is unknown", where, _FIX)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise InputCorrupt(f"the shape is not a list of at most {_MAX_DIMS} sizes", where, _FIX)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise InputCorrupt("data_offsets is not a pair of byte counts", where, _FIX)
    begin, end = offsets
    need = prod(shape) * _ITEM_BYTES[dtype]  # exact: Python's integers do not wrap
    if end - begin != need:
        raise InputCorrupt(f"{dtype} {shape} needs {need} bytes but has {end - begin}", where, _FIX)
    return Slot(name, dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_DIM


class Container:
    """A safetensors file, mapped read-only. Takes over the descriptor it is given.

    The arrays it hands out keep the mapping alive, so they stay valid after `close`.
    """

    def __init__(self, handle: int, size: int, where: str) -> None:
        """Raises InputCorrupt when the file breaks the format."""
        try:
            self.header = read_header(handle, size, where)
            self._map = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
        except OSError as error:
            raise InputCorrupt(
                f"cannot be read ({error.strerror})", where, "Check the disk, and copy it again"
            ) from error
        finally:
            os.close(handle)
        self.where, self.size = where, size

    @classmethod
    def open(cls, path: str | Path) -> "Container":
        """Open one file by its path."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return cls(handle, os.fstat(handle).st_size, str(path))

    def view(self, name: str) -> npt.NDArray[Any]:
        """Return one tensor as a read-only view of the file, in the dtype that NUMPY gives. Raises KeyError."""
        slot, start = self.header.slots[name], self.header.start
        return self._bytes[start + slot.begin : start + slot.end].view(NUMPY[slot.dtype]).reshape(slot.shape)

    def read_ahead(self, name: str) -> None:
        """Ask the system to read one tensor from disk before it is touched, where the system can."""
        if hasattr(mmap, "MADV_WILLNEED"):
            slot, start = self.header.slots[name], self.header.start
            begin = (start + slot.begin) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, start + slot.end - begin)


@dataclass(frozen=True)
class Planned:
    """A tensor to be placed: it will begin on a multiple of `align` bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    align: int = LINE


@dataclass(frozen=True)
class Layout:
    """Where everything of one file stands. `head`: its first bytes, up to the data; `size`: of the whole file."""

    slots: Mapping[str, Slot]
    head: bytes
    size: int

    @classmethod
    def of(cls, tensors: Iterable[Planned], metadata: Mapping[str, str] | None = None) -> "Layout":
        """Place `tensors` in their order. Raises ValueError for a name given twice or an alignment above a page."""
        slots: dict[str, Slot] = {}
        at = pads = 0
        for tensor in tensors:
            if tensor.name in slots or tensor.name.startswith(_PAD) or PAGE % tensor.align:
                raise ValueError(f"{tensor.name} is named twice or reserved, or aligned to {tensor.align}")
            gap = -at % tensor.align
            if gap:
                slots[f"{_PAD}{pads}"] = Slot(f"{_PAD}{pads}", "U8", (gap,), at, at + gap)
                pads, at = pads + 1, at + gap
            end = at + prod(tensor.shape) * np.dtype(NUMPY[tensor.dtype]).itemsize
            slots[tensor.name] = Slot(tensor.name, tensor.dtype, tensor.shape, at, end)
            at = end
        table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        for slot in slots.values():
            table[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (slot.begin, slot.end)}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return cls(slots, len(text).to_bytes(8, "little") + text, 8 + len(text) + at)


class PlannedFile:
    """A file of a known layout, written in any order and as often as needed: the last write of a tensor stands."""

    def __init__(self, handle: int, layout: Layout, where: str) -> None:
        self._handle, self.layout, self.where = handle, layout, where

    @classmethod
    def create(cls, path: Path, layout: Layout) -> "PlannedFile":
        """Make the file, its whole size reserved on disk and zero. Raises OutOfResource, and then leaves no file."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        file = cls(handle, layout, str(path))
        try:
            file._reserve()
            file._put(layout.head, 0)
        except BaseException:
            file.close()
            path.unlink()
            raise
        return file

    @classmethod
    def reopen(cls, path: Path, layout: Layout) -> "PlannedFile | None":
        """Open a file made by `create` with the same layout; None when it is not there or is another."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        head = os.pread(handle, len(layout.head), 0)
        if head == layout.head and os.fstat(handle).st_size == layout.size:
            return cls(handle, layout, str(path))
        os.close(handle)
        return None

    def write(self, name: str, array: npt.NDArray[Any], row: int = 0) -> None:
        """Write rows of one tensor, from `row` of its first axis on.

        array: (rows, *rest of the tensor's shape), in the dtype NUMPY gives, any memory order.
        Raises OutOfResource when the disk is full; ValueError when the array does not fit the tensor.
        """
        slot = self.layout.slots[name]
        if array.dtype != NUMPY[slot.dtype] or array.shape[1:] != slot.shape[1:] or array.ndim != len(slot.shape):
            raise ValueError(f"{name}: {array.dtype} {array.shape} does not fit {slot.dtype} {slot.shape}")
        if slot.shape and not 0 <= row <= row + len(array) <= slot.shape[0]:
            raise ValueError(f"{name}: rows {row}..{row + len(array)} of {slot.shape[0]}")
        begin = slot.begin + row * (prod(slot.shape[1:]) * array.itemsize)
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, len(self.layout.head) + begin)

    def sync(self) -> None:
        """Return once what was written is on the disk."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise _disk(error, self.where) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _reserve(self) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self._handle, 0, self.layout.size)
                    return
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                        raise
            check_free_space(Path(self.where).parent, self.layout.size)  # where the system cannot reserve, ask
            os.ftruncate(self._handle, self.layout.size)
        except OSError as error:
            raise _disk(error, self.where, self.layout.size) from error

    def _put(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._handle, view[: 1 << 30], at)
            except OSError as error:
                raise _disk(error, self.where) from error
            view, at = view[count:], at + count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OutOfResource unless the disk of `folder` (or of its nearest parent that exists) has `needed` bytes free."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        fix = f"Free {_amount(needed - free)}, or give --out on another disk"
        raise OutOfResource(f"{_amount(needed)} are needed and {_amount(free)} are free", str(folder), fix)


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e3:.1f} kB"


def _disk(error: OSError, where: str, size: int | None = None) -> OSError | OutOfResource:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    need = "" if size is None else f" for a file of {_amount(size)}"
    return OutOfResource(f"the disk is full{need} ({error.strerror})", where, "Free some space and run the same again")
