"""What a compression reads beside weights: the text or pictures that methods learn from, and the probe of the gate."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy.typing as npt

from lilliput.artifact.entries import DataFile, DataInfo
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec, PatchInputs
from lilliput.data.documents import read_documents
from lilliput.data.images import Pictures, draw_pictures, find_pictures, probe_pictures
from lilliput.data.streams import Batches, batches, padded, sentences
from lilliput.data.tokenizer import Tokenizer
from lilliput.models import Checkpoint
from lilliput.pipeline.budget import Target

PROBE_TOKENS = 128


@dataclass(frozen=True)
class Options:
    """What `compress` was asked for, beside model, place and recipe."""

    calibration: tuple[str, ...]
    field: str | None
    join: bool
    samples: int
    length: int
    seed: int
    max_ram: int | None
    resume: bool
    overwrite: bool
    gate: bool
    target: Target | None


def told_as(checkpoint: Checkpoint) -> str:
    """What the model reads, in a word."""
    spec = checkpoint.spec
    return "pictures" if isinstance(spec, EncoderSpec) and isinstance(spec.inputs, PatchInputs) else "text"


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer, read as an artifact will have it."""
    with TemporaryDirectory() as folder:
        checkpoint.export_tokenizer(Path(folder))
        return Tokenizer.open(Path(folder))


def calibration(
    spec: AnySpec, options: Options, tokenizer: Tokenizer | None, batch: int, *, bos: bool
) -> tuple[Batches | Pictures, DataInfo]:
    """Draw the rows that methods learn from, `batch` at a time, and say what they were drawn from.

    bos: every row begins with the BOS token, where the model has one.
    """
    if isinstance(spec, EncoderSpec) and isinstance(spec.inputs, PatchInputs):
        files = [file for source in options.calibration for file in find_pictures(source)]
        shown = draw_pictures(files, spec.inputs, samples=options.samples, batch_size=batch, seed=options.seed)
        folders = tuple(DataFile(name=Path(path).name, sha256=shown.sha256) for path in options.calibration)
        return shown, DataInfo(files=folders, sha256=shown.sha256, tokens=shown.tokens)
    assert tokenizer is not None, "a model that reads no pictures reads text"
    texts = {path: read_documents(path, field=options.field) for path in options.calibration}
    every = [text for documents in texts.values() for text in documents]
    sizes = {"length": min(options.length, spec.context), "samples": options.samples, "seed": options.seed}
    sizes |= {"batch_size": batch}
    if isinstance(spec, EncoderSpec):
        drawn = sentences(every, tokenizer, **sizes)
    else:
        drawn = batches(every, tokenizer, join=options.join, bos=bos, **sizes)
    named = tuple(
        DataFile(name=Path(path).name, sha256=hashlib.sha256("\0".join(documents).encode()).hexdigest())
        for path, documents in texts.items()
    )
    return drawn, DataInfo(files=named, sha256=drawn.sha256, tokens=drawn.tokens)


def probe(spec: AnySpec, tokenizer: Tokenizer | None) -> npt.NDArray[Any]:
    """What every width is followed through: (1, length) int64 token ids of the shipped text, or a few ids where it
    has no tokens; for an encoder the text's sentences, (sentences, length), or pictures, (pictures, patches, columns).
    """
    inputs = spec.inputs if isinstance(spec, EncoderSpec) else None
    if isinstance(inputs, PatchInputs):
        return probe_pictures(inputs)
    assert tokenizer is not None, "a model that reads no pictures reads text"
    text = files("lilliput.pipeline").joinpath("probe.txt").read_text("utf-8")
    limit = min(PROBE_TOKENS, spec.context)
    if isinstance(spec, ModelSpec):
        known, rows = spec.vocab_size, [tokenizer.encode(text)[:limit]]
    else:
        assert inputs is not None, "an encoder has inputs"
        known = inputs.vocab_size
        rows = [tokenizer.whole(part, limit) for part in re.split(r"(?<=[.?!])\s+", text) if part]
    rows = [[i for i in row if i < known] for row in rows]
    return padded([row if len(row) > 1 else list(range(min(16, known))) for row in rows])
