"""How long work tells what it is doing, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """A listener for one long piece of work; the command line draws it, a program may ignore it.

    `begin` opens a phase of `total` units (bytes, tokens, ..), of which `done` were finished by an earlier run and
    must not count in an estimate of the time left; `advance` adds units; `say` is one line of news.
    """

    def begin(self, label: str, total: int, done: int = 0) -> None: ...
    def advance(self, units: int) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """A Progress that tells nobody."""

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """Ignore it."""

    def advance(self, units: int) -> None:
        """Ignore it."""

    def say(self, text: str) -> None:
        """Ignore it."""
