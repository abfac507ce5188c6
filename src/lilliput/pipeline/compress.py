"""`compress`: a model goes in, one verified artifact comes out, or nothing does."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lilliput.artifact.publish import check_output, partial_of
from lilliput.core.errors import ConfigError, Interrupted, OutOfResource, Unsupported
from lilliput.core.progress import Progress, Silent
from lilliput.core.recipe import Recipe, load_recipe
from lilliput.core.spec import ModelSpec
from lilliput.methods.base import ModelMethod
from lilliput.methods.journal import steps_done
from lilliput.models import Checkpoint
from lilliput.pipeline.budget import Target, check_target
from lilliput.pipeline.inputs import Options, told_as
from lilliput.pipeline.plan import budget, plan_work
from lilliput.pipeline.report import CompressReport
from lilliput.pipeline.run import Run, plan_report
from lilliput.pipeline.workspace import Workspace


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | Sequence[dict[str, Any]] = "nested",
    bits: Sequence[int] | None = None,
    group_size: int | None = None,
    target_bits: float | Sequence[float] | None = None,
    target_size: int | None = None,
    calibration: Sequence[str | Path] = (),
    field: str | None = None,
    join: bool = True,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    max_ram: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    gate: bool = True,
    dry_run: bool = False,
    tower: str | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a model into one artifact folder, check it, and only then put it at `out`.

    model: a Hugging Face folder or hub id. out: the artifact, absent, empty, or with `overwrite` an artifact to be
    replaced. recipe: see `core.recipe.load_recipe`; bits and group_size change every stage that has them.
    target_bits, target_size: give every layer the width of its ladder that keeps the loss least while the artifact
    stays inside so many bits a quantized weight, scales and tables counted, or so many bytes of tensor files; it then
    serves one width, or, of several ascending target_bits, one for each. Needs calibration text, see docs/budgets.md.
    calibration: text files or a hub dataset for recipes that need one; `samples` rows of `length` tokens are drawn
    from it with `seed`, documents joined end to end or, without `join`, each row from one document; `field` names the
    text in JSONL or Parquet rows. max_ram: bytes of memory to stay below. resume: go on from an interrupted run of the same
    model, data, recipe and versions, whose work waits in OUT.partial. gate: fail when a width is far from the
    original. dry_run: only plan, reading no weights. tower: which encoder of a pair, "text" or "vision" of CLIP.
    An encoder of texts calibrates on lines of the text, one a row, of at most `length` tokens, one of pictures on
    `samples` files of the folder `calibration` names.

    The same arguments give the same bytes on the same machine, resumed or not. Raises LilliputError: ConfigError for options, InputMissing,
    InputCorrupt or InputUnsafe for the model and texts, Unsupported, OutOfResource, QualityFailed (the finished work
    stays, `gate=False` accepts it), Interrupted.
    """
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed is {seed}", where="seed", fix="Give a whole number from 0 to 2**63 - 1")
    target = Target.of(target_bits, target_size)
    options = Options(
        tuple(map(str, calibration)), field, join, samples, length, seed, max_ram, resume, overwrite, gate, target
    )
    out, progress = Path(out), progress or Silent()
    parsed = load_recipe(recipe).override(bits=None if bits is None else list(bits), group_size=group_size)
    checkpoint = Checkpoint.open(model, tower=tower)
    check_output(out, overwrite=overwrite)
    check_apart(out, checkpoint.folder)
    workspace = Workspace(out)
    workspace.check()
    work = plan_work(checkpoint, parsed)
    if target and work.maker:
        what = f"{work.maker.name} gives every block the same width"
        raise ConfigError(what, where="target", fix="Leave the budget out, or give its option bits")
    if target and not isinstance(checkpoint.spec, ModelSpec):
        what = (
            f"a budget weighs what a model loses in predicting tokens, which a {checkpoint.family} encoder does not do"
        )
        raise Unsupported(what, where="target", fix="Give --bits instead")
    if target:
        work = replace(work, needs_calibration=True)
        check_target(work, target)
    whole = bool(target or work.tuners or work.maker) or any(
        isinstance(method, ModelMethod) for run in work.runs for method in run
    )
    spent = budget(work, max_ram=max_ram, length=length, whole=whole)
    if work.needs_calibration and not calibration and not dry_run:
        learns = "widths are chosen by what the model loses on a" if target else "it has a method that learns from"
        what = f"{learns} {told_as(checkpoint)}, and none is given"
        raise ConfigError(what, where=f"recipe {parsed.name}", fix="Give --calibration FILE")
    report = plan_report(model, checkpoint, parsed, work, spent, options)
    if dry_run:
        return report
    check_space(workspace, report)
    torch.manual_seed(seed)
    with resumable(workspace, checkpoint.spec.num_layers + 2):
        return Run(checkpoint, str(model), workspace, parsed, work, spent, options, progress).finish(report)


def check_apart(out: Path, folder: Path) -> None:
    """Raise ConfigError when the artifact, or the folder it is made in, would be the model's, or inside it, or around."""
    there = folder.resolve()
    for here in (out.resolve(), partial_of(out).resolve()):
        if here == there or here in there.parents or there in here.parents:
            what = "the output, or the folder beside it where it is made, is the model's own or one is inside the other"
            raise ConfigError(what, where=str(out), fix="Give a folder apart from the model")


def check_space(workspace: Workspace, report: CompressReport) -> None:
    """Raise OutOfResource when the disk cannot hold the artifact and the work beside it."""
    parent = next(p for p in workspace.root.parents if p.exists())
    free = shutil.disk_usage(parent).free
    need = report.size_bytes + report.work_bytes - workspace.reserved_bytes()
    if free < need:
        what = f"{need:,} bytes are needed and {free:,} are free"
        raise OutOfResource(what, where=str(parent), fix="Free some space or choose another disk")


@contextmanager
def resumable(workspace: Workspace, steps: int) -> Iterator[None]:
    """Turn Ctrl-C into an error that says how far the work is and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        what = f"stopped after {steps_done(workspace.work)} of {steps} steps"
        if workspace.root.exists():
            what += f"; what is done is kept in {workspace.root}"
        fix = "Repeat the same command to go on from there"
        raise Interrupted(what, where=str(workspace.out), fix=fix) from None
