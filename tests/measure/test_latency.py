from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lilliput.core.errors import ConfigError, OutOfResource
from lilliput.measure import latency, latency_worker
from lilliput.measure.latency import LatencyRound, bench, summarize
from support.small_artifact import write_small_artifact


class Engine:
    """An engine that ends each text after `lasts` tokens and takes 0.1 s a token to do so, it says."""

    threads = 2
    lasts = 4

    def __init__(self, path: str, *, threads: int | None, context: int | None) -> None:
        self.tokenizer = SimpleNamespace(bos_id=0, eos_ids=(1,), vocab_size=512)
        self.prompts: list[list[int]] = []

    def generate(self, prompt: list[int], *, max_new_tokens: int, bits: int, on_token: Any = None) -> SimpleNamespace:
        self.prompts.append(prompt)
        made = list(range(min(self.lasts, max_new_tokens)))
        for token in made:
            if on_token:
                on_token(token)
        finish = "stop" if self.lasts < max_new_tokens else "length"
        steps = len(made) - (finish == "length")  # the end of text is made too, and not among the tokens
        return SimpleNamespace(tokens=made, finish_reason=finish, prefill_s=0.5, decode_s=0.1 * steps)

    def weight_bytes(self, bits: int) -> int:
        return 1000 * bits


JOB = {"artifact": "a", "bits": 4, "prompt_tokens": 6, "new_tokens": 8, "threads": None}


def test_a_round_goes_on_until_enough_tokens_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_worker, "memory_bytes_per_s", lambda threads: 1e9)
    found = latency_worker.run(JOB, Engine)
    assert (found.decoded_tokens, found.decode_s) == (
        8,
        pytest.approx(0.8),
    )  # two texts of 4 tokens and the end, less 1
    assert (found.threads, found.prefill_s, found.weight_bytes_read_per_token) == (2, 0.5, 4000)
    monkeypatch.setattr(Engine, "lasts", 0)
    with pytest.raises(ValueError, match="nothing to time"):
        latency_worker.run(JOB, Engine)


def test_a_round_opens_the_engine_as_the_job_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_worker, "memory_bytes_per_s", lambda threads: 1e9)
    seen: dict[str, Any] = {}

    def opened(path: str, *, kv: str, activations: str, **options: Any) -> Engine:
        seen.update(kv=kv, activations=activations)
        return Engine(path, **options)

    latency_worker.run(JOB | {"kv": "int4", "activations": "float"}, opened)
    assert seen == {"kv": "int4", "activations": "float"}


def test_prompts_differ_start_with_bos_and_hold_no_end() -> None:
    engine = Engine("a", threads=None, context=None)
    prompts = [latency_worker.prompt(engine, 128, salt) for salt in range(9)]
    assert all(len(p) == 128 and p[0] == 0 and not {0, 1} & set(p[1:]) for p in prompts)
    assert len({tuple(p) for p in prompts}) == 9


def test_memory_is_read_by_all_threads() -> None:
    assert latency_worker.memory_bytes_per_s(2, size_bytes=1 << 20, rounds=1) > 1e6


def one(**changes: Any) -> LatencyRound:
    fields = {"bits": 4, "threads": 2, "prompt_tokens": 10, "decoded_tokens": 20, "load_s": 1.0, "prefill_s": 2.0}
    fields |= {"decode_s": 4.0, "time_to_first_token_s": 2.1, "peak_rss_bytes": 100, "foreign_cores": 0.1}
    fields |= {"weight_bytes_read_per_token": 1000, "memory_bytes_per_s": 10_000.0}
    return LatencyRound(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_row_holds_medians_and_the_largest_peak() -> None:
    row = summarize([one(), one(decode_s=5.0, peak_rss_bytes=300), one(decode_s=40.0, foreign_cores=None)])
    assert (row.rounds, row.prefill_tokens_per_s, row.decode_tokens_per_s) == (3, 5.0, 4.0)
    assert (row.peak_rss_bytes, row.foreign_cores, row.bandwidth_share) == (300, 0.1, 0.4)
    assert row.decode_limit_tokens_per_s == 10.0


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_small_artifact(tmp_path / "x.lilliput")
    return tmp_path / "x.lilliput"


def test_rounds_go_through_all_widths_in_turn(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    jobs: list[dict[str, Any]] = []

    def fake(job: dict[str, Any], timeout_s: float) -> LatencyRound:
        jobs.append(job)
        return one(bits=job["bits"])

    monkeypatch.setattr(latency, "_round", fake)
    engine = SimpleNamespace(artifact=SimpleNamespace(path=artifact), threads=3)
    rows = bench(engine, bits=[4, 2], rounds=2, prompt_tokens=32, new_tokens=32)  # type: ignore[arg-type]
    assert [job["bits"] for job in jobs] == [4, 2, 4, 2]
    assert [row.bits for row in rows] == [4, 2]
    assert (jobs[0]["artifact"], jobs[0]["threads"]) == (str(artifact), 3)


def test_bench_refuses_what_it_cannot_time() -> None:
    with pytest.raises(ConfigError, match=r"bench: new_tokens is 1\. Give 2 or more\."):
        bench("a", bits=[4], new_tokens=1)


def test_bench_says_before_any_process_what_the_artifact_cannot_do(artifact: Path) -> None:
    with pytest.raises(ConfigError, match=r"bits: the artifact has no 5 bits\. It serves 2, 3, 4, 8\."):
        bench(artifact, bits=[5])
    with pytest.raises(OutOfResource, match=r"bench: 200 tokens of prompt and answer exceed the context of 128\."):
        bench(artifact, bits=[4], prompt_tokens=100, new_tokens=100)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (
            "import sys; print('a: b. c.', file=sys.stderr); sys.exit(1)",
            ConfigError,
            r"the process failed \(a: b\. c\.\)",
        ),
        ("print('{}')", ConfigError, r"it said '\{\}\\n' \(ValidationError\)"),
        ("pass", ConfigError, "it said ''"),
        ("import os; os.kill(os.getpid(), 9)", OutOfResource, r"timing 4 bits: the process was ended by signal 9\."),
        ("import time; time.sleep(60)", OutOfResource, "not done after 0.5 s"),
    ],
)
def test_a_process_that_fails_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, code: str, kind: Any, said: str
) -> None:
    real = latency.subprocess.run
    monkeypatch.setattr(
        latency.subprocess, "run", lambda command, **kwargs: real([command[0], "-S", "-c", code], **kwargs)
    )
    with pytest.raises(kind, match=said):
        bench(artifact, bits=[4], rounds=1, prompt_tokens=8, new_tokens=8, timeout_s=0.5 if "sleep" in code else 60)
