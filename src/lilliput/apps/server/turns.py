"""One generation at a time: a line of bounded length in front of the engine, and a thread behind it."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

from lilliput.apps.server.guard import RequestError

T = TypeVar("T")


class Turns:
    """A lock with a line of at most `waiting` requests; the next is answered 429."""

    def __init__(self, waiting: int) -> None:
        self._most, self._present, self._lock = waiting + 1, 0, anyio.Lock()

    def admit(self) -> None:
        """Take a place in the line. Raises RequestError when there is none; `leave` gives it back."""
        if self._present >= self._most:
            raise RequestError(429, f"{self._present} requests are running or waiting; try again", code="queue_full")
        self._present += 1

    def leave(self) -> None:
        """Give the place back."""
        self._present -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the engine and hold it."""
        async with self._lock:
            yield


class Job:
    """One generation, running in a thread, whose pieces are read here; `cancel` ends it at the next token."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def cancel(self) -> None:
        """Ask the generation to end; from any thread, at any time."""
        self._stopped.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked."""
        return self._stopped.is_set()

    async def run(self, work: Callable[[Callable[[str], bool]], T], turns: Turns) -> AsyncGenerator[str | T, None]:
        """Yield the pieces that `work(on_token)` makes, then what it returns. Nothing if cancelled before its turn."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def on_token(piece: str) -> bool:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
            return not self.cancelled

        async with turns.turn():
            if self.cancelled:
                return
            future = loop.run_in_executor(None, work, on_token)
            future.add_done_callback(lambda _: pieces.put_nowait(None))
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                yield future.result()
            finally:  # the turn is not over before the thread is, whatever ended this one
                self.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([future])
