"""One contender, one process: what is timed, in which order and how, the same lines for every engine.

Imported by the workers, which also run where Lilliput is not installed: nothing but the standard library here.
"""

import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

LEAST_S, MOST = 1.0, 20
"""A thing is timed until it took a second in all, at most 20 times: small models answer in milliseconds."""


class Runner(ABC):
    """What a worker offers of its engine, opened on `job`, {"path", "bits", "threads", "context"}. Subclass it."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds to read `tokens` as one fresh sequence, up to the logits after the last."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], count: int) -> tuple[float, float, int]:
        """Continue a fresh sequence greedily by `count` tokens, at least 2.

        Returns seconds from the call to the first new token, seconds of the others, and how many those were.
        """

    def facts(self) -> dict[str, Any]:
        """Weight bytes read for a token, "weight_bytes_per_token", and what else belongs in the record."""
        return {}


class Stepped(Runner):
    """An engine that is given tokens and gives logits; the choice of the next token is made here, alike for all."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> Any:
        """Append to the sequence; returns an array of logits (vocab,) after the last, valid until the next call."""

    @abstractmethod
    def clear(self) -> None:
        """Begin a fresh sequence."""

    def prefill(self, tokens: Sequence[int]) -> float:
        self.clear()
        start = time.perf_counter()
        self.read(tokens).argmax()
        return time.perf_counter() - start

    def decode(self, tokens: Sequence[int], count: int) -> tuple[float, float, int]:
        self.clear()
        start = time.perf_counter()
        token = int(self.read(tokens).argmax())
        first = time.perf_counter() - start
        for _ in range(count - 1):
            token = int(self.read([token]).argmax())
        return first, time.perf_counter() - start - first, count - 1


def prompt(length: int, vocab: int, salt: int) -> list[int]:
    """Token ids that look like nothing in particular, the same for every engine: 1, then a fixed walk over 300.. ."""
    return [1] + [300 + (salt * 7_368_787 + i * 15_485_863 + 977) % (vocab - 300) for i in range(length - 1)]


def measure(job: dict[str, Any], open_runner: Callable[[dict[str, Any]], Runner]) -> dict[str, Any]:
    """Load, warm up by a whole answer, then time prefill and decoding.

    cold_first_token_s counts from the path to the first token of that first answer, load included; load_s to an engine
    that takes calls. Peak and anonymous memory are read at the end. Imports count nowhere.
    """
    job["context"] = max(job["prefill_tokens"], job["prompt_tokens"] + job["new_tokens"]) + 8
    start = time.perf_counter()
    runner = open_runner(job)
    load_s = time.perf_counter() - start
    first_s, _, _ = runner.decode(prompt(job["prompt_tokens"], job["vocab"], 0), 8)
    long, short = (prompt(job[k], job["vocab"], n) for n, k in enumerate(("prefill_tokens", "prompt_tokens"), 1))
    prefill_s = _repeat(lambda: runner.prefill(long), lambda spent: spent)
    answers = _repeat(lambda: runner.decode(short, job["new_tokens"]), lambda spent: spent[1])
    return {
        "load_s": load_s,
        "cold_first_token_s": load_s + first_s,
        "first_token_s": sorted(a[0] for a in answers)[len(answers) // 2],
        "prefill_tokens_per_s": len(prefill_s) * job["prefill_tokens"] / sum(prefill_s),
        "decode_tokens_per_s": sum(a[2] for a in answers) / sum(a[1] for a in answers),
        "timed_prefills": len(prefill_s),
        "timed_answers": len(answers),
        **memory(),
        **runner.facts(),
    }


def memory(status: str = "/proc/self/status") -> dict[str, int | None]:
    """Largest resident size so far, mapped files included, and what of the present one is no file's."""
    try:
        with open(status, encoding="utf-8") as file:
            text = file.read()
    except OSError:
        text = ""
    found = {key: re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE) for key in ("VmHWM", "RssAnon")}
    size = {key: int(match[1]) * 1024 if match else None for key, match in found.items()}
    return {"peak_rss_bytes": size["VmHWM"], "anonymous_bytes": size["RssAnon"]}


def main(open_runner: Callable[[dict[str, Any]], Runner]) -> None:
    """Run the job in argv[1], print the figures as the last line of stdout."""
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]), open_runner)))


def _repeat(once: Callable[[], Any], seconds: Callable[[Any], float]) -> list[Any]:
    done: list[Any] = []
    spent = 0.0
    while spent < LEAST_S and len(done) < MOST:
        done.append(once())
        spent += seconds(done[-1])
    return done
