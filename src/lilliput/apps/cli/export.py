"""`lilliput export`: an integer artifact in the form another runtime reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lilliput.apps.cli.options import artifact_argument, common
from lilliput.apps.cli.output import Output, table
from lilliput.core.errors import InputMissing, QualityFailed
from lilliput.measure.memory import format_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lilliput.artifact.read import Artifact
    from lilliput.measure.agreement import Agreement, SiteRow

    Ids = Sequence[int] | npt.NDArray[np.int64]

COLUMNS = {
    "kind": "node",
    "sites": "sites",
    "codes": "codes",
    "local_differ": "differ",
    "local_steps": "most steps",
    "margin": "from the middle",
    "own_differ": "differ by themselves",
    "differ": "differ end to end",
    "steps": "most steps end to end",
}


@common
@click.command("export")
@artifact_argument
@click.option(
    "-o",
    "--out",
    "target",
    envvar="LILLIPUT_EXPORT_OUT",  # click would name these two after their parameters
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write.",
)
@click.option(
    "--format", "name", envvar="LILLIPUT_EXPORT_FORMAT", default="onnx-qdq", show_default=True, help="What to write."
)
@click.option(
    "--length", type=click.IntRange(min=1), help="Tokens of a prefill, slots of a decode; by default any number."
)
@click.option("--force", is_flag=True, help="Replace OUT when it is an earlier export.")
@click.option("--verify", is_flag=True, help="Run it in ONNX Runtime beside the oracle; fail with 6 when they part.")
@click.option("--text", type=click.Path(path_type=Path), help="With --verify: text to run; by default random tokens.")
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="With --verify: how many.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --verify: of random tokens.")
@click.pass_context
def command(
    ctx: click.Context,
    artifact: str,
    target: Path,
    name: str,
    length: int | None,
    force: bool,
    verify: bool,
    text: Path | None,
    tokens: int,
    seed: int,
) -> None:
    """Write the integer model of ARTIFACT in another runtime's form. Needs lilliput[export].

    onnx-qdq: prefill.onnx and decode.onnx, or encoder.onnx, with fixed ranges at every activation, and encodings for NPU
    compilers. onnx-integer: the same in whole numbers, code for code what the oracle computes.

    \b
    JSON: {"path", "size_bytes", "manifest": {"format", "lilliput", "artifact", "opset", "exact", "length",
           "positions", "weight_bits", "models": {file: {"inputs", "outputs"}}, "cache": [..], "sites": {name: {..}}, "files"},
           "agreement": null without --verify, else {"runtime", "positions", "sites": [{"name", "kind", "bits", "codes",
           "local_differ", "local_steps", "margin", "own_differ", "own_steps", "differ", "steps"}], "moved",
           "argmax_agreement", "fused_argmax_agreement", "moved_argmax_agreement", "kl", "fused_kl", "moved_kl",
           "cosine", "fused_cosine", "saturates", "decoded", "decode_local_differ", "decode_local_steps",
           "decode_differ", "decode_steps", "reasons", "problems"}}
    """
    from lilliput.artifact.read import Artifact
    from lilliput.export import FORMATS
    from lilliput.export.base import export

    out: Output = ctx.obj
    form = FORMATS.load(name)(length=length)
    with Artifact.open(artifact) as opened:
        ids = _tokens(opened, text, tokens, seed) if verify else []
        manifest = export(opened, target, name, form, force=force)
        agreement = _verify(out, opened, target, manifest, ids) if verify else None
    size = sum(file["size"] for file in manifest["files"].values())
    document = {"path": str(target), "size_bytes": size, "manifest": manifest}
    document["agreement"] = None if agreement is None else agreement.model_dump(mode="json")
    names = ", ".join(manifest["files"])
    first = f"{target}: {format_bytes(size)} ({names})"
    out.result(document, lambda: first if agreement is None else f"{first}\n\n{_text(agreement)}")
    if agreement is not None and not agreement.ok:
        click.echo(f"error: {target}: {agreement.problems[0]}. Please report it; the export is kept.", err=True)
        ctx.exit(QualityFailed.exit_code)


def _verify(out: Output, artifact: "Artifact", folder: Path, manifest: dict[str, Any], ids: "Ids") -> "Agreement":
    from lilliput.measure.agreement import compare

    model = artifact.integer()
    assert model is not None, "it was just exported"
    with out.progress() as progress:
        return compare(folder, manifest, model, ids, progress)


def _tokens(artifact: "Artifact", text: Path | None, count: int, seed: int) -> "Ids":
    import numpy as np

    from lilliput.core.spec import EncoderSpec

    spec = artifact.manifest.spec
    if text is None:
        return np.random.default_rng(seed).integers(0, spec.matrices()[spec.entrance][0], count)
    from lilliput.data.tokenizer import Tokenizer

    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissing("cannot be read as text", str(text), "Give a UTF-8 text file") from error
    tokenizer = Tokenizer.open(artifact.path)
    return tokenizer.whole(words, count) if isinstance(spec, EncoderSpec) else tokenizer.encode(words)[:count]


def _text(found: "Agreement") -> str:
    kinds: dict[str, list[SiteRow]] = {}
    for row in found.sites:
        kinds.setdefault(row.kind, []).append(row)
    rows = [_joined(kind, sites) for kind, sites in kinds.items()]
    lines = [
        f"{found.positions} positions in {found.runtime} beside the oracle; a step is one code",
        table(rows, COLUMNS),
    ]
    explained = not any(row.own_steps > 1 for row in found.sites)
    follows = "what else differs follows from them" if explained else "and some by more"
    if any(row.steps for row in found.sites):
        lines.append(f"{found.moved} codes of edges moved by one step by rounding; {follows}")
    else:
        lines.append("every code is the oracle's")
    if found.argmax_agreement is not None:
        told = f"{found.argmax_agreement:.1%} of positions, {found.fused_argmax_agreement:.1%} fused"
        lines.append(f"first token: the same at {told}; KL {found.kl:.2g}, {found.fused_kl:.2g} fused")
        told = f"{found.moved_argmax_agreement:.1%}; KL {found.moved_kl:.2g}"
        lines.append(f"the oracle beside itself with as many codes moved at random: {told}")
    if found.cosine is not None:
        lines.append(f"vector: a cosine of {found.cosine:.6f} to the oracle's, {found.fused_cosine:.6f} fused")
    if found.saturates:
        lines.append("fused kernels saturate on this CPU: set the session option session.x64quantprecision to 1")
    if found.decoded:
        far = f"{found.decode_differ:.2%} of codes differ, by {found.decode_steps} at most"
        near = f"given the oracle's inputs {found.decode_local_differ:.4%}, by {found.decode_local_steps}"
        lines.append(f"{found.decoded} tokens one at a time: {far}; {near}")
    lines += [f"{kind}: {reason}" for kind, reason in found.reasons.items()]
    return "\n\n".join([lines[0], lines[1], "\n".join(lines[2:])])


def _joined(kind: str, rows: "list[SiteRow]") -> dict[str, Any]:
    codes = sum(row.codes for row in rows)
    margins = [row.margin for row in rows if row.margin is not None]
    keys = ("local_differ", "own_differ", "differ")
    share = {key: sum(getattr(row, key) * row.codes for row in rows) / codes for key in keys}
    return {
        "kind": kind,
        "sites": len(rows),
        "codes": codes,
        "local_differ": f"{share['local_differ']:.4%}",
        "local_steps": max(row.local_steps for row in rows),
        "margin": f"{max(margins):.4f}" if margins else None,
        "own_differ": f"{share['own_differ']:.4%}",
        "differ": f"{share['differ']:.2%}",
        "steps": max(row.steps for row in rows),
    }
