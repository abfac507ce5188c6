"""What a schedule is judged by: figures of one answer, and how far they may fall.

Two kinds. A `Forced` metric reads the logits along a given answer, computed as the schedule would have; a `Written` one
compares what the schedule wrote with a given answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import log1p
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.measure.rouge import rouge_l

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Original:
    """The reference model along one answer of n tokens.

    p: (n, vocab) its distributions. negentropy: (n,) sums of p log p, nats. top: (n,) its likeliest tokens.
    """

    p: F32
    negentropy: F64
    top: I64

    @classmethod
    def of(cls, logits: F32) -> "Original":
        """Read (n, vocab) logits."""
        shifted = logits - logits.max(-1, keepdims=True)
        p = np.exp(shifted)
        total = p.sum(-1, keepdims=True)
        p /= total
        negentropy = np.einsum("nv,nv->n", p, shifted, dtype=np.float64) - np.log(total[:, 0], dtype=np.float64)
        return cls(p, negentropy, logits.argmax(-1))


class Metric(ABC):
    """loss: how much worse a score is than that of the widest run; unit: of the score; allowance: of a tolerance."""

    name: ClassVar[str]
    unit: ClassVar[str]
    rising: ClassVar[bool]
    """Whether more is better."""

    def loss(self, score: F64, best: F64) -> F64:
        """How much worse `score` is than `best`, below 0 where it is better."""
        return best - score if self.rising else score - best

    def allowance(self, best: float, tolerance: float) -> float:
        """The largest mean loss that `tolerance`, a share such as 0.01, allows a task whose widest run scores `best`."""
        return tolerance * best if self.rising else log1p(tolerance)


class Forced(Metric):
    """A metric of the logits along an answer."""

    @abstractmethod
    def score(self, logits: F32, original: Original, answer: Sequence[int]) -> float:
        """logits: (n, vocab), row i chooses answer[i]. Returns the mean over the n tokens."""


class Written(Metric):
    """A metric of what was written."""

    @abstractmethod
    def score(self, written: Sequence[int], answer: Sequence[int]) -> float:
        """Both are token ids without an end-of-sequence id."""


class KL(Forced):
    """KL(original || schedule), nats a token. A tolerance of 1 % lets its exponential, which multiplies the perplexity
    of the original's own text, grow by 1 %."""

    name, unit, rising = "kl", "nats", False

    def score(self, logits: F32, original: Original, answer: Sequence[int]) -> float:
        """Mean over the answer's tokens."""
        return float(divergences(logits, original).mean())


class NLL(Forced):
    """Nats a token of the answer itself: the logarithm of its perplexity, which may grow by the tolerance."""

    name, unit, rising = "nll", "nats", False

    def score(self, logits: F32, original: Original, answer: Sequence[int]) -> float:
        """Mean over the answer's tokens."""
        return float(surprises(logits, answer).mean())


class Agreement(Forced):
    """Share of the tokens where original and schedule put the same one first."""

    name, unit, rising = "agreement", "share", True

    def score(self, logits: F32, original: Original, answer: Sequence[int]) -> float:
        """Mean over the answer's tokens."""
        return float((logits.argmax(-1) == original.top).mean())


class RougeL(Written):
    """ROUGE-L of the schedule's greedy continuation and the answer, over tokens."""

    name, unit, rising = "rouge_l", "F", True

    def score(self, written: Sequence[int], answer: Sequence[int]) -> float:
        """F-measure."""
        return rouge_l(written, answer)


def divergences(logits: F32, original: Original) -> F64:
    """KL(original || logits) at every position, (n,) nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    cross = np.einsum("nv,nv->n", original.p, shifted, dtype=np.float64)
    kl: F64 = original.negentropy - cross + np.log(np.exp(shifted).sum(-1), dtype=np.float64)
    return np.maximum(kl, 0.0)


def surprises(logits: F32, answer: Sequence[int]) -> F64:
    """Negative log-probability of every token of the answer, (n,) nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(answer)), np.asarray(answer)]
    told: F64 = np.log(np.exp(shifted).sum(-1), dtype=np.float64) - chosen
    return told
