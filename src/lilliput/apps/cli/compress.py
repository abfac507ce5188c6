"""`lilliput compress`: a checkpoint in, one artifact of several bit widths out."""

from pathlib import Path

import click

from lilliput.apps.cli.options import common, max_ram, widths
from lilliput.apps.cli.output import Output, table
from lilliput.measure.memory import format_bytes


@common
@click.command("compress")
@click.argument("model")
@click.option(
    "-o", "--out", "target", required=True, type=click.Path(path_type=Path), help="Folder of the new artifact."
)
@click.option(
    "--recipe", default="nested", show_default=True, help="A name that `lilliput recipes` lists, or a YAML file."
)
@widths("Widths to serve, ascending; by default the recipe's.")
@click.option("--group-size", type=click.IntRange(min=-1), help="Weights that share a scale; -1 for a whole row.")
@click.option(
    "--calibration", multiple=True, type=click.Path(), metavar="FILE", help="Text, JSONL or Parquet; repeatable."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@max_ram
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and how large it would be; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUT when it is an artifact.")
@click.option("--gate/--no-gate", default=True, show_default=True, help="Fail with 6 when quality is below the gate.")
@click.pass_obj
def command(
    out: Output,
    model: str,
    target: Path,
    recipe: str,
    bits: list[int] | None,
    group_size: int | None,
    calibration: tuple[str, ...],
    seed: int,
    max_ram: int | None,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    gate: bool,
) -> None:
    """Compress MODEL (a checkpoint folder or a hub id) into one artifact that serves every width asked for.

    \b
    JSON: {"path", "size_bytes", "rows": [...], ...}, the report of lilliput.compress
    """
    if group_size == 0:
        raise click.BadParameter("0 is no group size. Write 64, or -1 for a whole row.", param_hint="--group-size")
    from lilliput.pipeline import compress

    with out.progress() as progress:
        report = compress(
            model,
            target,
            recipe=recipe,
            bits=bits,
            group_size=group_size,
            calibration=calibration,
            seed=seed,
            max_ram=max_ram,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            gate=gate,
            progress=progress,
        )
    document = report.model_dump(mode="json")
    out.result(document, lambda: f"{document['path']}: {format_bytes(document['size_bytes'])}\n{table(document['rows'], {})}")
