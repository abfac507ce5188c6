"""`lilliput serve`: an OpenAI-compatible server on this machine."""

import logging
import sys
from typing import Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, kv, schedule, threads
from lilliput.apps.cli.output import Output


@common
@click.command("serve")
@artifact_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 picks a free one."
)
@click.option(
    "--bits",
    type=click.IntRange(1, 8),
    help="Width of a request that names none; by default as scheduled, or the widest.",
)
@schedule
@click.option("--api-key", help="Ask for this key as a Bearer token; better set in LILLIPUT_SERVE_API_KEY.")
@click.option("--queue", type=click.IntRange(0, 1024), default=8, show_default=True, help="Requests that may wait.")
@threads()
@activations
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer together; by default the model's.")
@kv
@click.pass_obj
def command(
    out: Output,
    artifact: str,
    host: str,
    port: int,
    bits: int | None,
    schedule: str | None,
    api_key: str | None,
    queue: int,
    threads: int | None,
    context: int | None,
    kv: Literal["float", "int8", "int4"],
    activations: Literal["int8", "float", "integer"],
) -> None:
    """Serve ARTIFACT at /v1/completions and /v1/chat/completions until interrupted (needs lilliput[serve]).

    With --json, one document on stdout before the first request: {"url", "model", "bits", "schedule", "context"}.
    """
    from lilliput.apps.server import Limits, model_name, serve
    from lilliput.engine import Engine
    from lilliput.engine.schedules.text import parse

    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    engine = Engine(artifact, threads=threads, context=context, kv=kv, activations=activations)
    if bits is not None and bits not in engine.bits:
        what = f"{bits} bits are not in {artifact}, which has {', '.join(map(str, engine.bits))}"
        raise click.BadParameter(what, param_hint="--bits")
    if bits is not None and schedule is not None:
        raise click.BadParameter("a width and a schedule were given; give one of them", param_hint="--schedule")
    follows = parse(schedule).fitted(engine.bits) if schedule else None if bits else engine.schedule

    def ready(url: str) -> None:
        facts = {
            "url": url,
            "model": model_name(artifact),
            "bits": list(engine.bits),
            "schedule": None if follows is None else str(follows),
            "context": engine.context,
        }
        out.result(facts, f"{facts['model']} at {url}/v1 ({engine.context} tokens of context); Ctrl-C ends it")
        sys.stdout.flush()

    limits = Limits(queue=queue)
    serve(
        engine,
        artifact,
        host=host,
        port=port,
        bits=bits,
        schedule=follows,
        api_key=api_key,
        limits=limits,
        ready=ready,
    )
