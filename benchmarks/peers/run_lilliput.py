"""Worker of Lilliput: the public engine, ids in, ids out."""

import time
from collections.abc import Sequence
from typing import Any

from job import Runner, main

from lilliput.engine import Engine


class Lilliput(Runner):
    """An artifact at one width. Its time per token includes what callers get: text pieces and a greedy choice."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.engine = Engine(job["path"], threads=job["threads"], context=job["context"])
        self.bits = job["bits"]

    def prefill(self, tokens: Sequence[int]) -> float:
        start = time.perf_counter()
        self.engine.generate(tokens, max_new_tokens=1, bits=self.bits)
        return time.perf_counter() - start

    def decode(self, tokens: Sequence[int], count: int) -> tuple[float, float, int]:
        seen: list[float] = []
        start = time.perf_counter()
        done = self.engine.generate(
            tokens, max_new_tokens=count, bits=self.bits, on_token=lambda _: seen.append(time.perf_counter())
        )
        first = seen[0] - start
        # the first token comes of the prompt's logits; decoding makes the others
        return first, time.perf_counter() - start - first, len(done.tokens) - 1

    def facts(self) -> dict[str, Any]:
        return {"weight_bytes_per_token": self.engine.weight_bytes(self.bits)}


if __name__ == "__main__":
    main(Lilliput)
