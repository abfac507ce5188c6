"""Errors a caller can act on, and the exit code each one means to a shell.

Each carries what was wrong, where, and what to do; the command line prints that as one line. A traceback, by
contrast, means the fault is ours.
"""

from typing import ClassVar


class LilliputError(Exception):
    """Something the caller can act on. `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}."


class ConfigError(LilliputError, ValueError):
    """An option or a recipe that makes no sense."""

    exit_code = 2


class UnknownName(LilliputError, LookupError):
    """A method, schedule, metric or recipe nobody registered."""

    exit_code = 2


class InputMissing(LilliputError, FileNotFoundError):
    """A file or folder that is not there."""

    exit_code = 3


class InputCorrupt(LilliputError, ValueError):
    """A file that is truncated, malformed, or does not match its checksum."""

    exit_code = 3


class InputUnsafe(LilliputError, ValueError):
    """A file we refuse to open because opening it could run code."""

    exit_code = 3


class Unsupported(LilliputError, NotImplementedError):
    """An architecture, format or feature that is known but not served."""

    exit_code = 4


class OutOfResource(LilliputError, RuntimeError):
    """Not enough memory, disk or context for what was asked."""

    exit_code = 5


class QualityFailed(LilliputError, RuntimeError):
    """The result was made but is worse than its gate allows."""

    exit_code = 6


class Interrupted(LilliputError, RuntimeError):
    """Stopped by the user; what was done is kept and the message says how to go on."""

    exit_code = 130
