"""`lilliput bench`: how fast each width answers on this machine, in how much memory, and how far from the original."""

from typing import Literal

import click

from lilliput.apps.cli.options import activations, artifact_argument, common, drafts, kv, schedule, threads, widths
from lilliput.apps.cli.output import Output, table
from lilliput.measure.memory import format_bytes

COLUMNS = {
    "bits": "bits",
    "how": "how",
    "average_bits": "bits a forward",
    "text_bits": "along the text",
    "kl": "KL",
    "top1_agreement": "top-1 agreement",
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
@click.option("--text", type=click.Path(), metavar="FILE", help="Prompts to measure quality after; by default our own.")
@click.option("--field", help="Field of JSONL or Parquet rows that holds the prompt.")
@click.option("--against", metavar="MODEL", help="The original, whose answers count (needs lilliput[compress]).")
@click.option("--limit", type=click.IntRange(1), default=8, show_default=True, help="Prompts at most, the first ones.")
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
    text: str | None,
    field: str | None,
    against: str | None,
    limit: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
    activations: Literal["int8", "float", "integer"],
    kv: Literal["float", "int8", "int4"],
) -> None:
    """Time ARTIFACT at each width, each in a process of its own; then along a schedule, and with drafts.

    The artifact's own schedule is timed too, unless widths or a schedule are given.

    Beside a schedule, and with --text or --against, every row has its quality: KL in nats a token and how often the
    same token comes first, along the answers of the original, or else of the widest width, to a few prompts.

    "limit tokens/s" is what reading the weights alone would allow at the speed this machine's memory showed in the
    same minutes, and "of bandwidth" how much of that was reached.

    \b
    JSON: {"rows": [{"bits", "threads", "rounds", "prompt_tokens", "decoded_tokens", "prefill_tokens_per_s",
                     "decode_tokens_per_s", "time_to_first_token_s", "load_s", "peak_rss_bytes",
                     "weight_bytes_read_per_token", "memory_bytes_per_s", "bandwidth_share",
                     "decode_limit_tokens_per_s", "foreign_cores", "schedule", "draft_bits",
                     "average_bits", "acceptance", "quality": {"kl", "kl_ci95", "top1_agreement",
                     "average_bits", "answers", "tokens"} or null}],
           "reference": {"text", "against"} or null, "environment": {"cpu", "cores", "versions", ...}}
    """
    from lilliput.artifact.read import Artifact
    from lilliput.engine.schedules.base import Schedule
    from lilliput.engine.schedules.fixed import Constant
    from lilliput.engine.schedules.stored import stored_schedule
    from lilliput.measure import environment
    from lilliput.measure.along import AlongJob, AlongRow, measure_along
    from lilliput.measure.latency import STORED, bench, check_fit, named_schedule

    with Artifact.open(artifact) as opened:
        served = opened.bits
        if schedule is None and bits is None and stored_schedule(opened) is not None:
            schedule = STORED
    widths = bits or list(served)
    check_fit(artifact, widths, prompt_tokens + new_tokens)
    quality: list[AlongRow] = []
    if schedule is not None or text is not None or against is not None:
        job = AlongJob(
            text=text, field=field, against=against, limit=limit, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )
        asked: list[Schedule] = [Constant(bits=width) for width in widths]
        if schedule is not None:
            asked.append(named_schedule(artifact, schedule))
            for remark in asked[-1].remarks(new_tokens):
                out.note(remark)
        if draft_bits is not None:  # drafts change no token
            asked.append(Constant(bits=max(widths)))
        with out.progress() as progress:  # before the timing, which then has the machine to itself
            quality = measure_along(
                artifact, job, asked, threads=threads, activations=activations, kv=kv, progress=progress
            )
    with out.progress() as progress:
        rows = bench(
            artifact,
            bits=widths,
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
    data = [row.model_dump(mode="json") | {"quality": None} for row in rows]
    for row, told in zip(data, quality, strict=False):
        row["quality"] = told.model_dump(mode="json")
    shown = [
        row
        | {
            "kl": row["quality"] and row["quality"]["kl"],
            "top1_agreement": row["quality"] and row["quality"]["top1_agreement"],
            "text_bits": row["quality"] and row["average_bits"] and row["quality"]["average_bits"],
            "how": row["schedule"] or (row["draft_bits"] and f"drafts at {row['draft_bits']}"),
            "peak": None if row["peak_rss_bytes"] is None else format_bytes(row["peak_rss_bytes"]),
            "read": format_bytes(row["weight_bytes_read_per_token"]),
        }
        for row in data
    ]
    whose = against or f"{max(served, default=0)} bits"
    document = {
        "rows": data,
        "reference": {"text": text, "against": whose} if quality else None,
        "environment": environment.describe(),
    }
    out.result(document, lambda: table(shown, COLUMNS))
    if quality:
        out.note(f"KL and agreement: along {quality[0].answers} answers of {whose}, {quality[0].tokens} tokens")
