"""`python -m lilliput.apps.demo MODEL --out DIR --text FILE`: the whole way on one model, by the command line alone.

Compresses MODEL to several widths, verifies the artifact, measures quality beside the original and speed, continues a
prompt at each width, and prints one table. `make demo` runs it on assets/tales7m. Every step is a command you could
have typed; each is printed before it runs.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from lilliput.apps.cli.output import table
from lilliput.measure.memory import format_bytes

COLUMNS = {
    "model": "bits",
    "size": "size",
    "perplexity": "perplexity",
    "kl": "KL",
    "top1": "top-1 agreement",
    "decode_tokens_per_s": "tokens/s",
    "peak": "peak memory",
}


@click.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
@click.option("--text", required=True, help="Text to measure on that no method learnt from.")
@click.option("--prompt", default="Once upon a time", show_default=True)
@click.option("--bits", default="2,3,4,8", show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
def main(model: str, out: Path, text: str, prompt: str, bits: str, new_tokens: int) -> None:
    """Compress MODEL, then measure and run it at each width."""
    artifact = str(out / f"{Path(model).name}.lilliput")
    out.mkdir(parents=True, exist_ok=True)
    made = lilliput("compress", model, "-o", artifact, "--bits", bits, "--overwrite")
    lilliput("verify", artifact)
    quality = lilliput("eval", artifact, "--text", text, "--against", model, "--length", "256")
    speed = lilliput("bench", artifact, "--prompt-tokens", "128", "--new-tokens", "128", "--rounds", "3")
    said = {
        row["bits"]: lilliput("run", artifact, "-p", prompt, "-n", str(new_tokens), "--bits", str(row["bits"]))
        for row in quality["rows"]
    }
    rows = join(made, quality, speed)
    click.echo(f"\n{table(rows, COLUMNS)}\n")
    conditions = speed["environment"]
    click.echo(f"{quality['rows'][0]['tokens']} tokens of {text}, windows of {quality['length']}.")
    click.echo(f"Speed: {speed['rows'][0]['threads']} threads of {conditions['cpu']}.\n")
    for width, done in said.items():
        click.echo(f"{width} bits: {prompt}{done['text']}\n")
    report = {"compress": made, "eval": quality, "bench": speed, "run": {str(k): v for k, v in said.items()}}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def lilliput(*arguments: str) -> dict[str, Any]:
    """Run one command in a process of its own and return its JSON. Ends the demo with its exit code if it fails."""
    click.echo(f"$ lilliput {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "lilliput", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def join(made: dict[str, Any], quality: dict[str, Any], speed: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a width, the original first: size, quality and speed beside each other."""
    original = quality["original"]
    rows = [{"model": "original", "size": format_bytes(made["source_bytes"]), "perplexity": original["perplexity"]}]
    sizes = {row["bits"]: row["size_bytes"] for row in made["rows"]}
    times = {row["bits"]: row for row in speed["rows"]}
    for row in quality["rows"]:
        width, timed = row["bits"], times[row["bits"]]
        peak = timed["peak_rss_bytes"]
        rows.append(
            {
                "model": width,
                "size": format_bytes(sizes[width]),
                "perplexity": row["perplexity"],
                "kl": row["kl"],
                "top1": f"{row['top1_agreement']:.1%}",
                "decode_tokens_per_s": timed["decode_tokens_per_s"],
                "peak": None if peak is None else format_bytes(peak),
            }
        )
    return rows


if __name__ == "__main__":
    main()
