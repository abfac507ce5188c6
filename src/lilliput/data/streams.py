"""Documents to token windows: in order for measuring, seeded and shuffled for calibration and training.

The order of a seeded stream is a published rule, not whatever a library's generator does this year: item i of n comes
at the place its key takes among all keys, key = sha256("lilliput.order", seed, i). The same seed and text give the
same batches on every machine and with every version of NumPy.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lilliput.core.errors import ConfigError, InputCorrupt
from lilliput.core.spec import PADDING

I32 = npt.NDArray[np.int32]


class Encoder(Protocol):
    """The part of `Tokenizer` used here."""

    @property
    def bos_id(self) -> int | None: ...
    def encode(self, text: str, *, bos: bool = True) -> list[int]: ...


def order(count: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..count-1, (count,) int64, fixed for all time by `count` and `seed`."""
    head = b"lilliput.order" + int(seed).to_bytes(16, "little", signed=True)
    keys = [hashlib.sha256(head + i.to_bytes(8, "little")).digest() for i in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)


def windows(
    documents: Iterable[str], tokenizer: Encoder, *, length: int, join: bool = False, limit: int | None = None
) -> list[I32]:
    """Cut documents into windows for measuring, in order, without overlap.

    length: tokens of a window at most, its BOS counted; join: the documents end to end as one, without a BOS between
    them, otherwise each document alone; limit: windows at most, the first ones.
    Returns arrays of (2..length,) int32, each starting with BOS where the model has one. A window predicts all its
    tokens but the first, so with a BOS every token of the text is predicted once; without one, each window's first
    token only gives context. Short tails are kept; windows of fewer than 2 tokens have nothing to predict.
    Raises ConfigError for a length below 2 or a limit below 1, InputCorrupt where nothing is left to measure.
    """
    if length < 2:
        raise ConfigError(
            f"length is {length}", where="windows", fix="Give at least 2 tokens: one to see, one to guess"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}", where="windows", fix="Give 1 or more, or none for all")
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = length - len(front)
    found: list[I32] = []
    texts = (_plain(tokenizer, text) for text in documents)
    for ids in [[i for text in texts for i in text]] if join else texts:
        for start in range(0, len(ids), step):
            window = front + ids[start : start + step]
            if len(window) >= 2:
                found.append(np.array(window, dtype=np.int32))
            if limit is not None and len(found) == limit:
                return found
    if not found:
        raise InputCorrupt("no two tokens to measure on", where="evaluation text", fix="Give more text")
    return found


def batches(
    documents: Iterable[str],
    tokenizer: Encoder,
    *,
    length: int,
    samples: int,
    batch_size: int = 1,
    join: bool = True,
    bos: bool = False,
    seed: int = 0,
) -> "Batches":
    """Draw `samples` rows of `length` tokens for calibration or training.

    join True: the documents, each with its BOS in front, are shuffled, laid end to end and cut into rows; the rows are
    shuffled and the first `samples` taken. join False: each row comes from one document and starts with its BOS;
    documents are cut as `windows` does and only full rows are drawn. bos: put a BOS in the place of every row's first
    token, where the model has one: the first position often has values of its own, which fixed ranges must hold.
    Raises ConfigError for sizes below 1 and where the text is too short for what is asked.
    """
    for name, value in (("length", length), ("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}", where="calibration", fix="Give 1 or more")
    if join:
        texts = list(documents)
        ids = [i for at in order(len(texts), seed) for i in tokenizer.encode(texts[at])]
        total, rows = len(ids), len(ids) // length
        table = np.array(ids[: rows * length], dtype=np.int32).reshape(rows, length)
    else:
        cut = windows(documents, tokenizer, length=max(length, 2))
        full = [w for w in cut if len(w) == length]
        total, rows = sum(map(len, full)), len(full)
        table = np.array(full, dtype=np.int32).reshape(rows, length)
    if rows < samples:
        kept = "" if join else f" in documents of {length} or more"
        what = f"{total} tokens{kept} are fewer than the {samples} x {length} asked for"
        raise ConfigError(what, where="calibration text", fix="Give more text or lower --samples")
    drawn = table[order(rows, seed)[:samples]]
    if bos and tokenizer.bos_id is not None:
        drawn[:, 0] = tokenizer.bos_id
    return Batches(drawn, batch_size)


class Wholes(Protocol):
    """The part of `Tokenizer` that `sentences` uses."""

    def whole(self, text: str, limit: int) -> list[int]: ...


def sentences(
    documents: Iterable[str], tokenizer: Wholes, *, length: int, samples: int, batch_size: int = 1, seed: int = 0
) -> "Batches":
    """Draw `samples` rows for an encoder: each one line of a document, with the tokens the model has around a text.

    Lines are cut to `length` tokens; shorter ones have PADDING behind them, up to the longest drawn.
    Raises ConfigError where there are fewer lines.
    """
    lines = [line for text in documents for line in text.splitlines() if line.strip()]
    if len(lines) < samples:
        what = f"{len(lines)} lines are fewer than the {samples} asked for"
        raise ConfigError(what, where="calibration text", fix="Give more text or lower --samples")
    chosen = [lines[at] for at in order(len(lines), seed)[:samples]]
    return Batches(padded([tokenizer.whole(line, length) for line in chosen]).astype(np.int32), batch_size)


def padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Return (rows, length of the longest) int64, PADDING behind the shorter ones."""
    table = np.full((len(rows), max(map(len, rows), default=0)), PADDING, dtype=np.int64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return table


class Batches:
    """Rows of tokens in batches; iterate as often as you like, the order stays.

    rows: (samples, length) int32, read-only. Each batch is (batch_size, length) int32, the last one may be smaller.
    """

    def __init__(self, rows: I32, batch_size: int = 1) -> None:
        self.rows: I32 = np.array(rows, dtype=np.int32, order="C")
        self.rows.setflags(write=False)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[I32]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not among them."""
        return int((self.rows != PADDING).sum())

    @property
    def sha256(self) -> str:
        """Of the shape, two little-endian int64, then the tokens as little-endian int32; batch_size does not count."""
        shape = np.array(self.rows.shape, dtype="<i8")
        return hashlib.sha256(shape.tobytes() + self.rows.astype("<i4").tobytes()).hexdigest()


def _plain(tokenizer: Encoder, text: str) -> list[int]:
    """A document's ids without a BOS of its own, even where the text spells one."""
    ids = tokenizer.encode(text, bos=False)
    return ids[1:] if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else ids
