"""`lilliput run`: continue a prompt."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, kv, threads
from lilliput.apps.cli.output import Output

LONG_PROMPT = 512
"""Tokens of a prompt from which reading it is shown."""


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
@click.option("--bits", type=click.IntRange(1, 8), help="Width to run at; by default the widest.")
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
    JSON: {"bits", "prompt_tokens": int, "tokens": [ids], "text", "finish_reason": "stop" | "length",
           "prefill_s", "decode_s"}
    """
    from lilliput.engine import Engine, Sampling

    engine = Engine(artifact, threads=threads, context=context, kv=kv, activations=activations)
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

    def show(piece: str) -> None:
        click.echo(piece, nl=False)

    with _reading(out) as told:
        done = engine.generate(
            text,
            max_new_tokens=max_new_tokens,
            bits=bits,
            sampling=sampling,
            stop=stop,
            on_token=None if out.json else show,
            on_prefill=told,
        )
    document = {
        "bits": bits or max(engine.bits, default=None),
        "prompt_tokens": done.prompt_tokens,
        "tokens": list(done.tokens),
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prefill_s": done.prefill_s,
        "decode_s": done.decode_s,
    }
    out.result(document, "")
    speed = len(done.tokens) / done.decode_s if done.decode_s else 0.0
    out.note(f"[{document['bits']} bits, {len(done.tokens)} tokens, {speed:.1f} tokens/s, {done.finish_reason}]")


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
