"""`lilliput verify`: check every byte, bound and checksum of an artifact."""

import click

from lilliput.apps.cli.options import artifact_argument, common
from lilliput.apps.cli.output import Output
from lilliput.core.errors import InputCorrupt


@common
@click.command("verify")
@artifact_argument
@click.pass_context
def command(ctx: click.Context, artifact: str) -> None:
    """Check every byte of ARTIFACT against its manifest. Exit code 3 when something is wrong.

    \b
    JSON: {"ok": bool, "problems": [...], ...}
    """
    from lilliput.artifact import verify

    out: Output = ctx.obj
    report = verify(artifact)
    document = report.model_dump(mode="json")
    out.result(document, lambda: f"{artifact}: sound" if report.ok else "\n".join(map(str, document["problems"])))
    if not report.ok:
        count = len(document["problems"])
        out.note(f"error: {artifact}: {count} problem(s). Fetch or make the artifact again.")
        ctx.exit(InputCorrupt.exit_code)
