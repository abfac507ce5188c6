"""`lilliput verify`: check every byte, bound and checksum of an artifact."""

import click

from lilliput.apps.cli.options import artifact_argument, common
from lilliput.apps.cli.output import Output
from lilliput.core.errors import InputCorrupt
from lilliput.measure.memory import format_bytes


@common
@click.command("verify")
@artifact_argument
@click.pass_context
def command(ctx: click.Context, artifact: str) -> None:
    """Check every byte of ARTIFACT against its manifest. Exit code 3 when something is wrong.

    \b
    JSON: {"path", "ok": bool, "bits": [int], "files": int, "bytes": int, "absent": [file], "ignored": [file],
           "problems": [text]}
    """
    from lilliput.artifact.verify import verify

    out: Output = ctx.obj
    with out.progress() as progress:
        seen = -1

        def show(done: int, total: int) -> None:
            nonlocal seen
            if seen < 0:
                progress.begin("checking", total)
            progress.advance(done - max(seen, 0))
            seen = done

        report = verify(artifact, show)
    sound = f"{artifact}: sound ({report.files} files, {format_bytes(report.bytes)})"
    out.result(report.model_dump(mode="json"), sound if report.ok else "\n".join(report.problems))
    if not report.ok:
        click.echo(f"error: {artifact}: {len(report.problems)} problem(s). Fetch or make the artifact again.", err=True)
        ctx.exit(InputCorrupt.exit_code)
