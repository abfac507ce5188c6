"""What stands before every request: who may ask, from where, and how much they may send."""

import hashlib
import hmac
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """How much one server takes on. `queue` requests wait behind the running one; more are told to come back."""

    queue: int = 8
    body_bytes: int = 2 << 20
    body_s: float = 30.0
    default_tokens: int = 256


class RequestError(Exception):
    """An answer with an error in it, in the shape OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        """The error as a response."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse({"error": error}, self.status, headers)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return host.lower() == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks Host, Origin and the key before the application sees a request.

    A page in the user's own browser can reach a loopback server: under a name that its owner points at 127.0.0.1
    (so Host must be a loopback name), or across origins (so Origin, where sent, must be ours).
    """

    def __init__(self, app: ASGIApp, *, host: str, api_key: str | None) -> None:
        self.app, self.local = app, is_loopback(host)
        self.key = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it with the reason why not."""
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope), scope["path"])
            except RequestError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, headers: Headers, path: str) -> None:
        """Raise RequestError when the request must not go on."""
        host = headers.get("host", "")
        if self.local and not is_loopback(_hostname(host)):
            raise RequestError(403, "this server answers to loopback names only", code="host_not_allowed")
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RequestError(403, "requests from other origins are refused", code="origin_not_allowed")
        if self.key is None or path == "/health":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self.key):
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body, JSON by its header, of bounded size and time. Raises RequestError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body must be application/json")
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise RequestError(413, f"the body is larger than {limits.body_bytes} bytes")
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive in {limits.body_s:.0f} s") from None
    return bytes(body)


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
