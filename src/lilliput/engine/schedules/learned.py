"""A small classifier reads the keys and values that the prompt left, and chooses when to leave each rung.

Source: Chen et al., arXiv 2410.13461, the KV-cache scheduler: learned queries attend to the last layer's keys, what they
gather of the values decides between a few start steps.
Deviation: logits instead of probabilities, since training takes the softmax itself; keys are turned back to position 0,
so that a longer prompt looks no different; heads keep queries of their own instead of being averaged; one decision for
every rung; a narrow hidden layer. Read after the prompt, before the first decode forward.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.engine.schedules.base import F32, Signals
from lilliput.engine.schedules.prompted import Prompted

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Learned(Prompted):
    """Weights: query (heads, head_dim); inv_freq (rotated pairs,), empty without rotary positions; mean, spread
    (heads * head_dim,); hidden (units, heads * head_dim); hidden_bias (units,); out (rungs * steps, units); out_bias."""

    name: ClassVar[str] = "learned"
    spelt: ClassVar[str] = "Learn it with `lilliput schedule ARTIFACT --method learned`"
    shapes: ClassVar[tuple[str, ...]] = (
        "query",
        "inv_freq",
        "mean",
        "spread",
        "hidden",
        "hidden_bias",
        "out",
        "out_bias",
    )

    def misfit(self) -> str | None:
        """Shapes that do not follow from each other."""
        w = self.weights
        if w["query"].ndim != 2 or w["hidden"].ndim != 2:
            return "its query or its hidden layer is no matrix"
        width, units, choices = w["query"].size, len(w["hidden"]), self.rungs * len(self.grid)
        wanted = {
            "mean": (width,),
            "spread": (width,),
            "hidden": (units, width),
            "hidden_bias": (units,),
            "out": (choices, units),
            "out_bias": (choices,),
        }
        wrong = [name for name, shape in wanted.items() if w[name].shape != shape]
        if w["inv_freq"].ndim != 1 or 2 * len(w["inv_freq"]) > w["query"].shape[1]:
            wrong.append("inv_freq")
        return f"{wrong[0]} is {w[wrong[0]].shape}, which does not fit ladder and steps" if wrong else None

    def decide(self, step: int, prompt_len: int, seen: list[Any], signals: Signals) -> tuple[int, ...]:
        """Choose by the cache of the prompt. Raises ValueError where the model has another number of heads."""
        keys, values = signals.keys(), signals.values()
        return self.ascending([self.grid[i] for i in self.logits(keys, values).argmax(1)])

    def logits(self, keys: F32, values: F32) -> F64:
        """keys (as attention reads them), values: (heads, tokens, head_dim). Returns (rungs, steps)."""
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        gathered = gather(upright(keys, self.weights["inv_freq"]), values.astype(np.float64), w["query"])
        hidden = np.maximum(w["hidden"] @ ((gathered - w["mean"]) / w["spread"]) + w["hidden_bias"], 0)
        out: F64 = w["out"] @ hidden + w["out_bias"]
        return out.reshape(self.rungs, len(self.grid))


def upright(keys: F32, inv_freq: F32) -> F64:
    """Return (heads, tokens, head_dim) keys turned back from their positions, 0 and up, to position 0."""
    turned, half = keys.astype(np.float64), len(inv_freq)
    angle = np.arange(keys.shape[1], dtype=np.float64)[:, None] * inv_freq.astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = keys[..., :half].astype(np.float64), keys[..., half : 2 * half].astype(np.float64)
    turned[..., :half], turned[..., half : 2 * half] = a * cos + b * sin, b * cos - a * sin
    return turned


def gather(keys: F64, values: F64, query: F64) -> F64:
    """Attend to (heads, tokens, head_dim) with one query a head, (heads, head_dim); returns (heads * head_dim,)."""
    score = np.einsum("htd,hd->ht", keys, query) / np.sqrt(query.shape[1])
    share = np.exp(score - score.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    gathered: F64 = np.einsum("ht,htd->hd", share, values).reshape(-1)
    return gathered
