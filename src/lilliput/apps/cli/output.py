"""What reaches the terminal: one result on stdout; progress and remarks on stderr."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lilliput.core.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY_S = 5.0


@dataclass
class Output:
    """How one command was asked to talk. Verbs get it through click's context."""

    json: bool = False
    quiet: bool = False

    def result(self, document: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """Print the result: `document` when JSON was asked for, else `text`."""
        if self.json:
            self.document(document)
        else:
            click.echo(text if isinstance(text, str) else text())

    def document(self, document: Mapping[str, Any]) -> None:
        """Print one JSON document. JSON knows no infinity and no NaN: they become null."""
        click.echo(json.dumps(_finite(document), ensure_ascii=False, indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A listener for long work: a bar on a terminal, else a plain line every few seconds."""
        if self.quiet:
            yield Silent()
        elif sys.stderr is not None and sys.stderr.isatty():
            with _Bar() as bar:
                yield bar
        else:
            yield _Lines()


class _Lines:
    """Plain lines for logs: when a phase begins, every few seconds, when it ends."""

    def __init__(self) -> None:
        self.label, self.total, self.before, self.done, self.start, self.last = "", 0, 0, 0, 0.0, 0.0

    def begin(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.before, self.done = label, total, done, done
        self.start = self.last = time.monotonic()
        self.say(f"{label} ..." if not done else f"{label} ... going on at {done / max(total, 1):.0%}")

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.last < EVERY_S and self.done < self.total:
            return
        self.last, spent = now, now - self.start
        if self.done >= self.total:
            self.say(f"{self.label}: done in {spent:.1f} s")
        else:
            left = spent / max(self.done - self.before, 1) * (self.total - self.done)
            self.say(f"{self.label}: {self.done / self.total:.0%}, about {left:.0f} s left")

    def say(self, text: str) -> None:
        click.echo(text, err=True)


class _Bar:
    """A rich progress bar on stderr; one task a phase."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bars = Bars(*columns, console=Console(stderr=True), speed_estimate_period=60)
        self.bars.start()
        self.task: TaskID | None = None
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def begin(self, label: str, total: int, done: int = 0) -> None:
        self.task = self.bars.add_task(label, total=total, completed=done)

    def advance(self, units: int) -> None:
        if self.task is not None:
            self.bars.advance(self.task, units)

    def say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as plain aligned text. `columns`: key of a row to the heading; keys no row has are left out."""
    shown = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [list(shown.values())] + [[_cell(row.get(key)) for key in shown] for row in rows]
    size = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, size, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in size), *lines[1:]])


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values, one a line, aligned; values that are None are left out."""
    shown = {key: value for key, value in values.items() if value is not None}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{key.ljust(width)}  {_cell(value)}" for key, value in shown.items())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
