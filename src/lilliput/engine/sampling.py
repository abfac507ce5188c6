"""How the next token is chosen from its logits."""

from dataclasses import dataclass
from math import isfinite

from lilliput.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The cuts are made in this order: penalty, temperature, top_k, top_p, min_p; then one draw from what is left.

    temperature: 0 takes the likeliest token (the lowest id among equals) and ignores the cuts. top_k: tokens kept, 0
    for all. top_p: share of the probability kept, in (0, 1]; at least one token stays. min_p: least probability
    relative to the likeliest token's, in [0, 1]. repetition_penalty: logits of tokens already in the prompt or the
    answer are divided by it where positive and multiplied where negative; 1 does nothing. seed: in [0, 2**64); the
    same seed gives the same draws on every machine, for every prompt of a batch as if it ran alone.
    Raises ConfigError for values outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        holds = {
            "temperature": (isfinite(self.temperature) and self.temperature >= 0, "Give 0 for greedy, or about 0.8"),
            "top_k": (self.top_k >= 0, "Give a count of tokens such as 40, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "Give a share such as 0.95, or 1 for all"),
            "min_p": (0 <= self.min_p <= 1, "Give a share such as 0.05, or 0 for all"),
            "repetition_penalty": (
                isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "Give a factor such as 1.1, or 1 for none",
            ),
            "seed": (0 <= self.seed < 2**64, "Give a whole number from 0 to 2**64 - 1"),
        }
        for name, (fine, fix) in holds.items():
            if not fine:
                raise ConfigError(f"{getattr(self, name)} is out of range", where=f"sampling.{name}", fix=fix)
