"""`lilliput eval`: what each width costs in quality, on the same text, beside the original."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, threads, widths
from lilliput.apps.cli.output import Output, table

if TYPE_CHECKING:
    from lilliput.engine.oracle import Oracle

COLUMNS = {
    "model": "bits",
    "tokens": "tokens",
    "nll": "nll",
    "perplexity": "perplexity",
    "nll_increase": "nll increase",
    "kl": "KL",
    "top1_agreement": "top-1 agreement",
}


@common
@click.command("eval")
@artifact_argument
@click.option("--text", required=True, type=click.Path(), metavar="FILE", help="Text, JSONL or Parquet to measure on.")
@widths("Widths to measure; by default all.")
@click.option("--against", metavar="MODEL", help="The original, a folder or hub id (needs lilliput[compress]).")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window.")
@click.option("--limit", type=click.IntRange(1), help="Windows at most, the first ones; by default all.")
@click.option("--field", help="Field of JSONL or Parquet rows that holds the text.")
@click.option("--join/--no-join", default=False, show_default=True, help="Measure the documents as one, end to end.")
@threads()
@activations
@click.option(
    "--runner",
    type=click.Choice(["engine", "oracle"]),
    default="engine",
    show_default=True,
    help="oracle: the integer graph by its definition, slow and exact.",
)
@click.pass_obj
def command(
    out: Output,
    artifact: str,
    text: str,
    bits: list[int] | None,
    against: str | None,
    length: int,
    limit: int | None,
    field: str | None,
    join: bool,
    threads: int | None,
    activations: Literal["int8", "float"],
    runner: Literal["engine", "oracle"],
) -> None:
    """Measure ARTIFACT on FILE at each width: perplexity, and with --against how far it is from the original.

    \b
    JSON: {"rows": [{"bits", "windows", "tokens", "nll", "perplexity", "kl", "kl_ci95", "top1_agreement",
                     "nll_increase", "nll_increase_ci95"}], "original": the same of the original, or null,
           "text", "length", "limit"}
    """
    from lilliput.data.documents import read_documents
    from lilliput.data.streams import windows
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.engine import Engine
    from lilliput.measure.quality import Runner, evaluate
    from lilliput.measure.reference import open_original

    measured: Runner
    if runner == "oracle":
        measured, widths = _oracle(artifact)
    else:
        measured = Engine(artifact, threads=threads, activations=activations)
        widths = measured.bits
    tokenizer = Tokenizer.open(Path(artifact))
    cut = windows(read_documents(text, field=field), tokenizer, length=length, join=join, limit=limit)
    asked: list[int | None] = [*(bits or widths)]
    with out.progress() as progress:
        original = open_original(against, windows=cut, progress=progress) if against is not None else None
        asked = [None, *asked] if original is not None else asked
        rows = evaluate(measured, cut, bits=asked, against=original, progress=progress)
    data = [row.model_dump(mode="json") for row in rows]
    document = {
        "rows": [row for row in data if row["bits"] is not None],
        "original": next((row for row in data if row["bits"] is None), None),
        "text": text,
        "length": length,
        "limit": limit,
    }
    out.result(document, lambda: table([row | {"model": row["bits"] or "original"} for row in data], COLUMNS))


def _oracle(artifact: str) -> "tuple[Oracle, tuple[int, ...]]":
    """The runner of the artifact's integer graph, and the one width it has. Raises ConfigError where there is none."""
    from lilliput.artifact.read import Artifact
    from lilliput.core.errors import ConfigError
    from lilliput.engine.oracle import Oracle

    model = Artifact.open(artifact).integer()
    if model is None:
        fix = "Make one with a recipe such as mobilequant, or leave --runner out"
        raise ConfigError("has no integer graph", where=artifact, fix=fix)
    return Oracle(model), (model.bits,)
