"""The endpoints: what OpenAI's clients call, over one engine."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lilliput.apps.server.guard import Guard, Limits, RequestError, read_body
from lilliput.apps.server.schema import ChatRequest, CompletionRequest
from lilliput.apps.server.turns import Job, Turns
from lilliput.core.errors import LilliputError
from lilliput.engine.sampling import Sampling
from lilliput.engine.schedules.base import Schedule

log = logging.getLogger("lilliput.server")
R = TypeVar("R", CompletionRequest, ChatRequest)


class Generated(Protocol):
    """The part of `Generation` used here."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str: ...


class Encoder(Protocol):
    """The part of `Tokenizer` used here."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]: ...
    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str: ...


class Generator(Protocol):
    """The part of `Engine` used here."""

    @property
    def tokenizer(self) -> Encoder: ...
    @property
    def bits(self) -> tuple[int, ...]: ...
    @property
    def context(self) -> int: ...
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
    ) -> Generated: ...


def create_app(
    engine: Generator,
    *,
    name: str,
    host: str = "127.0.0.1",
    bits: int | None = None,
    schedule: Schedule | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
) -> Starlette:
    """Return the ASGI application that serves `engine` under the model name `name`.

    host: the address it will be bound to; on a loopback address only loopback names are answered. bits: the width of
    requests that name none; otherwise those follow the schedule, if there is one, or run at the widest.
    """
    default = bits or (max(engine.bits, default=None) if schedule is None else None)
    service = _Service(engine, name, default, None if bits else schedule, limits or Limits())
    routes = [
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {RequestError: _refuse, HTTPException: _not_found, Exception: _crash}
    guard = Middleware(Guard, host=host, api_key=api_key)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[guard])


@dataclass(frozen=True)
class _Task:
    """One request, checked: everything the engine needs."""

    prompt: list[int]
    most: int
    bits: int | None
    sampling: Sampling
    stops: tuple[str, ...]


class _Service:
    def __init__(
        self, engine: Generator, name: str, bits: int | None, schedule: Schedule | None, limits: Limits
    ) -> None:
        self.engine, self.name, self.bits, self.schedule, self.limits = engine, name, bits, schedule, limits
        self.turns, self.started = Turns(limits.queue), int(time.time())

    async def health(self, request: Request) -> Response:
        """Alive, and the model is loaded."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model, with the context and the widths it really serves."""
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "lilliput"}
        served = {"context": self.engine.context, "bits": list(self.engine.bits), "default_bits": self.bits}
        served |= {} if self.schedule is None else {"default_schedule": str(self.schedule)}
        return JSONResponse({"object": "list", "data": [model | served]})

    async def completions(self, request: Request) -> Response:
        """Continue one prompt."""
        asked = await self.read(request, CompletionRequest)
        task = await self.task(asked, "prompt", lambda: asked.text, asked.max_tokens)
        return await self.answer(request, asked, task, _Text())

    async def chat(self, request: Request) -> Response:
        """Answer the last message of a chat, by the model's own template."""
        asked = await self.read(request, ChatRequest)
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RequestError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
        messages = [message.plain for message in asked.messages]
        most = asked.max_completion_tokens or asked.max_tokens
        task = await self.task(asked, "messages", partial(self.engine.tokenizer.render_chat, messages), most)
        return await self.answer(request, asked, task, _Chat())

    async def read(self, request: Request, model: type[R]) -> R:
        """The request, checked by its schema. Raises RequestError."""
        body = await read_body(request, self.limits)
        try:
            asked = model.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param = ".".join(map(str, first["loc"])) or None
            raise RequestError(400, f"{param or 'body'}: {first['msg']}", param=param) from None
        if asked.model not in (None, self.name):
            what = f"the model {asked.model!r} is not here; this server has {self.name!r}"
            raise RequestError(404, what, param="model", code="model_not_found")
        if asked.bits is not None and asked.bits not in self.engine.bits:
            served = ", ".join(map(str, self.engine.bits))
            raise RequestError(400, f"bits: {asked.bits} is not served; choose from {served}", param="bits")
        return asked

    async def task(
        self, asked: CompletionRequest | ChatRequest, param: str, text: Callable[[], str], most: int | None
    ) -> _Task:
        """Take a place in the line and make everything the engine needs; whoever answers gives the place back.

        text: makes the prompt, in a thread. A prompt that does not fit is refused, never cut. Raises RequestError.
        """
        self.turns.admit()
        try:
            prompt = await anyio.to_thread.run_sync(lambda: self.engine.tokenizer.encode(text()))
            return self.fitted(asked, param, prompt, most)
        except BaseException as error:
            self.turns.leave()
            if isinstance(error, LilliputError):
                log.warning("refused: %s", error)
                raise RequestError(400, f"{param}: {error.what}", param=param) from error
            raise

    def fitted(self, asked: CompletionRequest | ChatRequest, param: str, prompt: list[int], most: int | None) -> _Task:
        """The task, if prompt and answer fit in the context. Raises RequestError."""
        context, count = self.engine.context, len(prompt)
        if not prompt:
            raise RequestError(400, "the prompt is empty", param=param)
        if count + (most or 1) > context:
            what = f"the prompt has {count} tokens and {most or 1} were asked for, but the context holds {context}"
            raise RequestError(400, what, param=param, code="context_length_exceeded")
        sampling = Sampling(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            seed=secrets.randbelow(1 << 32) if asked.seed is None else asked.seed,
        )
        most = most or min(self.limits.default_tokens, context - count)
        return _Task(prompt, most, asked.bits or self.bits, sampling, asked.stops)

    async def answer(
        self, request: Request, asked: CompletionRequest | ChatRequest, task: _Task, shape: "_Shape"
    ) -> Response:
        """Generate, and answer at once or in pieces."""
        head = {
            "id": f"{shape.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.name,
            "bits": task.bits,
            "seed": task.sampling.seed,
        } | ({} if task.bits or self.schedule is None else {"schedule": str(self.schedule)})
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _Stream(self, task, shape, head, usage=usage)
        return await self.whole(request, task, shape, head)

    async def whole(self, request: Request, task: _Task, shape: "_Shape", head: dict[str, Any]) -> Response:
        """The whole answer in one document. A client that leaves ends the generation."""
        job, pieces, done = Job(), [], None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, request.receive, job)
                async with aclosing(job.run(partial(self.generate, task), self.turns)) as items:
                    async for item in items:
                        if isinstance(item, str):
                            pieces.append(item)
                        else:
                            done = item
                group.cancel_scope.cancel()
        except* Exception as errors:
            raise _explain(errors.exceptions[0]) from errors
        finally:
            self.turns.leave()
        if done is None:
            return Response(status_code=499)
        choice = {"index": 0, **shape.whole("".join(pieces)), "finish_reason": done.finish_reason, "logprobs": None}
        return JSONResponse({**head, "object": shape.kind, "choices": [choice], "usage": _usage(done)})

    def generate(self, task: _Task, on_token: Callable[[str], bool]) -> Generated:
        """Run the engine; called in a thread."""
        follows: dict[str, Any] = {} if task.bits or self.schedule is None else {"schedule": self.schedule}
        return self.engine.generate(
            task.prompt,
            max_new_tokens=task.most,
            bits=task.bits,
            sampling=task.sampling,
            stop=task.stops,
            on_token=on_token,
            **follows,
        )


class _Stream(Response):
    """Server-sent events; a client that leaves ends the generation, and the line moves on."""

    def __init__(self, service: _Service, task: _Task, shape: "_Shape", head: dict[str, Any], *, usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.service, self.task, self.shape, self.head, self.usage = service, task, shape, head, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, watching for the client to leave."""
        job = Job()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, receive, job)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async with aclosing(self.events(job)) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
                group.cancel_scope.cancel()
        except* OSError:  # the client has gone, and the send said so
            log.info("a client left")
        finally:
            self.service.turns.leave()

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The events of one answer, `[DONE]` last; an error ends them with an error object."""
        head = {**self.head, "object": self.shape.chunk} | ({"usage": None} if self.usage else {})
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        if first := self.shape.first():
            yield _event({**head, "choices": [{**choice, **first, "finish_reason": None}]})
        try:
            async with aclosing(job.run(partial(self.service.generate, self.task), self.service.turns)) as items:
                async for item in items:
                    if isinstance(item, str):
                        if item:
                            yield _event(
                                {**head, "choices": [{**choice, **self.shape.piece(item), "finish_reason": None}]}
                            )
                        continue
                    last = {**choice, **self.shape.last(), "finish_reason": item.finish_reason}
                    yield _event({**head, "choices": [last]})
                    if self.usage:
                        yield _event({**head, "choices": [], "usage": _usage(item)})
        except Exception as error:
            yield _event(json.loads(bytes(_explain(error).response().body)))
        yield b"data: [DONE]\n\n"


class _Shape(Protocol):
    """How an endpoint wraps text: prefix of ids, object names, and the parts of a choice."""

    prefix: str
    kind: str
    chunk: str

    def whole(self, text: str) -> dict[str, Any]: ...
    def first(self) -> dict[str, Any]: ...
    def piece(self, text: str) -> dict[str, Any]: ...
    def last(self) -> dict[str, Any]: ...


class _Text:
    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first(self) -> dict[str, Any]:
        return {}

    def piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def last(self) -> dict[str, Any]:
        return {"text": ""}


class _Chat:
    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def last(self) -> dict[str, Any]:
        return {"delta": {}}


async def _watch(receive: Receive, job: Job) -> None:
    """End the job when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _usage(done: Generated) -> dict[str, int]:
    prompt, new = done.prompt_tokens, len(done.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(document: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _explain(error: Exception) -> RequestError:
    """What a client may know of an error: all of a RequestError, nothing of ours. The log has the rest."""
    if isinstance(error, RequestError):
        return error
    log.error("a request failed", exc_info=error)
    return RequestError(500, "internal error; the server's log has the details", code="internal_error")


async def _refuse(request: Request, error: RequestError) -> Response:
    return error.response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    return RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


async def _crash(request: Request, error: Exception) -> Response:
    return _explain(error).response()
