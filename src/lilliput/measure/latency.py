"""How fast an artifact answers on this machine, and in how much memory, at each of its widths.

Each width of each round runs in a process of its own (`latency_worker`), so its peak memory is its own, and rounds go
through all widths in turn, so that a machine that slows down slows all of them. Each process also reads plain memory
as fast as it can right after it was timed: what a width reaches of that says whether there is speed left to gain.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.core.progress import Progress, Silent
from lilliput.core.spec import ModelSpec
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.stored import stored_schedule
from lilliput.engine.schedules.text import parse

if TYPE_CHECKING:
    from lilliput.engine import Engine

STORED = "stored"
"""In the place of a schedule's text: the one the artifact keeps."""


class LatencyRound(BaseModel):
    """One width in one process. See LatencyRow for the units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int
    threads: int
    prompt_tokens: int
    decoded_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    peak_rss_bytes: int | None
    weight_bytes_read_per_token: int
    memory_bytes_per_s: float
    foreign_cores: float | None
    schedule: str | None = None
    draft_bits: int | None = None
    average_bits: float | None = None
    acceptance: float | None = None


class LatencyRow(BaseModel):
    """One width: medians over the rounds, the largest of the peaks.

    prefill_tokens_per_s: prompt tokens over the time to read them. decode_tokens_per_s: new tokens after the first
    over the time they took. time_to_first_token_s: from the call to the first new token, prompt included.
    peak_rss_bytes: VmHWM of the process, file-mapped weights included, the memory test not; None where unknown.
    load_s: from the path to an engine ready to answer, files in the page cache. weight_bytes_read_per_token: weights,
    scales and zeros of that width. memory_bytes_per_s: what plain reads of a 256 MiB buffer reached with as many
    threads in the same processes; bandwidth_share: weight bytes decoding read a second over that (above 1 where the
    weights fit in a cache). decode_limit_tokens_per_s: new tokens a second if decoding did nothing but read its weights
    at memory_bytes_per_s; no engine gets above it while the weights are read from memory. foreign_cores: cores other processes kept busy meanwhile, the largest of the rounds.

    schedule: what the widths followed, `bits` being the widest of them; draft_bits: what drafted for `bits`. With either
    average_bits is the mean width of the decode forwards, and weight_bytes_read_per_token a mean over new tokens.
    acceptance: share of the drafts that were kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int
    threads: int
    rounds: int
    prompt_tokens: int
    decoded_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    load_s: float
    peak_rss_bytes: int | None
    weight_bytes_read_per_token: int
    memory_bytes_per_s: float
    bandwidth_share: float
    decode_limit_tokens_per_s: float
    foreign_cores: float | None
    schedule: str | None = None
    draft_bits: int | None = None
    average_bits: float | None = None
    acceptance: float | None = None


def bench(
    artifact: "str | Path | Engine",
    *,
    bits: Sequence[int],
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    rounds: int = 3,
    threads: int | None = None,
    activations: Literal["int8", "float", "integer"] = "int8",
    kv: Literal["float", "int8", "int4"] = "float",
    schedule: str | None = None,
    draft_bits: int | None = None,
    draft_tokens: int = 8,
    timeout_s: float = 3600,
    progress: Progress | None = None,
) -> list[LatencyRow]:
    """Time an artifact at each width; one row a width, in the order of `bits`, then one for a schedule and one for drafts.

    artifact: its path, or an open engine, whose path and threads are taken. activations, kv: as `Engine` takes them.
    schedule: the text of one, or STORED for the artifact's own. draft_bits: drafts for the widest of `bits`.
    timeout_s: for one process.
    Raises ConfigError for sizes below 1 (new_tokens below 2), a width that is not there, or where a process fails, with
    its last line; OutOfResource for more tokens than the context holds, or where a process was killed or ran past its
    time.
    """
    if isinstance(artifact, str | Path):
        path = Path(artifact)
    else:
        path, threads = artifact.artifact.path, threads or artifact.threads
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}", where="bench", fix=f"Give {least} or more")
    check_fit(path, bits, prompt_tokens + new_tokens)
    progress = progress or Silent()
    jobs: list[dict[str, Any]] = [{"bits": width} for width in bits]
    if schedule is not None:
        jobs.append({"schedule": schedule, "bits": max(named_schedule(path, schedule).widths)})
    if draft_bits is not None:
        jobs.append({"draft_bits": draft_bits, "draft_tokens": draft_tokens, "bits": max(bits)})
    progress.begin("timing", rounds * len(jobs))
    job = {
        "artifact": str(path),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads,
        "activations": activations,
        "kv": kv,
    }
    found: list[list[LatencyRound]] = [[] for _ in jobs]
    for _ in range(rounds):
        for own, made in zip(jobs, found, strict=True):
            made.append(_round(job | own, timeout_s))
            progress.advance(1)
    return [summarize(made) for made in found]


def named_schedule(path: str | Path, text: str) -> Schedule:
    """Return the schedule that `text` names, or STORED, with the artifact's widths. Raises ConfigError."""
    with Artifact.open(path) as artifact:
        if text != STORED:
            return parse(text).fitted(artifact.bits)
        stored = stored_schedule(artifact)
    if stored is None:
        what = "the artifact keeps no schedule that this copy can follow"
        raise ConfigError(what, where="schedule", fix="Write one out, such as 4@0,2@64")
    return stored


def check_fit(path: str | Path, bits: Sequence[int], tokens: int) -> None:
    """Raise what every process would fail with, ConfigError, Unsupported or OutOfResource, before one is started."""
    with Artifact.open(path) as artifact:
        absent = [width for width in bits if width not in artifact.bits]
        if absent:
            served = ", ".join(map(str, artifact.bits)) or "none"
            raise ConfigError(f"the artifact has no {absent[0]} bits", where="bits", fix=f"It serves {served}")
        spec = artifact.manifest.spec
        if not isinstance(spec, ModelSpec):
            what = f"holds a {spec.family} encoder, which writes no text"
            raise Unsupported(what, where=str(path), fix="Only models that generate are timed")
        context = spec.context
    if tokens > context:
        what = f"{tokens} tokens of prompt and answer exceed the context of {context}"
        raise OutOfResource(what, where="bench", fix="Ask for fewer")


def summarize(rounds: Sequence[LatencyRound]) -> LatencyRow:
    """Medians over the rounds of one width."""
    first = rounds[0]
    peaks = [r.peak_rss_bytes for r in rounds if r.peak_rss_bytes is not None]
    foreign = [r.foreign_cores for r in rounds if r.foreign_cores is not None]
    decode = median(r.decoded_tokens / r.decode_s for r in rounds)
    memory = median(r.memory_bytes_per_s for r in rounds)
    read = int(median(r.weight_bytes_read_per_token for r in rounds))
    return LatencyRow(
        bits=first.bits,
        threads=first.threads,
        rounds=len(rounds),
        prompt_tokens=first.prompt_tokens,
        decoded_tokens=min(r.decoded_tokens for r in rounds),
        prefill_tokens_per_s=median(r.prompt_tokens / r.prefill_s for r in rounds),
        decode_tokens_per_s=decode,
        time_to_first_token_s=median(r.time_to_first_token_s for r in rounds),
        load_s=median(r.load_s for r in rounds),
        peak_rss_bytes=max(peaks, default=None),
        weight_bytes_read_per_token=read,
        memory_bytes_per_s=memory,
        bandwidth_share=decode * read / memory,
        decode_limit_tokens_per_s=memory / read,
        foreign_cores=max(foreign, default=None),
        schedule=first.schedule,
        draft_bits=first.draft_bits,
        average_bits=None if first.average_bits is None else median(r.average_bits or 0.0 for r in rounds),
        acceptance=None if first.acceptance is None else median(r.acceptance or 0.0 for r in rounds),
    )


def _round(job: dict[str, Any], timeout_s: float) -> LatencyRound:
    command = [sys.executable, "-m", "lilliput.measure.latency_worker", json.dumps(job)]
    where = f"timing {job['bits']} bits"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        fix = "Ask for fewer tokens, or allow more time"
        raise OutOfResource(f"not done after {timeout_s:g} s", where=where, fix=fix) from error
    if done.returncode < 0:
        what = f"the process was ended by signal {-done.returncode}"
        raise OutOfResource(what, where=where, fix="Most often this is memory: try fewer bits")
    try:
        if done.returncode == 0:
            return LatencyRound.model_validate_json(done.stdout.splitlines()[-1])
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except (IndexError, ValidationError) as error:
        reason = f"it said {done.stdout[-200:]!r} ({type(error).__name__})"
    raise ConfigError(f"the process failed ({reason})", where=where, fix="Try the same with `lilliput run`")
