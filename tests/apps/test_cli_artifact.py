"""The verbs on a real artifact, of random numbers: what they print is what the library says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from lilliput.apps.cli import main
from lilliput.apps.cli.run import Shown
from lilliput.artifact.amend import set_schedule
from lilliput.core.errors import ConfigError
from lilliput.engine import Engine, Sampling
from lilliput.engine.schedules.text import parse
from lilliput.measure.along import AlongJob, measure_along
from support.small_artifact import write_small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "small.lilliput"
    write_small_artifact(folder)
    return str(folder)


def document(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert main([*args, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def read_document(stream: IO[str]) -> Any:
    """Read lines until they are one JSON document, as whoever starts a server does."""
    text = ""
    while line := stream.readline():
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(f"no document in {text!r}")


def test_inspect_shows_widths_and_manifest(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = document(capsys, "inspect", artifact)
    assert (told["kind"], told["bits"]) == ("artifact", [2, 3, 4, 8])
    sizes = [row["size_bytes"] for row in told["rows"]]
    assert sizes == sorted(sizes)
    assert told["manifest"]["spec"]["num_layers"] == 2
    assert main(["inspect", artifact]) == 0
    assert "2 for keys and values" in capsys.readouterr().out


def test_verify_passes_and_a_changed_byte_is_3(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert document(capsys, "verify", artifact)["ok"]
    broken = tmp_path / "broken.lilliput"
    write_small_artifact(broken)
    file = broken / "bits-2.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    told = document(capsys, "verify", str(broken), code=3)
    assert not told["ok"]
    assert "bits-2.safetensors" in told["problems"][0]
    assert main(["verify", str(broken)]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_run_prints_what_the_engine_says(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(artifact, threads=1)
    expected = engine.generate("ab", max_new_tokens=12, bits=3, sampling=Sampling(temperature=0.9, seed=5))
    args = ["run", artifact, "-p", "ab", "-n", "12", "--bits", "3", "--temperature", "0.9", "--seed", "5"]
    told = document(capsys, *args)
    assert (told["bits"], told["tokens"], told["text"]) == (3, list(expected.tokens), expected.text)
    assert (told["prompt_tokens"], told["finish_reason"]) == (3, expected.finish_reason)
    assert main([*args, "--threads", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert err.startswith("[3 bits, ")
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_run_refuses_what_cannot_be(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artifact, "-p", "a", "--bits", "5"]) == 2
    assert "2, 3, 4, 8" in capsys.readouterr().err
    assert main(["run", artifact, "-p", "a", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(["run", artifact, "-p", "a" * 200]) == 5
    assert "context of 128" in capsys.readouterr().err


def test_run_follows_a_schedule_and_shows_its_widths(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--schedule", "8@prompt,4@0,2@3"]
    told = document(capsys, "run", artifact, "-p", "ab", "-n", "8", *steps)
    assert (told["schedule"], told["bits"], told["prefill_bits"]) == (steps[1], None, 8)
    assert told["widths"] == [4] * 3 + [2] * 4
    assert told["average_bits"] == 20 / 7
    assert main(["run", artifact, "-p", "ab", "-n", "8", *steps, "--show-bits"]) == 0
    out, err = capsys.readouterr()
    assert out.replace("[8]", "").replace("[4]", "").replace("[2]", "") == told["text"] + "\n"
    assert out.startswith("[")
    assert err.startswith("[prompt at 8 bits, 8@prompt,4@0,2@3, 2.86 bits a forward, 8 tokens, ")
    assert main(["run", artifact, "-p", "ab", "-n", "3", *steps]) == 0
    assert "2@3 lies beyond an answer of 3 tokens" in capsys.readouterr().err
    kept = tmp_path / "kept.lilliput"
    write_small_artifact(kept)
    set_schedule(kept, parse("4@0,2@2").entry())
    told = document(capsys, "run", str(kept), "-p", "ab", "-n", "5")
    assert (told["schedule"], told["widths"]) == ("4@0,2@2", [4, 4, 2, 2])
    told = document(capsys, "run", str(kept), "-p", "ab", "-n", "5", "--bits", "3")
    assert (told["schedule"], told["bits"], told["widths"]) == (None, 3, [3] * 4)


def test_a_terminal_shows_widths_in_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = Shown(marked=True)
    for bits, piece in ((8, "Once [/bold]"), (2, " upon\n")):
        shown.width(bits)
        shown(piece)
    out = capsys.readouterr().out
    assert out == "\x1b[34mOnce [/bold]\x1b[0m\x1b[31m upon\x1b[0m\n"


def test_drafts_write_what_the_high_rung_writes(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = document(capsys, "run", artifact, "-p", "ab", "-n", "30", "--bits", "8")
    drafted = document(capsys, "run", artifact, "-p", "ab", "-n", "30", "--bits", "8", "--draft-bits", "3")
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["drafted"] >= drafted["accepted"]
    assert main(["run", artifact, "-p", "ab", "-n", "30", "--bits", "8", "--draft-bits", "3"]) == 0
    assert " drafts at 3 bits kept, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--schedule", "5@0,2@9"], "error: schedule 5@0,2@9: 5 bits are not in this artifact, which has 2, 3, 4, 8. "),
        (["--schedule", "3@0,4@9"], "error: schedule 3@0,4@9: the widths do not fall. "),
        (["--schedule", "entropi"], "error: schedule: 'entropi' is not known. Try entropy."),
        (["--schedule", "4", "--bits", "4"], "error: bits: a width and a schedule were given. "),
        (["--draft-bits", "8"], "error: draft_bits: drafts at 8 bits are no cheaper than the answer at 8. "),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line_and_2(
    artifact: str, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["run", artifact, "-p", "a", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_eval_has_a_row_a_width_and_no_original_where_none_was_given(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words to measure on, again and again\n" * 5)
    told = document(capsys, "eval", artifact, "--text", str(text), "--bits", "2,4", "--length", "32", "--limit", "3")
    assert [row["bits"] for row in told["rows"]] == [2, 4]
    assert {row["tokens"] for row in told["rows"]} == {93}
    assert all(row["perplexity"] > 1 and row["kl"] is None for row in told["rows"])
    assert told["original"] is None
    assert main(["eval", artifact, "--text", str(text), "--bits", "2", "--length", "32", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:4] == ["bits", "tokens", "nll", "perplexity"]
    assert "measuring" in err


def test_bench_has_speed_memory_and_the_machine(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--bits", "4", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1", "--threads", "1"]
    told = document(capsys, "bench", artifact, *args)
    (row,) = told["rows"]
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s", "weight_bytes_read_per_token"):
        assert row[key] > 0
    assert "peak_rss_bytes" in row
    assert told["environment"]["cores"] >= 1
    assert row["quality"] is told["reference"] is None  # nobody asked: only speed is measured


def test_bench_times_a_schedule_and_drafts(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--bits", "4", "--prompt-tokens", "8", "--new-tokens", "9", "--rounds", "1", "--threads", "1"]
    told = document(capsys, "bench", artifact, *args, "--schedule", "8@0,2@4", "--draft-bits", "2")
    plain, falling, drafted = told["rows"]
    assert (plain["schedule"], plain["draft_bits"], plain["average_bits"]) == (None, None, None)
    assert (falling["schedule"], falling["bits"]) == ("8@0,2@4", 8)
    assert 2 < falling["average_bits"] < 8
    assert (drafted["draft_bits"], drafted["bits"]) == (2, 4)
    assert told["reference"] == {"text": None, "against": "8 bits"}
    job = AlongJob(prompt_tokens=8, new_tokens=9)
    asked = [parse("4"), parse("8@0,2@4"), parse("4")]
    expected = [one.model_dump(mode="json") for one in measure_along(artifact, job, asked, threads=1)]
    assert [row["quality"] for row in told["rows"]] == expected
    assert falling["quality"]["kl"] > 0
    assert main(["bench", artifact, *args, "--schedule", "5@0"]) == 2
    assert "5 bits are not in this artifact" in capsys.readouterr().err


def test_bench_shows_quality_beside_the_schedule_that_is_kept(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, task = tmp_path / "kept.lilliput", tmp_path / "task.jsonl"
    write_small_artifact(kept)
    set_schedule(kept, parse("4@0,2@4").entry())
    task.write_text('{"prompt": "once", "n": "x"}\n{"prompt": "twice", "n": "x"}\n')
    args = [str(kept), "--prompt-tokens", "8", "--new-tokens", "5", "--rounds", "1", "--threads", "1"]
    assert main(["bench", *args, "--text", str(task), "--field", "prompt", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    head, _, *rows = out.splitlines()
    assert [name for name in ("KL", "top-1 agreement", "bits a forward", "along the text") if name in head] == [
        "KL", "top-1 agreement", "bits a forward", "along the text",
    ]  # fmt: skip
    assert len(rows) == 5
    assert "4@0,2@4" in rows[-1]
    assert "along 1 answers of 8 bits" in err
    assert "2@4 lies beyond an answer of 5 tokens" in err
    (kept / "bits-4.safetensors").unlink()  # a copy without the schedule's widths does without
    (kept / "bits-8.safetensors").unlink()
    told = document(capsys, "bench", *args)
    assert [(row["bits"], row["schedule"], row["quality"]) for row in told["rows"]] == [
        (2, None, None),
        (3, None, None),
    ]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--text", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--schedule", "2@0,4@3"], 2, "the widths do not fall"),
        (["--schedule", "4@0,3@9,2@3"], 2, "the steps are out of order"),
        (["--schedule", "learned"], 2, "Learn it with `lilliput schedule ARTIFACT --method learned`"),
        (["--against", "nowhere"], 3, "nowhere"),
        (["--schedule", "4@0,2@3", "--activations", "integer"], 2, "it has no integer graph"),
        (["--limit", "0", "--schedule", "4"], 2, "0 is not in the range"),
    ],
)
def test_bench_refuses_before_anything_is_timed(
    artifact: str,
    args: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(job: dict[str, Any], timeout_s: float) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr("lilliput.measure.latency._round", timed)
    assert main(["bench", artifact, "--prompt-tokens", "8", "--new-tokens", "8", *args]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert said in lines[0]


def test_kv_reaches_the_engine_of_every_verb(
    artifact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    prompt = "ab" * 45
    expected = Engine(artifact, threads=1, kv="int4").generate(prompt, max_new_tokens=12)
    told = document(capsys, "run", artifact, "-p", prompt, "-n", "12", "--kv", "int4")
    assert told["tokens"] == list(expected.tokens)
    kept: list[str] = []
    monkeypatch.setattr("lilliput.apps.server.serve", lambda engine, *_, **__: kept.append(engine.kv))
    assert main(["serve", artifact, "--kv", "int4"]) == 0

    def round_of(job: dict[str, Any], timeout_s: float) -> None:
        kept.append(job["kv"])
        raise ConfigError("enough", where="here", fix="Nothing")

    monkeypatch.setattr("lilliput.measure.latency._round", round_of)
    args = ["--bits", "4", "--prompt-tokens", "8", "--new-tokens", "8", "--kv", "int8"]
    assert main(["bench", artifact, *args]) == 2
    assert kept == ["int4", "int8"]
    assert main(["run", artifact, "-p", "a", "--kv", "int3"]) == 2


def test_serve_answers_until_interrupted(artifact: str) -> None:
    pytest.importorskip("uvicorn")
    import httpx

    command = [sys.executable, "-m", "lilliput", "serve", artifact, "--port", "0", "--bits", "4", "--json"]
    env = {**os.environ, "LILLIPUT_SERVE_API_KEY": "s3cret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            ready = read_document(server.stdout)
            with httpx.Client(base_url=ready["url"], headers={"authorization": "Bearer s3cret"}, timeout=30) as client:
                assert client.get("/v1/models").json()["data"][0]["id"] == "small"
                asked = {"prompt": "ab", "max_tokens": 4, "temperature": 0}
                told = client.post("/v1/completions", json=asked).json()
                assert told["usage"]["completion_tokens"] <= 4
                assert client.post("/v1/completions", json=asked | {"prompt": "a" * 200}).status_code == 400
        finally:
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=30)
    assert server.returncode in (0, 130), err
    assert "Traceback" not in err
