"""`lilliput run`: continue a prompt."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, drafts, kv, schedule, threads
from lilliput.apps.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

LONG_PROMPT = 512
"""Tokens of a prompt from which reading it is shown."""
COLOURS = {1: "magenta", 2: "red", 3: "yellow", 4: "green", 5: "green", 6: "cyan", 7: "cyan", 8: "blue"}
"""Of a token, by the width that chose it."""


@common
@click.command("run")
@artifact_argument
@click.option("-p", "--prompt", required=True, help="The text to continue; - reads it from stdin.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Most tokens to write; fewer where the context ends.",
)
@click.option(
    "--bits", type=click.IntRange(1, 8), help="Width to run at; by default the artifact's schedule, or its widest."
)
@schedule
@drafts
@click.option(
    "--show-bits", is_flag=True, help="Colour each token by the width that chose it; off a terminal, mark it."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Draw from the K likeliest; 0 for all."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Least share of the likeliest."
)
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the model's chat template.")
@threads()
@activations
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer together; by default the model's.")
@kv
@click.pass_obj
def command(
    out: Output,
    artifact: str,
    prompt: str,
    max_new_tokens: int,
    bits: int | None,
    schedule: str | None,
    draft_bits: int | None,
    draft_tokens: int,
    show_bits: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int,
    chat: bool,
    threads: int | None,
    context: int | None,
    kv: Literal["float", "int8", "int4"],
    activations: Literal["int8", "float", "integer"],
) -> None:
    """Continue PROMPT with the model in ARTIFACT; the text streams to stdout.

    \b
    JSON: {"bits": int or null, "schedule", "prompt_tokens": int, "tokens": [ids], "text",
           "finish_reason": "stop" | "length", "prefill_s", "decode_s", "prefill_bits", "widths": [int],
           "average_bits", "drafted", "accepted"}
    """
    from lilliput.engine import Engine, Sampling
    from lilliput.engine.schedules.text import parse

    engine = Engine(artifact, threads=threads, context=context, kv=kv, activations=activations)
    chosen = None if schedule is None else parse(schedule)
    followed = chosen if chosen or bits or draft_bits else engine.schedule
    for remark in followed.fitted(engine.bits).remarks(max_new_tokens) if followed else ():
        out.note(remark)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        text = engine.tokenizer.render_chat([{"role": "user", "content": text}])
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )

    show = Shown(marked=show_bits)
    with _reading(out) as told:
        done = engine.generate(
            text,
            max_new_tokens=max_new_tokens,
            bits=bits,
            schedule=chosen,
            draft_bits=draft_bits,
            draft_tokens=draft_tokens,
            sampling=sampling,
            stop=stop,
            on_token=None if out.json else show,
            on_prefill=told,
            on_bits=show.width if show_bits and not out.json else None,
        )
    document = {
        "bits": None if followed else bits or max(engine.bits, default=None),
        "schedule": None if followed is None else str(followed),
        "prompt_tokens": done.prompt_tokens,
        "tokens": list(done.tokens),
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prefill_s": done.prefill_s,
        "decode_s": done.decode_s,
        "prefill_bits": done.prefill_bits or None,
        "widths": list(done.widths),
        "average_bits": done.average_bits,
        "drafted": done.drafted,
        "accepted": done.accepted,
    }
    out.result(document, "")
    speed = len(done.tokens) / done.decode_s if done.decode_s else 0.0
    width = f"{document['bits']} bits" if followed is None else f"prompt at {done.prefill_bits} bits, {followed}"
    if followed is not None and done.average_bits is not None:
        width += f", {done.average_bits:.2f} bits a forward"
    if done.acceptance is not None:
        width += f", {done.acceptance:.0%} of {done.drafted} drafts at {draft_bits} bits kept"
    out.note(f"[{width}, {len(done.tokens)} tokens, {speed:.1f} tokens/s, {done.finish_reason}]")


class Shown:
    """Text on stdout as it comes; `marked` by the width that chose it, in colours or, off a terminal, as [4]."""

    def __init__(self, *, marked: bool) -> None:
        self.marked, self.bits, self.last = marked, 0, 0
        self.console: Console | None = None
        if marked and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            from rich import console

            self.console = console.Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def width(self, bits: int) -> None:
        """Take the width of the token that is shown next."""
        self.bits = bits

    def __call__(self, piece: str) -> None:
        """Show one piece."""
        if self.console is not None:
            self.console.out(piece, style=COLOURS.get(self.bits, "default"), highlight=False, end="")
            return
        if self.marked and piece and self.bits != self.last:
            click.echo(f"[{self.bits}]", nl=False)
            self.last = self.bits
        click.echo(piece, nl=False)


@contextmanager
def _reading(out: Output) -> Iterator[Callable[[int, int], None] | None]:
    """A listener that shows on a terminal how far a long prompt is read, and clears its line before the answer."""
    if out.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return

    def told(done: int, total: int) -> None:
        if total > LONG_PROMPT:
            text = f"reading the prompt: {done} of {total} tokens" if done < total else ""
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    yield told
