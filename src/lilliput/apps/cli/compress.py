"""`lilliput compress`: a checkpoint in, one artifact of several bit widths out."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lilliput.apps.cli.options import budgets, byte_size, common, max_ram, widths
from lilliput.apps.cli.output import Output, table
from lilliput.measure.memory import format_bytes

if TYPE_CHECKING:
    from lilliput.pipeline import CompressReport
    from lilliput.pipeline.report import BudgetRow

COLUMNS = {"bits": "bits", "size": "size", "bits_per_weight": "bits a weight"}
OF_DECODERS = {"kl": "KL", "top1_agreement": "top-1 agreement"}
OF_ENCODERS = {"cosine": "cosine", "error": "relative error"}
FRONTIER = {"bits_per_weight": "bits a weight", "size": "size", "predicted_kl": "predicted KL", "note": ""}


@common
@click.command("compress")
@click.argument("model")
@click.option(
    "-o",
    "--out",
    "target",
    envvar="LILLIPUT_COMPRESS_OUT",  # click would name it after the parameter
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the new artifact.",
)
@click.option(
    "--recipe", default="nested", show_default=True, help="A name that `lilliput recipes` lists, or a YAML file."
)
@widths("Widths to serve, ascending; by default the recipe's.")
@click.option("--group-size", type=click.IntRange(min=-1), help="Weights that share a scale; -1 for a whole row.")
@click.option(
    "--target-bits",
    multiple=True,
    callback=budgets,
    metavar="N[,N...]",
    help="Choose every layer's width so that a quantized weight takes at most N bits, scales counted; several N give one "
    "artifact that serves a width for each.",
)
@click.option(
    "--target-size",
    callback=byte_size,
    metavar="SIZE",
    help="Choose every layer's width so that the tensor files take at most this: 1.1GB, 600MiB, or bytes.",
)
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Text, JSONL, Parquet, or a dataset on the hub; pictures for an encoder of pictures; repeatable.",
)
@click.option("--field", help="Field of JSONL or Parquet rows that holds the text.")
@click.option(
    "--join/--no-join", default=True, show_default=True, help="Lay documents end to end, or take each row from one."
)
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Rows of calibration text.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a row.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything random."
)
@max_ram
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and how large it would be; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUT when it is an artifact.")
@click.option("--tower", help="Which encoder of a pair: text or vision of CLIP.")
@click.option("--gate/--no-gate", default=True, show_default=True, help="Fail with 6 when quality is below the gate.")
@click.pass_obj
def command(
    out: Output,
    model: str,
    target: Path,
    recipe: str,
    bits: list[int] | None,
    group_size: int | None,
    target_bits: tuple[float, ...] | None,
    target_size: int | None,
    calibration: tuple[str, ...],
    field: str | None,
    join: bool,
    samples: int,
    length: int,
    seed: int,
    max_ram: int | None,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    tower: str | None,
    gate: bool,
) -> None:
    """Compress MODEL (a checkpoint folder or a hub id) into one artifact that serves every width asked for.

    Ctrl-C keeps what is done; the same command again goes on from there. Needs lilliput[compress].

    \b
    JSON: {"path": the artifact, or null after --dry-run, "source", "recipe": [...], "source_bytes", "size_bytes",
           "rows": [{"bits", "size_bytes", "bits_per_weight", "kl", "top1_agreement", "cosine", "error"}],
           "layers": [{"name", "shape", "method", "bits"}], "expected_ram_bytes", "work_bytes", "resumed": bool,
           "frontier": [{"bits_per_weight", "size_bytes", "predicted_kl", "uniform", "chosen": bool, "rung"}],
           "warnings": [text]}
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
            target_bits=target_bits,
            target_size=target_size,
            calibration=calibration,
            field=field,
            join=join,
            samples=samples,
            length=length,
            seed=seed,
            max_ram=max_ram,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            gate=gate,
            tower=tower,
            progress=progress,
        )
    for warning in report.warnings:
        out.note(f"warning: {warning}")
    out.result(report.model_dump(mode="json"), lambda: _text(report))


def _text(report: "CompressReport") -> str:
    share = f"{format_bytes(report.source_bytes)} -> {format_bytes(report.size_bytes)}"
    first = f"{report.path}: {share}" if report.path else f"dry run, nothing was written: {share}"
    rows = [row.model_dump() | {"size": format_bytes(row.size_bytes)} for row in report.rows]
    memory = "" if report.path else f"\nexpected memory: {format_bytes(report.expected_ram_bytes)}"
    measured = OF_ENCODERS if any(row.cosine is not None for row in report.rows) else OF_DECODERS
    parts = [first + memory, *([table(rows, COLUMNS | measured)] if rows else []), *_frontier(report)]
    return "\n\n".join(parts)


def _frontier(report: "CompressReport") -> list[str]:
    """The least loss predicted at each size, and what one width for all layers would do; nothing without a target."""

    def note(row: "BudgetRow") -> str:
        if row.chosen:
            return f"chosen for {row.rung} bits" if row.rung else "chosen"
        return f"all {row.uniform} bits" if row.uniform else ""

    rows = [row.model_dump() | {"size": format_bytes(row.size_bytes), "note": note(row)} for row in report.frontier]
    return [table(rows, FRONTIER)] if rows else []
