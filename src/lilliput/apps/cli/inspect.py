"""`lilliput inspect`: describe a checkpoint or an artifact without reading its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output, pairs, table
from lilliput.measure.memory import format_bytes

if TYPE_CHECKING:
    from lilliput.artifact.entries import ScheduleEntry
    from lilliput.artifact.read import Artifact
    from lilliput.core.spec import AnySpec


@common
@click.command("inspect")
@click.argument("model")
@click.option("--tower", help="Which encoder of a pair: text or vision of CLIP.")
@click.pass_obj
def command(out: Output, model: str, tower: str | None) -> None:
    """Describe MODEL: an artifact, a checkpoint folder, or a hub id. Reads headers, not weights.

    \b
    JSON of an artifact:
      {"kind": "artifact", "path", "size_bytes", "bits": [int], "rows": [{"bits", "size_bytes", "kl",
       "top1_agreement", "cosine", "error"}], "manifest": {...}, "integer": null, or of the integer graph
       {"nodes", "edges": {bits: count}, "positions", "kl", "top1_agreement", "cosine"}}
    JSON of a checkpoint:
      {"kind": "checkpoint", "source", "family", "parameters", "size_bytes", "dtypes": {dtype: parameters}, "layers",
       "hidden_size", "heads", "kv_heads", "vocab_size", "context", "sliding_window", "tied_head",
       "quantizable_parameters", "quantizable": [text], "skipped": [text], "tokenizer", "notes": [text]}
    """
    if (Path(model) / "manifest.json").exists():
        _artifact(out, model)
    else:
        _checkpoint(out, model, tower)


def _artifact(out: Output, path: str) -> None:
    from lilliput.artifact.read import Artifact

    artifact = Artifact.open(path)
    manifest = artifact.manifest
    rows: list[dict[str, Any]] = [{"bits": b, "size_bytes": artifact.bytes_at(b)} for b in artifact.bits]
    for row in rows:
        quality = next((q for q in manifest.quality if q.bits == row["bits"]), None)
        row |= {key: getattr(quality, key, None) for key in ("kl", "top1_agreement", "cosine", "error")}
    document = {
        "kind": "artifact",
        "path": path,
        "size_bytes": artifact.size_bytes,
        "bits": list(artifact.bits),
        "rows": rows,
        "manifest": manifest.model_dump(mode="json"),
        "integer": (integer := _integer(artifact)),
    }
    facts = {
        "artifact": path,
        "size": format_bytes(artifact.size_bytes),
        "made from": f"{manifest.source.name}, {manifest.source.parameters:,} parameters",
        "by": f"lilliput {manifest.lilliput_version}",
    }
    if manifest.schedule is not None:
        facts["schedule"] = _schedule(manifest.schedule)
    if integer is not None:
        edges = ", ".join(f"{count} of {bits} bits" for bits, count in integer["edges"].items())
        kl = "" if integer["kl"] is None else f", KL {integer['kl']:.4g}"
        kl = kl if integer["cosine"] is None else f", cosine {integer['cosine']:.4g}"
        facts["integer graph"] = f"{integer['nodes']} nodes, edges {edges}, {integer['positions']:,} positions{kl}"
    shown = [row | {"size": format_bytes(row["size_bytes"])} for row in rows]
    columns = {"bits": "bits", "size": "weights", "kl": "KL", "top1_agreement": "top-1 agreement"}
    if any(row["cosine"] is not None for row in rows):
        columns = {"bits": "bits", "size": "weights", "cosine": "cosine", "error": "relative error"}
    out.result(document, lambda: f"{pairs(facts | _shape(manifest.spec))}\n\n{table(shown, columns)}")


def _schedule(entry: "ScheduleEntry") -> str:
    """What the artifact follows by default: steps, or a name, and on what it was found."""
    steps = (
        ",".join(f"{bits}@{start}" for start, bits in entry.steps)
        or f"{entry.name} over {'/'.join(map(str, entry.ladder))} bits"
    )
    return f"prompt at {entry.prefill_bits} bits, {steps}" + (f" ({entry.note})" if entry.note else "")


def _integer(artifact: "Artifact") -> dict[str, Any] | None:
    """What there is to say about the integer graph, if the artifact has one."""
    graph, told = artifact.graph(), artifact.manifest.integer
    if graph is None or told is None:
        return None
    widths = [edge.grid.bits for edge in graph.edges.values()]
    return {
        "nodes": len(graph.nodes),
        "edges": {str(bits): widths.count(bits) for bits in (8, 16)},
        "positions": graph.positions,
        "kl": getattr(told.quality, "kl", None),
        "top1_agreement": getattr(told.quality, "top1_agreement", None),
        "cosine": getattr(told.quality, "cosine", None),
    }


def _checkpoint(out: Output, source: str, tower: str | None) -> None:
    from lilliput.models import describe

    summary = describe(source, tower=tower)
    facts = summary.model_dump(exclude={"quantizable", "skipped", "notes", "source"}) | {
        "parameters": f"{summary.parameters:,}",
        "size_bytes": format_bytes(summary.size_bytes),
        "dtypes": [f"{dtype} {count:,}" for dtype, count in summary.dtypes.items()],
        "quantizable_parameters": f"{summary.quantizable_parameters:,}",
    }
    lines = [f"{label}: {text}" for label in ("quantizable", "skipped", "notes") for text in getattr(summary, label)]
    text = "\n".join([pairs({"checkpoint": source} | facts), "", *lines])
    out.result({"kind": "checkpoint"} | summary.model_dump(mode="json"), text)


def _shape(spec: "AnySpec") -> dict[str, Any]:
    from lilliput.core.spec import EncoderSpec, PatchInputs

    facts: dict[str, Any] = {
        "family": spec.family,
        "layers": spec.num_layers,
        "width": f"{spec.hidden_size}, feed-forward {spec.intermediate_size}",
        "heads": f"{spec.num_heads} of {spec.head_dim}, {spec.num_kv_heads} for keys and values",
    }
    if not isinstance(spec, EncoderSpec):
        return facts | {"vocabulary": spec.vocab_size, "context": spec.context}
    facts["vector"] = f"{spec.embedding_size} numbers, from {spec.pooling} of {spec.context} positions"
    if isinstance(spec.inputs, PatchInputs):
        size = spec.inputs.image_size
        return facts | {"pictures": f"{size} x {size}, patches of {spec.inputs.patch_size}"}
    return facts | {"vocabulary": spec.inputs.vocab_size, "context": spec.context}
