"""Options that several verbs take, and how their values are read."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lilliput.apps.cli.output import Output
from lilliput.measure.memory import parse_size

F = TypeVar("F", bound=Callable[..., Any] | click.Command)


def byte_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read "8GiB" as bytes; the callback of an option."""
    return None if value is None else parse_size(value)


def budgets(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[float, ...] | None:
    """Read "2.8,3.6,4.6", or one number, as bits a weight; the callback of an option that may be repeated."""
    try:
        return tuple(float(part) for value in values for part in value.split(",")) or None
    except ValueError:
        what = f"{','.join(values)!r} is neither a number nor a list of them. Write 3.2 or 2.8,3.6,4.6."
        raise click.BadParameter(what, ctx, param) from None


def _widths(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[int] | None:
    parts = [part.strip() for value in values for part in value.split(",")]
    if not all(part in tuple("12345678") for part in parts):
        raise click.BadParameter(f"{','.join(values)!r} is no list of widths. Write 4 or 2,3,4,8.", ctx, param)
    return sorted({int(part) for part in parts}) or None


def max_ram(command: F) -> F:
    """`--max-ram`, a size in bytes."""
    text = "Refuse to start when more memory than this would be needed: 8GiB, 500MB, or bytes."
    return click.option("--max-ram", callback=byte_size, metavar="SIZE", help=text)(command)


def widths(help: str) -> Callable[[F], F]:
    """`--bits` as a list: repeated flags and commas both work. None when not given."""
    return click.option("--bits", multiple=True, callback=_widths, metavar="N[,N...]", help=help)


def threads(default: int | None = None) -> Callable[[F], F]:
    """`--threads`, the number of threads of the engine."""
    text = "Threads of the engine." if default else "Threads of the engine; by default as many as the process may use."
    return click.option("--threads", type=click.IntRange(1, 1024), default=default, show_default=True, help=text)


def activations(command: F) -> F:
    """`--activations`, what enters a quantized matrix."""
    text = (
        "What enters a quantized matrix: rounded to int8, which is faster, or float as it is; integer runs the integer "
        "graph of an artifact that has one, never by itself."
    )
    choice = click.Choice(["int8", "float", "integer"])
    return click.option("--activations", type=choice, default="int8", show_default=True, help=text)(command)


def kv(command: F) -> F:
    """`--kv`, how keys and values are kept while an answer is made."""
    text = "How keys and values are kept; int8 takes about 0.27 of the memory, int4 0.16 where long; neither is exact."
    choice = click.Choice(["float", "int8", "int4"])
    return click.option("--kv", type=choice, default="float", show_default=True, help=text)(command)


def schedule(command: F) -> F:
    """`--schedule`, the widths of an answer step by step, as text."""
    text = (
        "A width for each step, such as 4@0,3@85,2@170 or NAME:option=value,..; by default the artifact's own, if any."
    )
    return click.option("--schedule", metavar="STEPS|NAME", help=text)(command)


def drafts(command: F) -> F:
    """`--draft-bits` and `--draft-tokens`: a narrow width drafts, the width of the answer reads its drafts."""
    for flag, kind, default, text in (
        ("--draft-tokens", click.IntRange(1, 64), 8, "Most tokens drafted at a time."),
        ("--draft-bits", click.IntRange(1, 8), None, "Draft at this width and verify at --bits: faster, same tokens."),
    ):
        command = click.option(flag, type=kind, default=default, show_default=default is not None, help=text)(command)
    return command


def common(command: F) -> F:
    """`--json` and `--quiet`, which may stand before the verb or after it."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and param.name:
            setattr(ctx.ensure_object(Output), param.name, True)

    for flag, text in (
        ("--quiet", "No progress and no remarks on stderr; errors still show."),
        ("--json", "Print the result as one JSON document on stdout."),
    ):
        command = click.option(flag, is_flag=True, expose_value=False, is_eager=True, callback=note, help=text)(command)
    return command


def artifact_argument(command: F) -> F:
    """The argument ARTIFACT: a folder that `compress` made. Whether it exists is the library's to say."""
    return click.argument("artifact", type=click.Path())(command)
