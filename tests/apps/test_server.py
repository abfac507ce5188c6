"""The HTTP server over an engine that is not one: requests in, answers, refusals and disconnects out."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from lilliput.apps.server import Limits, create_app, serve
from lilliput.apps.server.app import Sampling
from lilliput.core.errors import ConfigError, OutOfResource
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.text import parse

HOME = "http://127.0.0.1:8080"


@dataclass
class Made:
    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: str


class Letters:
    """A tokenizer of one token a character."""

    template = True

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [0, *map(ord, text)]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        if not self.template:
            raise ConfigError("this model has no chat template", "fake", "Give a plain prompt")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class Echo:
    """Says a, b, c, ... one token at a time; `pause` holds every token back."""

    def __init__(self) -> None:
        self.tokenizer, self.bits, self.context = Letters(), (2, 4), 64
        self.pause, self.seen, self.running, self.most_running, self.said = 0.0, [], 0, 0, 0
        self.fail: Exception | None = None
        self.began = threading.Event()

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        bits: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        on_token: Callable[[str], bool | None] | None,
        schedule: Schedule | None = None,
    ) -> Made:
        self.seen.append(
            {"prompt": list(prompt), "max": max_new_tokens, "bits": bits, "sampling": sampling, "stop": stop}
            | ({} if schedule is None else {"schedule": schedule})
        )
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.began.set()
        try:
            if self.fail is not None:
                raise self.fail
            tokens, reason = [], "length"
            for i in range(max_new_tokens):
                time.sleep(self.pause)
                tokens.append(ord("a") + i % 26)
                self.said = len(tokens)
                if on_token is not None and on_token(chr(tokens[-1])) is False:
                    reason = "cancelled"
                    break
            return Made(len(prompt), tokens, "".join(map(chr, tokens)), reason)
        finally:
            self.running -= 1


@pytest.fixture
def engine() -> Echo:
    return Echo()


@pytest.fixture
def client(engine: Echo) -> Iterator[TestClient]:
    app = create_app(engine, name="tiny", limits=Limits(queue=1, body_bytes=4096))
    with TestClient(app, base_url=HOME, raise_server_exceptions=False) as it:
        yield it


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_health_and_models_say_the_context_and_the_widths(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert (model["context"], model["bits"], model["default_bits"]) == (64, [2, 4], 4)


def test_a_completion_has_text_usage_and_a_reason(client: TestClient, engine: Echo) -> None:
    asked = {"model": "tiny", "prompt": "hey", "max_tokens": 3, "bits": 2, "stop": "z", "seed": 7, "temperature": 0}
    answer = client.post("/v1/completions", json=asked).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "abc", "finish_reason": "length", "logprobs": None}]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert (answer["bits"], answer["seed"]) == (2, 7)
    assert engine.seen[0]["stop"] == ("z",)
    assert engine.seen[0]["sampling"] == Sampling(temperature=0.0, seed=7)


def test_requests_without_a_width_follow_the_schedule(engine: Echo) -> None:
    schedule = parse("4@0,2@9")
    app = create_app(engine, name="tiny", schedule=schedule)
    with TestClient(app, base_url=HOME) as it:
        (model,) = it.get("/v1/models").json()["data"]
        assert (model["default_bits"], model["default_schedule"]) == (None, "4@0,2@9")
        answer = it.post("/v1/completions", json={"prompt": "hey", "max_tokens": 3}).json()
        assert (answer["bits"], answer["schedule"]) == (None, "4@0,2@9")
        answer = it.post("/v1/completions", json={"prompt": "hey", "max_tokens": 3, "bits": 2}).json()
        assert answer["bits"] == 2
        assert "schedule" not in answer
    assert [(seen["bits"], seen.get("schedule")) for seen in engine.seen] == [(None, schedule), (2, None)]


def test_a_chat_goes_through_the_models_own_template(client: TestClient, engine: Echo) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 2}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ab"}
    assert engine.seen[0]["prompt"] == [0, *map(ord, "<system>be kind<user>hi")]


def test_a_model_without_a_template_answers_400_not_a_guess(client: TestClient, engine: Echo) -> None:
    engine.tokenizer.template = False
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "messages: this model has no chat template"


def test_a_stream_is_pieces_then_a_reason_then_usage_then_done(client: TestClient) -> None:
    asked = {"prompt": "hey", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/completions", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    pieces = events(answer.text)
    assert [p["choices"][0]["text"] for p in pieces[:-1]] == ["a", "b", ""]
    assert [p["choices"][0]["finish_reason"] for p in pieces[:-1]] == [None, None, "length"]
    assert all(p["usage"] is None for p in pieces[:-1])
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["total_tokens"] == 6


def test_a_chat_stream_begins_with_the_role(client: TestClient) -> None:
    asked = {"messages": [{"role": "user", "content": "h"}], "max_tokens": 2, "stream": True}
    pieces = events(client.post("/v1/chat/completions", json=asked).text)
    deltas = [p["choices"][0]["delta"] for p in pieces]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    assert len({p["id"] for p in pieces}) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 2}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": -1}, "seed"),
        ({"bits": 3}, "bits"),
        ({"bits": 0}, "bits"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [["x"]]}, "stop"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"tools": []}, "tools"),
        ({"stream_options": {"include_usage": True}}, None),
    ],
)
def test_a_field_out_of_range_is_named_in_a_400(client: TestClient, change: dict[str, Any], param: str | None) -> None:
    answer = client.post("/v1/completions", json={"prompt": "hey", "max_tokens": 2} | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").split(".")[0] == (param or "")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 4000, b'{"prompt": NaN}', b"\xff", b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_is_a_400(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_a_body_must_be_json_by_its_header_and_small(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b'{"prompt": "x"}').status_code == 415
    big = client.post("/v1/completions", json={"prompt": "x" * 5000})
    assert big.status_code == 413


def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(client: TestClient, engine: Echo) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x" * 60, "max_tokens": 10})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["message"] == (
        "the prompt has 61 tokens and 10 were asked for, but the context holds 64"
    )
    assert engine.seen == []


def test_without_max_tokens_the_answer_ends_with_the_context(client: TestClient, engine: Echo) -> None:
    client.post("/v1/completions", json={"prompt": "x" * 60})
    assert engine.seen[0]["max"] == 3


def test_another_model_is_not_found(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "gpt", "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/engines").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/engines").json()["error"]["type"] == "invalid_request_error"


def test_an_exception_is_a_generic_500_and_the_server_goes_on(
    client: TestClient, engine: Echo, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail = RuntimeError("secret at 0x7f00")
    answer = client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret at 0x7f00" in caplog.text
    streamed = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert events(streamed.text)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in streamed.text
    engine.fail = None
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "169.254.1.1"])
def test_a_loopback_server_answers_only_loopback_names(client: TestClient, host: str) -> None:
    answer = client.get("/v1/models", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost:8080", "LOCALHOST", "127.0.0.1:1", "[::1]:8080"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


def test_other_origins_are_refused_and_no_cors_header_is_sent(client: TestClient) -> None:
    assert client.get("/health", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/health", headers={"origin": "null"}).status_code == 403
    same = client.get("/health", headers={"origin": HOME})
    assert same.status_code == 200
    assert not [name for name in same.headers if name.startswith("access-control")]


def test_a_key_is_asked_for_everywhere_but_health(engine: Echo) -> None:
    app = create_app(engine, name="tiny", host="0.0.0.0", api_key="s3cret")
    with TestClient(app, base_url="http://box.example") as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "s3cret"}, {"authorization": "Bearer "}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200


async def ask(app: Any, body: dict[str, Any], gone: anyio.Event | None = None) -> list[dict[str, Any]]:
    """Send one request straight to the application; `gone` is when the client leaves."""
    sent: list[dict[str, Any]] = []
    data = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        if data:
            return data.pop()
        await (gone or anyio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(engine: Echo, stream: bool) -> None:
    engine.pause, engine.context = 0.005, 5000
    app = create_app(engine, name="tiny")

    async def scene() -> None:
        gone = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(ask, app, {"prompt": "x", "max_tokens": 4000, "stream": stream}, gone)
            await anyio.to_thread.run_sync(engine.began.wait)
            gone.set()
        assert engine.said < 4000
        assert engine.running == 0
        sent = await ask(app, {"prompt": "x", "max_tokens": 1})
        assert sent[0]["status"] == 200

    anyio.run(scene)


def test_one_generation_at_a_time_and_a_full_line_is_429(engine: Echo) -> None:
    engine.pause = 0.02
    app = create_app(engine, name="tiny", limits=Limits(queue=2))
    statuses: list[int] = []

    async def one() -> None:
        sent = await ask(app, {"prompt": "x", "max_tokens": 5})
        statuses.append(sent[0]["status"])

    async def scene() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(one)
        assert (await ask(app, {"prompt": "x", "max_tokens": 1}))[0]["status"] == 200

    anyio.run(scene)
    assert sorted(statuses) == [200, 200, 200, 429, 429]
    assert engine.most_running == 1


def test_a_request_whose_client_left_the_line_is_never_started(engine: Echo) -> None:
    engine.pause = 0.01
    app = create_app(engine, name="tiny")

    async def scene() -> None:
        gone = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(ask, app, {"prompt": "first", "max_tokens": 20})
            await anyio.to_thread.run_sync(engine.began.wait)
            group.start_soon(ask, app, {"prompt": "second", "max_tokens": 20}, gone)
            await anyio.sleep(0.02)
            gone.set()

    anyio.run(scene)
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    ("host", "key", "loud"), [("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False)]
)
def test_listening_elsewhere_without_a_key_is_warned_about(
    engine: Echo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    key: str | None,
    loud: bool,
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    urls: list[str] = []
    serve(engine, "x/tiny.lilliput", host=host, port=0, api_key=key, ready=urls.append)
    assert urls[0].startswith(f"http://{host}:")
    assert not urls[0].endswith(":0")
    assert ("WITHOUT --api-key" in caplog.text) == loud


def test_a_port_that_is_taken_is_an_error_with_a_way_out(engine: Echo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutOfResource, match=rf"^127\.0\.0\.1:{port}: cannot listen .* Choose another --port"):
            serve(engine, "tiny", port=port)
