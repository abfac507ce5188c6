"""`lilliput bench`: how fast each width answers on this machine, and in how much memory."""

from typing import Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, drafts, kv, schedule, threads, widths
from lilliput.apps.cli.output import Output, table
from lilliput.measure.memory import format_bytes

COLUMNS = {
    "bits": "bits",
    "how": "how",
    "average_bits": "bits a forward",
    "acceptance": "drafts kept",
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "time_to_first_token_s": "first token s",
    "load_s": "load s",
    "peak": "peak memory",
    "read": "weights a token",
    "bandwidth_share": "of bandwidth",
    "decode_limit_tokens_per_s": "limit tokens/s",
}


@common
@click.command("bench")
@artifact_argument
@widths("Widths to time; by default all.")
@schedule
@drafts
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of the prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens to write.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Processes a width; medians count."
)
@threads(2)
@activations
@kv
@click.pass_obj
def command(
    out: Output,
    artifact: str,
    bits: list[int] | None,
    schedule: str | None,
    draft_bits: int | None,
    draft_tokens: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
    activations: Literal["int8", "float", "integer"],
    kv: Literal["float", "int8", "int4"],
) -> None:
    """Time ARTIFACT at each width, each in a process of its own; then along a schedule, and with drafts.

    The artifact's own schedule is timed too, unless widths or a schedule are given.

    "limit tokens/s" is what reading the weights alone would allow at the speed this machine's memory showed in the
    same minutes, and "of bandwidth" how much of that was reached.

    \b
    JSON: {"rows": [{"bits", "threads", "rounds", "prompt_tokens", "decoded_tokens", "prefill_tokens_per_s",
                     "decode_tokens_per_s", "time_to_first_token_s", "load_s", "peak_rss_bytes",
                     "weight_bytes_read_per_token", "memory_bytes_per_s", "bandwidth_share",
                     "decode_limit_tokens_per_s", "foreign_cores", "schedule", "draft_bits",
                     "average_bits", "acceptance"}],
           "environment": {"cpu", "cores", "versions", ...}}
    """
    from lilliput.artifact.read import Artifact
    from lilliput.measure import environment
    from lilliput.measure.latency import STORED, bench

    with Artifact.open(artifact) as opened:
        served, keeps = opened.bits, opened.manifest.schedule is not None
    if schedule is None and bits is None and keeps:
        schedule = STORED
    with out.progress() as progress:
        rows = bench(
            artifact,
            bits=bits or served,
            schedule=schedule,
            draft_bits=draft_bits,
            draft_tokens=draft_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            activations=activations,
            kv=kv,
            progress=progress,
        )
    data = [row.model_dump(mode="json") for row in rows]
    shown = [
        row
        | {
            "how": row["schedule"] or (row["draft_bits"] and f"drafts at {row['draft_bits']}"),
            "peak": None if row["peak_rss_bytes"] is None else format_bytes(row["peak_rss_bytes"]),
            "read": format_bytes(row["weight_bytes_read_per_token"]),
        }
        for row in data
    ]
    out.result({"rows": data, "environment": environment.describe()}, lambda: table(shown, COLUMNS))
