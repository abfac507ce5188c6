"""`lilliput schedule`: find the widths an artifact should decode a task at, and keep them in it."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, threads
from lilliput.apps.cli.output import Output, table

CUT = 128
"""Tokens of a prompt that a text too long for one is cut into."""
COLUMNS = {
    "mark": "",
    "schedule": "schedule",
    "average_bits": "average bits",
    "score": "score",
    "within": "within",
    "best": "frontier",
}


def _share(ctx: click.Context, param: click.Parameter, value: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%?)\s*", value)
    if not found:
        raise click.BadParameter(f"{value!r} is no share. Write 1% or 0.01.", ctx, param)
    return float(found[1]) / (100 if found[2] else 1)


def _ladder(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if not re.fullmatch(r"[1-8](/[1-8])*", value):
        raise click.BadParameter(f"{value!r} is no ladder. Write 4/3/2.", ctx, param)
    return tuple(map(int, value.split("/")))


@common
@click.command("schedule")
@artifact_argument
@click.option("--task", required=True, type=click.Path(), metavar="FILE", help="Prompts: text, JSONL or Parquet.")
@click.option("--field", help="Field of JSONL or Parquet rows that holds the prompt.")
@click.option("--reference-field", help="Field that holds the answer; by default the reference model writes it.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    help=f"Keep the first N tokens of every prompt; cut a single text into as many of N. By default only a text too long "
    f"for one prompt is cut, at {CUT}.",
)
@click.option("--limit", type=click.IntRange(1), help="Prompts at most, the first ones; by default all.")
@click.option("--tolerance", default="1%", show_default=True, callback=_share, metavar="SHARE", help="How much worse.")
@click.option(
    "--method", type=click.Choice(["search", "learned", "features"]), default="search", show_default=True,
    help="Steps for all prompts, or chosen by prompt: by a classifier of the cache (needs lilliput[compress]) or by a "
    "few features.",
)  # fmt: skip
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(4), default=256, show_default=True, help="Length of the answers."
)
@click.option(
    "--metric",
    default="kl",
    show_default=True,
    metavar="NAME",
    help="kl, nll, agreement or rouge-l: what may be worse.",
)
@click.option("--against", metavar="MODEL", help="The original, whose answers count (needs lilliput[compress]).")
@click.option("--ladder", callback=_ladder, metavar="A/B/..", help="Widths, falling; by default those up to 4 bits.")
@click.option(
    "--prefill", type=click.IntRange(1, 8), help="Width that reads the prompt; by default the ladder's first."
)
@click.option(
    "--grid", type=click.IntRange(1, 64), default=6, show_default=True, help="Parts of an answer to step between."
)
@click.option("--exhaustive", is_flag=True, help="Score every candidate of a search.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of what is random.")
@click.option("--work", type=click.Path(), help="File of what is scored so far; by default ARTIFACT.schedule.jsonl.")
@click.option("--dry-run", is_flag=True, help="Find it, and leave the artifact as it is.")
@threads()
@activations
@click.pass_obj
def command(
    out: Output,
    artifact: str,
    task: str,
    field: str | None,
    reference_field: str | None,
    prompt_tokens: int | None,
    limit: int | None,
    tolerance: float,
    method: Literal["search", "learned", "features"],
    max_new_tokens: int,
    metric: str,
    against: str | None,
    ladder: tuple[int, ...],
    prefill: int | None,
    grid: int,
    exhaustive: bool,
    seed: int,
    work: str | None,
    dry_run: bool,
    threads: int | None,
    activations: Literal["int8", "float"],
) -> None:
    """Find the fewest bits at which ARTIFACT keeps within a tolerance on FILE, and keep that schedule in it.

    The tolerance is measured from the ladder's first width: for kl and nll the perplexity may be higher by that share,
    for agreement and rouge-l the score lower. A run that was killed goes on where it was.

    \b
    JSON: {"schedule": {the manifest's entry}, "frontier": [{"schedule", "average_bits", "score", "within", "best",
           "chosen"}], "metric", "tolerance", "task", "written": bool}
    """
    from lilliput.artifact.amend import set_schedule
    from lilliput.core.errors import ConfigError
    from lilliput.data.documents import read_documents
    from lilliput.engine import Engine
    from lilliput.measure import METRICS
    from lilliput.measure.continuations import cut_prompts
    from lilliput.measure.reference import open_writer
    from lilliput.scheduling import ScheduleJob, find_schedule

    metric = metric.replace("-", "_")
    METRICS.load(metric)
    job = ScheduleJob(
        method=method,
        metric=metric,
        tolerance=tolerance,
        max_new_tokens=max_new_tokens,
        ladder=ladder,
        prefill=prefill,
        grid=grid,
        exhaustive=exhaustive,
        watch=min(8, max_new_tokens // 4),
        seed=seed,
    )
    engine = Engine(artifact, threads=threads, activations=activations)
    job.rungs(engine.bits)
    if not dry_run and not os.access(artifact, os.W_OK):
        raise ConfigError("it cannot be written to", where=artifact, fix="Copy it to where it can, or give --dry-run")
    texts, references = read_documents(task, field=field), None
    if reference_field is None:
        prompts = cut_prompts(texts, engine.tokenizer, tokens=prompt_tokens, limit=limit)
        room = engine.context - max_new_tokens
        if prompt_tokens is None and len(texts) == 1 and len(prompts[0]) > room > 1:
            prompts = cut_prompts(texts, engine.tokenizer, tokens=min(CUT, room), limit=limit)
            out.note(f"{task}: one text, cut into {len(prompts)} prompts of {len(prompts[0])} tokens at most")
    else:
        prompts = [engine.tokenizer.encode(text)[:prompt_tokens] for text in texts[:limit]]
        answers = read_documents(task, field=reference_field)
        if len(answers) != len(texts):
            what = f"{len(texts)} prompts and {len(answers)} references"
            raise ConfigError(what, where=task, fix="Give every row both fields")
        references = [engine.tokenizer.encode(text, bos=False) for text in answers[:limit]]
    notebook = Path(work) if work is not None else Path(f"{Path(artifact).absolute()}.schedule.jsonl")
    with out.progress() as progress:
        found = find_schedule(
            engine,
            prompts,
            job,
            author=None if against is None else open_writer(against, engine),
            author_name="the widest width" if against is None else against,
            references=references,
            notebook=notebook,
            progress=progress,
        )
    entry = found.entry()
    if not dry_run:
        entry = set_schedule(artifact, entry, found.schedule.tensors()).schedule or entry
        if work is None:
            notebook.unlink(missing_ok=True)
    document: dict[str, Any] = {
        "schedule": entry.model_dump(mode="json"),
        "frontier": [row.model_dump() for row in found.frontier],
        "metric": metric,
        "tolerance": tolerance,
        "task": task,
        "written": not dry_run,
    }
    rows = [row.model_dump() | {"mark": "*" if row.chosen else ""} for row in found.frontier]
    out.result(document, lambda: table(rows, COLUMNS))
    out.note(f"{'found' if dry_run else 'now the default'}: {found.schedule}; {found.note}")
    first = job.rungs(engine.bits)[0]
    if found.schedule.ladder == (first,):
        out.note(f"nothing that falls below {first} bits keeps within the tolerance")
    if dry_run and notebook.exists():
        out.note(f"what was scored is kept in {notebook}")
