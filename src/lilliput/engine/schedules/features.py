"""A few numbers of an answer's beginning predict what every choice of steps would cost it, and the best bargain wins.

Source: ours. Chosen is what minimizes predicted loss plus `price` times average bits; one price for all answers is what
spends a total of bits with the least total loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import log
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.core.errors import ConfigError
from lilliput.engine.schedules.base import Signals
from lilliput.engine.schedules.prompted import Prompted

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Features(Prompted):
    """watch: forwards at the first rung before it decides. price: of a bit, in the metric's unit.

    Weights: mean, spread (features,), of the features; slope (choices, features), intercept, bits (choices,), for every
    choice of `choices`: its predicted loss, and its average bits.
    """

    name: ClassVar[str] = "features"
    spelt: ClassVar[str] = "Learn it with `lilliput schedule ARTIFACT --method features`"
    shapes: ClassVar[tuple[str, ...]] = ("mean", "spread", "slope", "intercept", "bits")
    watch: int = 8
    price: float = 0.0

    def misfit(self) -> str | None:
        """Shapes that do not follow from each other, and options out of range."""
        choices = len(all_choices(self.grid, self.rungs))
        features = len(features_of(1, [(0.0, 1.0)] * (self.watch + 1)))
        shapes = {"mean": (features,), "spread": (features,), "slope": (choices, features)}
        shapes |= {"intercept": (choices,), "bits": (choices,)}
        wrong = [name for name, shape in shapes.items() if self.weights[name].shape != shape]
        return f"{wrong[0]} is {self.weights[wrong[0]].shape}, which does not fit ladder and steps" if wrong else None

    @property
    def looks(self) -> int:
        """After the prompt, and after each forward it watches."""
        return self.watch + 1

    def __post_init__(self) -> None:
        if not 0 <= self.watch <= 4096 or not 0 <= self.price < float("inf"):
            what = f"a watch of {self.watch} forwards at a price of {self.price} makes no sense"
            raise ConfigError(what, where="schedule features", fix="Give a count such as 8, and a price of 0 or more")
        super().__post_init__()

    def decide(self, step: int, prompt_len: int, seen: list[Any], signals: Signals) -> tuple[int, ...] | None:
        """Take in entropy and certainty of one forward; choose once `watch` forwards are done."""
        seen.append((signals.entropy(), signals.top1()))
        if len(seen) <= self.watch:
            return None
        w = self.weights
        losses = w["intercept"] + w["slope"] @ ((features_of(prompt_len, seen) - w["mean"]) / w["spread"])
        best = int((losses + self.price * w["bits"]).argmin())
        return all_choices(self.grid, self.rungs)[best]


def all_choices(grid: Sequence[int], rungs: int) -> list[tuple[int, ...]]:
    """Return every non-descending choice of one step a rung, in lexical order."""
    return list(combinations_with_replacement(grid, rungs))


def features_of(prompt_len: int, seen: Sequence[tuple[float, float]]) -> F64:
    """seen: entropy and largest probability of the forwards so far, the prompt's first."""
    entropy, top1 = np.array(seen, dtype=np.float64).T
    unsure = -np.log(np.maximum(top1, 1e-12))
    told = [log(max(prompt_len, 1)), entropy[0], unsure[0]]
    if len(seen) > 1:
        told += [entropy[1:].mean(), unsure[1:].mean(), entropy[1:].max()]
    return np.array(told)
