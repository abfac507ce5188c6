"""One width, one process: `python -m lilliput.measure.latency_worker JOB` prints one LatencyRound as JSON.

JOB is a JSON object: artifact, bits, prompt_tokens, new_tokens, threads (null for the engine's own choice), and if
wanted activations and kv; schedule (a text, or "stored") in the place of bits for decoding; draft_bits and draft_tokens.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from lilliput.core.errors import LilliputError
from lilliput.engine import Engine, native
from lilliput.engine.schedules.base import average_bits
from lilliput.engine.schedules.text import parse
from lilliput.measure.environment import ForeignLoad, cores
from lilliput.measure.latency import STORED, LatencyRound
from lilliput.measure.memory import peak_rss_bytes

BUFFER_BYTES: Final = 1 << 28
"""Far above any cache of a machine we serve, so that reading it is reading memory."""
_ATTEMPTS: Final = 8
"""A model may end its text early; then it starts again from another prompt until enough tokens are timed."""


def run(job: dict[str, Any], open_engine: Callable[..., Any]) -> LatencyRound:
    """Load, warm up, time. open_engine: the engine's class, or a stand-in of it in tests."""
    foreign = ForeignLoad()
    start = time.perf_counter()
    options = {name: job[name] for name in ("threads", "activations", "kv") if name in job}
    engine = open_engine(job["artifact"], context=job["prompt_tokens"] + job["new_tokens"] + 1, **options)
    load_s = time.perf_counter() - start
    how = _how(job, engine)
    used: list[int] = []
    drafted, accepted = 0, 0
    prompts = [prompt(engine, job["prompt_tokens"], salt) for salt in range(_ATTEMPTS + 1)]
    engine.generate(prompts[-1], max_new_tokens=2, **how)  # first touch of the pages, scratch memory, code paths
    decoded, decode_s, prefill_s, first_s = 0, 0.0, [], []
    for attempt in range(_ATTEMPTS):
        seen: list[float] = []
        begin = time.perf_counter()
        done = engine.generate(
            prompts[attempt],
            max_new_tokens=job["new_tokens"],
            **how,
            on_token=lambda *_, seen=seen: seen.append(time.perf_counter()),
        )
        if seen:
            first_s.append(seen[0] - begin)
        prefill_s.append(done.prefill_s)
        # The first token comes of the prompt's last logits; decoding makes the others, and the end of text, which the
        # engine leaves out of its tokens.
        if (steps := len(done.tokens) - (done.finish_reason != "stop")) > 0:
            decoded += steps
            decode_s += done.decode_s
            if set(how) != {"bits"}:
                used += done.widths
                drafted, accepted = drafted + done.drafted, accepted + done.accepted
        if decoded >= job["new_tokens"] - 1:
            break
    if not decoded:
        raise ValueError("the model ended every text at once: nothing to time")
    peak = peak_rss_bytes()  # before the memory test adds its buffer
    threads = int(getattr(engine, "threads", None) or job["threads"] or cores())
    read = engine.weight_bytes(job["bits"])
    if used:
        read = sum(engine.weight_bytes(width) for width in used) / decoded
    return LatencyRound(
        bits=job["bits"],
        threads=threads,
        prompt_tokens=job["prompt_tokens"],
        decoded_tokens=decoded,
        load_s=load_s,
        prefill_s=float(np.median(prefill_s)),
        decode_s=decode_s,
        time_to_first_token_s=float(np.median(first_s or prefill_s)),
        peak_rss_bytes=peak,
        weight_bytes_read_per_token=int(read),
        memory_bytes_per_s=memory_bytes_per_s(threads),
        foreign_cores=foreign.cores(),
        schedule=str(how["schedule"]) if "schedule" in how else None,
        draft_bits=how.get("draft_bits"),
        average_bits=average_bits(used),
        acceptance=accepted / drafted if drafted else None,
    )


def _how(job: dict[str, Any], engine: Any) -> dict[str, Any]:
    """What `Engine.generate` is to be told of widths."""
    if "schedule" in job:
        return {"schedule": engine.schedule if job["schedule"] == STORED else parse(job["schedule"])}
    return {name: job[name] for name in ("bits", "draft_bits", "draft_tokens") if name in job}


def prompt(engine: Any, length: int, salt: int) -> list[int]:
    """Token ids that look like nothing in particular, the same on every machine: BOS, then a fixed walk."""
    tokenizer = engine.tokenizer
    special = {tokenizer.bos_id, *tokenizer.eos_ids}
    walk = ((salt * 7_368_787 + i * 15_485_863 + 977) % tokenizer.vocab_size for i in range(4 * length + 64))
    ids = [i for i in walk if i not in special]
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return (front + ids)[:length]


def memory_bytes_per_s(threads: int, size_bytes: int = BUFFER_BYTES, rounds: int = 5) -> float:
    """Best rate at which `threads` threads read one buffer, each its own part, by the kernel made for that."""
    return native.read_bandwidth(size_bytes, threads, rounds=rounds) * 1e9


def main() -> int:
    """Run the job given as the only argument; errors go to stderr as one line."""
    try:
        print(run(json.loads(sys.argv[1]), Engine).model_dump_json())
    except (LilliputError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
