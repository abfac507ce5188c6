"""How far one model's next-token distribution is from another's (NumPy)."""

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> F64:
    """Log-probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def divergence(original: F32, other: F32) -> tuple[F64, npt.NDArray[np.bool_]]:
    """KL(original || other) in nats and whether the likeliest token is the same, position by position.

    original, other: (positions, vocab) logits. Returns two arrays of (positions,).
    """
    p, q = log_softmax(original), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return np.maximum(kl, 0.0), original.argmax(-1) == other.argmax(-1)
