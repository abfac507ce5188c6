"""How much a model's answers changed: perplexity, KL divergence from the original, and how often the top token agrees.

Original and compressed are compared on the same windows by the same code, position by position, so differences are
paired and their intervals narrow. All sums are in float64.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from lilliput.core.errors import ConfigError, QualityFailed
from lilliput.core.progress import Progress, Silent
from lilliput.numerics.divergence import log_softmax

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_CELLS: Final = 1 << 22
"""Logits turned into float64 at a time (32 MiB), so that a vocabulary of 256,000 does not decide the memory needed."""


class Runner(Protocol):
    """Anything with logits: the engine at a width, or the original in torch (`reference.TorchRunner`)."""

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> F32:
        """(length,) token ids to (length, vocab) float32; row i scores what comes after tokens[: i + 1]."""
        ...


class QualityRow(BaseModel):
    """One width's figures over all windows. The first token of a window (BOS) is context and never predicted.

    bits: None for the original. tokens: predicted ones. nll: mean nats a predicted token; perplexity: exp(nll).
    kl: mean nats KL(original || this) a predicted position; top1_agreement: share of positions, 0..1, where both put
    the same token first. nll_increase: nll less the original's, on the same positions.
    ..._ci95: 95 % interval of the mean, normal, windows taken as the independent draws; None below 2 windows.
    All that compares with an original is None where none was given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int | None
    windows: int
    tokens: int
    nll: float
    perplexity: float
    kl: float | None = None
    kl_ci95: tuple[float, float] | None = None
    top1_agreement: float | None = None
    nll_increase: float | None = None
    nll_increase_ci95: tuple[float, float] | None = None


def evaluate(
    runner: Runner,
    windows: Sequence[npt.NDArray[np.int32]],
    *,
    bits: Sequence[int | None],
    against: Runner | None = None,
    progress: Progress | None = None,
) -> list[QualityRow]:
    """Measure `runner` at each width on the same windows, against the original where one is given.

    windows: (2..length,) int32 each, see `data.streams.windows`. bits: None stands for `against` itself or, without
    one, for the runner at its own default. The windows are walked once; the logits of the original are computed once
    a window and those of one width are in memory at a time.
    Returns one row a width, in the order of `bits`.
    Raises QualityFailed for logits that are not finite, naming width and window; ConfigError where there is nothing to
    measure or the two models do not share a vocabulary.
    """
    if not windows or not bits:
        raise ConfigError("nothing to measure", where="evaluate", fix="Give at least one window and one width")
    short = next((i for i, w in enumerate(windows) if len(w) < 2), None)
    if short is not None:
        raise ConfigError(f"window {short} predicts nothing", where="evaluate", fix="Give windows of 2 tokens or more")
    progress = progress or Silent()
    progress.begin("measuring", sum(len(w) - 1 for w in windows) * len(bits))
    # per width and window: sums over its positions of nll, kl, agreement, and the original's nll
    sums = np.zeros((len(bits), len(windows), 4))
    for at, window in enumerate(windows):
        tokens = np.ascontiguousarray(window, dtype=np.int32)
        reference = None if against is None else _checked(against, tokens, None, at, "the original")
        for row, width in enumerate(bits):
            if width is None and reference is not None:
                logits = reference
            else:
                name = "the model" if width is None else f"{width} bits"
                logits = _checked(runner, tokens, width, at, name)
            if reference is not None and logits.shape != reference.shape:
                what = f"{logits.shape[1]} logits a token, the original has {reference.shape[1]}"
                raise ConfigError(what, where="evaluate", fix="Compare with the model the artifact was made from")
            sums[row, at] = _window_sums(logits, reference, tokens)
            progress.advance(len(tokens) - 1)
    counts = np.array([len(w) - 1 for w in windows], dtype=np.float64)
    return [_row(width, sums[row], counts, against is not None) for row, width in enumerate(bits)]


def _checked(runner: Runner, tokens: npt.NDArray[np.int32], bits: int | None, window: int, name: str) -> F32:
    logits = np.asarray(runner.logits(tokens, bits=bits))
    if logits.ndim != 2 or len(logits) != len(tokens):
        raise ConfigError(f"logits of shape {logits.shape} for {len(tokens)} tokens", name, "The runner is at fault")
    for start in range(0, len(logits), step := max(1, _CELLS // logits.shape[1])):
        bad = ~np.isfinite(logits[start : start + step]).all(axis=1)
        if bad.any():
            what = f"logits are not finite in window {window} at position {start + int(bad.argmax())}"
            raise QualityFailed(what, where=name, fix="The weights of this width are broken: compress again")
    return logits


def _window_sums(logits: F32, reference: F32 | None, tokens: npt.NDArray[np.int32]) -> tuple[float, ...]:
    """Sums over the predicted positions of one window: nll, kl, agreeing top tokens, the original's nll."""
    nll = kl = agree = original_nll = 0.0
    count, step = len(tokens) - 1, max(1, _CELLS // logits.shape[1])
    for start in range(0, count, step):
        here = slice(start, min(start + step, count))
        targets = tokens[here.start + 1 : here.stop + 1, None]
        log_q = log_softmax(logits[here])
        nll -= float(np.take_along_axis(log_q, targets, axis=1).sum())
        if reference is None:
            continue
        log_p = log_softmax(reference[here])
        original_nll -= float(np.take_along_axis(log_p, targets, axis=1).sum())
        agree += float((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        np.subtract(log_p, log_q, out=log_q)
        kl += float(np.vdot(np.exp(log_p, out=log_p), log_q))
    return nll, kl, agree, original_nll


def _row(bits: int | None, sums: F64, counts: F64, paired: bool) -> QualityRow:
    total = float(counts.sum())
    nll = float(sums[:, 0].sum()) / total
    row = QualityRow(bits=bits, windows=len(counts), tokens=int(total), nll=nll, perplexity=_exp(nll))
    if not paired:
        return row
    increase = sums[:, 0] - sums[:, 3]
    return row.model_copy(
        update={
            "kl": max(0.0, float(sums[:, 1].sum()) / total),  # rounding may leave -1e-17
            "kl_ci95": _interval(sums[:, 1], counts),
            "top1_agreement": float(sums[:, 2].sum()) / total,
            "nll_increase": float(increase.sum()) / total,
            "nll_increase_ci95": _interval(increase, counts),
        }
    )


def _interval(sums: F64, counts: F64) -> tuple[float, float] | None:
    """95 % interval of sum(sums) / sum(counts), a ratio over windows of unequal length (linearised variance)."""
    n = len(counts)
    if n < 2:
        return None
    mean = sums.sum() / counts.sum()
    half = 1.96 * math.sqrt(n / (n - 1) * float(((sums - mean * counts) ** 2).sum())) / counts.sum()
    return float(mean - half), float(mean + half)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
