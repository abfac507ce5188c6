"""The command line: one file a verb, imported only when its verb is asked for.

A verb parses, calls the library and prints one result. What every verb shares is here: how errors become exit codes,
and that nothing but the result reaches stdout.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from lilliput import __version__
from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output
from lilliput.core.errors import LilliputError

VERBS = {
    "inspect": "Describe a checkpoint or an artifact.",
    "compress": "Make one artifact of several bit widths from a checkpoint.",
    "run": "Continue a prompt.",
    "schedule": "Find the widths to decode a task at, and keep them.",
    "eval": "Measure quality at each width, beside the original.",
    "bench": "Measure speed and memory at each width.",
    "verify": "Check every byte of an artifact.",
    "export": "Write an integer artifact in another runtime's form.",
    "serve": "Answer OpenAI-compatible requests over HTTP.",
    "methods": "List the methods and their options.",
    "recipes": "List the recipes, or show one.",
    "doctor": "Say what this machine and this install can do.",
}
EXTRA_OF = dict.fromkeys(("torch", "transformers", "huggingface_hub", "pyarrow", "PIL"), "compress")
EXTRA_OF |= {"starlette": "serve", "uvicorn": "serve", "onnx": "export", "onnxruntime": "export"}
OK, BUG, USAGE, UNSUPPORTED, RESOURCE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 4, 5, 130, 141

_PLACE = {
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EACCES: "the system does not allow it",
    errno.EPERM: "the system does not allow it",
    errno.EROFS: "it is on a read-only disk",
}


class Verbs(click.Group):
    """The group of verbs; listing them imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"lilliput.apps.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@common
@click.group(cls=Verbs, context_settings={"auto_envvar_prefix": "LILLIPUT", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Make language models small, and run them on the CPU.

    Every option has a twin in the environment: LILLIPUT_, the verb, the option, as in LILLIPUT_RUN_BITS=4.

    \b
    Exit codes: 0 done, 1 a bug (with a traceback), 2 usage, 3 input missing, corrupt or unsafe, 4 unsupported,
    5 out of memory, disk or context, 6 the quality gate failed, 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if args is None else args)
    out = Output(json="--json" in given)
    try:
        code = cli.main(given, prog_name="lilliput", standalone_mode=False, obj=out)
        sys.stdout and sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # click turns a broken pipe into sys.exit, and nothing else here does that
        _silence_stdout()
        return BROKEN_PIPE
    except BaseException as error:
        return _report(error, out)
    return code if isinstance(code, int) else OK


def _report(error: BaseException, out: Output) -> int:
    """Say on stderr what went wrong, and as a JSON document where one was asked for; return the exit code."""
    code, message, details = _explain(error)
    try:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        if code == BUG:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            message += ". This is a bug in Lilliput, please report it with the lines above"
        click.echo(f"error: {message}", err=True)
        if out.json:
            out.document({"error": {"type": type(error).__name__, "message": message, "exit_code": code} | details})
            sys.stdout and sys.stdout.flush()
    except OSError:  # nobody listens any more; the code still tells
        _silence_stdout()
    return code


def _explain(error: BaseException) -> tuple[int, str, dict[str, Any]]:
    """The exit code, the line, and further fields of an error."""
    if isinstance(error, LilliputError):
        return error.exit_code, str(error), {"what": error.what, "where": error.where, "fix": error.fix}
    if isinstance(error, click.ClickException):
        return error.exit_code if error.exit_code != 1 else USAGE, error.format_message(), {}
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED, "interrupted", {}
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
        fix = f"Run: pip install 'lilliput[{EXTRA_OF[error.name]}]'"
        return UNSUPPORTED, f"{error.name}: this needs a package that is not installed. {fix}", {}
    if isinstance(error, MemoryError):
        return RESOURCE, "out of memory. Use a smaller --context, fewer --bits or a smaller model", {}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RESOURCE, f"{error.filename or 'output'}: no space left on the device. Free some and run again", {}
    if isinstance(error, OSError) and error.errno in _PLACE:
        return USAGE, f"{error.filename or 'output'}: {_PLACE[error.errno]}. Give another place", {}
    return BUG, f"{type(error).__name__}: {error}", {}


def _silence_stdout() -> None:
    """Keep the interpreter's last flush from complaining about a reader that has gone."""
    try:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no such descriptor: then there is nothing to silence
        pass
