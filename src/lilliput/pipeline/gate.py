"""The two checks between a written artifact and the name "done": it says what was meant, and what was meant is good.

First the saved artifact is opened through the public engine and its logits on the probe are compared with those the
sweep computed from the same weights in torch. Then every width is compared with the original model. An encoder is
opened through the Embedder, and what is compared is the vectors of its probe.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.artifact.entries import EmbeddingQuality, QualityEntry
from lilliput.artifact.read import Artifact
from lilliput.core.errors import QualityFailed
from lilliput.embedding import Embedder
from lilliput.engine import Engine
from lilliput.engine.oracle import Oracle
from lilliput.numerics.divergence import divergence, log_softmax

F32 = npt.NDArray[np.float32]
AGREEMENT = 2e-3
"""Largest difference of engine and torch logits, as a share of the largest logit.

Both compute in float32 but sum in different orders; over tens of layers that leaves a few parts in 1e5. A wrong scale,
a swapped row or a lost bias is off by far more than 1e-2."""
LIMITS = {2: 3.0, 3: 1.5, 4: 0.5, 5: 0.2, 6: 0.1, 7: 0.05, 8: 0.03}
"""Mean KL to the original, nats, above which a width counts as broken. Generous on purpose: a usable model is far
below, and a text of a hundred tokens is not a benchmark."""
INTEGER_LIMITS = {4: 1.5, 8: 0.5}
"""The same for an integer graph, whose activations are rounded too, by the bits of its weights."""
INTEGER_COSINES = {4: 0.8, 8: 0.95}
"""Mean cosine below which an encoder's integer graph counts as broken."""
FLOAT_LIMIT = 3.0
"""The same for a result that is not quantized, where a recipe may prune as hard as it likes."""
COSINES = {2: 0.3, 3: 0.6, 4: 0.85, 5: 0.93, 6: 0.97, 7: 0.98, 8: 0.99}
"""Mean cosine to the original's vectors below which a width of an encoder counts as broken; generous as well."""
FLOAT_COSINE = 0.3
UNQUANTIZED = 32
"""What stands for "no width" in reports."""


def measure(folder: Path, probe: list[int], logits: Mapping[str, F32]) -> list[QualityEntry]:
    """Open the artifact, run the probe at every width, compare; return how far each width is from the original.

    probe: token ids. logits: what the sweep computed, (length, vocab) by width and under "float".
    Raises QualityFailed when the artifact does not say what was meant, or says something that is not a number.
    """
    engine = Engine(folder, activations="float")  # torch computed in float: any other difference is a fault
    found = []
    for key in sorted((k for k in logits if k != "float"), key=int):
        bits = int(key)
        said = engine.logits(probe, bits=bits or None)
        compare(said, logits[key], bits)
        found.append(_quality(said, logits["float"], probe, bits or UNQUANTIZED))
    return found


def measure_integer(folder: Path, probe: list[int], original: F32, bits: int) -> QualityEntry:
    """What the artifact's integer graph makes of the probe, as its definition says it. bits: of the blocks' weights.

    probe: token ids. original: the source model's logits, (length, vocab).
    """
    with Artifact.open(folder) as artifact:
        model = artifact.integer()
        assert model is not None, "called for an artifact with a graph"
        return _quality(Oracle(model).logits(probe), original, probe, bits)


def _quality(said: F32, original: F32, probe: list[int], bits: int) -> QualityEntry:
    kl, same = divergence(original[:-1], said[:-1])
    targets = np.array(probe[1:])
    nll = -log_softmax(said[:-1])[np.arange(len(targets)), targets].mean()
    return QualityEntry(
        bits=bits,
        tokens=len(targets),
        kl=float(f"{kl.mean():.4g}"),
        top1_agreement=float(f"{same.mean():.4g}"),
        nll=float(f"{nll:.4g}"),
        text="the probe text shipped with lilliput",
    )


def measure_vectors(
    folder: Path, probe: npt.NDArray[Any], vectors: Mapping[str, F32], probe_is: str
) -> list[EmbeddingQuality]:
    """As `measure`, for an encoder. probe: its inputs, see `Embedder.vectors`; vectors: (inputs, embedding_size)."""
    embedder, found = Embedder(folder), []
    for key in sorted((k for k in vectors if k != "float"), key=int):
        bits = int(key)
        said = embedder.vectors(probe, bits=bits or None)
        compare(said, vectors[key], bits, "vectors")
        found.append(_likeness(said, vectors["float"], bits or UNQUANTIZED, probe_is))
    return found


def measure_integer_vectors(
    folder: Path, probe: npt.NDArray[Any], original: F32, bits: int, probe_is: str
) -> EmbeddingQuality:
    """As `measure_integer`, for an encoder. probe: (sentences, length) ids; original: (sentences, embedding_size)."""
    said = Embedder(folder, activations="integer").vectors(probe)
    return _likeness(said, original, bits, probe_is)


def _likeness(said: F32, original: F32, bits: int, probe_is: str) -> EmbeddingQuality:
    wanted = original.astype(np.float64)
    length = np.linalg.norm(wanted, axis=1)
    cosine = (said * wanted).sum(1) / np.maximum(np.linalg.norm(said, axis=1) * length, 1e-30)
    error = np.linalg.norm(said - wanted, axis=1) / np.maximum(length, 1e-30)
    told = {"cosine": cosine.mean(), "cosine_min": cosine.min(), "error": error.mean()}
    numbers = {name: float(f"{value:.4g}") for name, value in told.items()}
    return EmbeddingQuality(bits=bits, inputs=len(said), inputs_are=probe_is, **numbers)


def compare(said: F32, meant: F32, bits: int, kind: str = "logits") -> None:
    """Raise QualityFailed unless the saved artifact's logits, or vectors, are finite and those of the sweep."""
    where = f"{bits} bits" if bits else "the artifact"
    if not np.isfinite(said).all():
        what = f"the saved artifact gives {kind} that are not numbers"
        raise QualityFailed(what, where=where, fix="Exclude the layers with the largest error, or choose other widths")
    gap = float(np.abs(said - meant).max()) / max(1e-6, float(np.abs(meant).max()))
    if gap > AGREEMENT:
        what = f"the saved artifact's {kind} differ from the intended ones by {gap:.2g} of their range"
        raise QualityFailed(what, where=where, fix="This is a fault of ours or of the disk: run verify, then report it")


def judge(
    quality: Sequence[QualityEntry | EmbeddingQuality], integer: QualityEntry | EmbeddingQuality | None = None
) -> list[str]:
    """One line for every width, and the integer graph, whose divergence from the original is beyond its limit."""
    lines = []
    if isinstance(integer, EmbeddingQuality):
        if not integer.cosine >= (least := INTEGER_COSINES[integer.bits]):
            lines.append(f"the integer graph: the cosine to the original is {integer.cosine:.3g}, below {least:g}")
    elif integer is not None and not integer.kl <= (limit := INTEGER_LIMITS[integer.bits]):
        lines.append(f"the integer graph: KL to the original is {integer.kl:.3g} nats a token, above {limit:g}")
    for row in quality:
        name = "the result" if row.bits == UNQUANTIZED else f"{row.bits} bits"
        if isinstance(row, EmbeddingQuality):
            least = COSINES.get(row.bits, FLOAT_COSINE)
            if not row.cosine >= least:
                lines.append(f"{name}: the cosine to the original's vectors is {row.cosine:.3g}, below {least:g}")
            continue
        limit = LIMITS.get(row.bits, FLOAT_LIMIT)
        if not row.kl <= limit:  # so that NaN does not pass
            lines.append(f"{name}: KL to the original is {row.kl:.3g} nats a token, above {limit:g}")
    return lines
