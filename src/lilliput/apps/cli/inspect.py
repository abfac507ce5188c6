"""`lilliput inspect`: describe a checkpoint or an artifact without loading its weights."""

from pathlib import Path
from typing import Any

import click

from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output, pairs


@common
@click.command("inspect")
@click.argument("model")
@click.pass_obj
def command(out: Output, model: str) -> None:
    """Describe MODEL: an artifact, a checkpoint folder, or a hub id.

    \b
    JSON of an artifact:   {"kind": "artifact", "path", "bits", "sizes": [{"bits", "size_bytes"}], "manifest": {...}}
    JSON of a checkpoint:  {"kind": "checkpoint", "summary": {...}}
    """
    if (Path(model) / "manifest.json").is_file():
        _artifact(out, model)
    else:
        _checkpoint(out, model)


def _artifact(out: Output, path: str) -> None:
    from lilliput.artifact import Artifact

    artifact = Artifact.open(path)
    manifest = artifact.manifest.model_dump(mode="json")
    document = {"kind": "artifact", "path": str(path), "bits": list(artifact.bits), "manifest": manifest}
    out.result(document, lambda: _describe(manifest["spec"], {"artifact": path, "bits": list(artifact.bits)}))


def _checkpoint(out: Output, source: str) -> None:
    from lilliput.models import describe

    summary = describe(source).model_dump(mode="json")
    out.result({"kind": "checkpoint", "summary": summary}, lambda: pairs(summary))


def _describe(spec: dict[str, Any], first: dict[str, Any]) -> str:
    keys = ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size", "context")
    return pairs(first | {key: spec.get(key) for key in keys})
