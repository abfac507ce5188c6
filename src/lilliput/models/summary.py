"""What a checkpoint is and what would happen to it, in seconds: headers only, and no weights fetched from the hub."""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lilliput.core.errors import InputCorrupt, InputMissing
from lilliput.core.spec import AnySpec, ModelSpec, PatchInputs
from lilliput.models.checkpoint import Checkpoint
from lilliput.models.config import read_config
from lilliput.models.origins import Stored, TensorInfo
from lilliput.models.source import first_line, inside, is_hub_id, locate

_ROLES = {"embed": "embedding", "attn": "attention", "mlp": "feed-forward", "head": "head"}


class ModelSummary(BaseModel):
    """A checkpoint in a page. `quantizable` and `skipped` are sentences; sizes are bytes as stored."""

    source: str
    family: str
    parameters: int
    size_bytes: int
    dtypes: dict[str, int]
    """Stored dtype to parameters."""
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int | None
    """None of an encoder of pictures."""
    context: int
    """Tokens; positions of an encoder."""
    sliding_window: int | None
    """Tokens, in the layers that have one."""
    tied_head: bool
    quantizable_parameters: int
    quantizable: list[str]
    skipped: list[str]
    tokenizer: str
    notes: list[str]


def describe(source: str | Path, revision: str | None = None, *, tower: str | None = None) -> ModelSummary:
    """Describe a checkpoint folder or a hub id; of the latter only the small files and the headers are fetched.

    tower: as in `Checkpoint.open`.

    Raises as `Checkpoint.open` does.
    """
    on_hub = is_hub_id(source)
    checkpoint = _from_hub(str(source), revision, tower) if on_hub else Checkpoint.open(source, tower=tower)
    spec, linears = checkpoint.spec, checkpoint.linears()
    dtypes: Counter[str] = Counter()
    for name in checkpoint.names():
        dtypes[checkpoint.info(name).dtype] += checkpoint.info(name).size
    return ModelSummary(
        source=str(source),
        family=spec.family,
        parameters=checkpoint.parameters,
        size_bytes=checkpoint.nbytes,
        dtypes=dict(dtypes),
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        vocab_size=_vocabulary(spec),
        context=spec.context,
        sliding_window=(max(spec.windows) or None) if isinstance(spec, ModelSpec) else None,
        tied_head=isinstance(spec, ModelSpec) and spec.tied_head,
        quantizable_parameters=sum(out * columns for out, columns in (m.shape for m in linears.values())),
        quantizable=_quantizable(checkpoint),
        skipped=_skipped(checkpoint),
        tokenizer=_tokenizer(checkpoint),
        notes=list(checkpoint.notes),
    )


def _quantizable(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence for each role."""
    found = checkpoint.linears().values()
    lines = []
    for role, word in _ROLES.items():
        shapes = [m.shape for m in found if m.role == role]
        if shapes:
            count = f"{len(shapes)} matrices" if len(shapes) > 1 else "1 matrix"
            spec = checkpoint.spec
            also = " (also the head)" if role == "embed" and isinstance(spec, ModelSpec) and spec.tied_head else ""
            lines.append(f"{word}{also}: {count}, {sum(a * b for a, b in shapes):,} weights")
    return lines


def _skipped(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence, with the reason, for each kind of tensor that stays in float."""
    matrices = {f"{name}.weight" for name in checkpoint.linears()}
    kinds: dict[str, list[int]] = {}
    for name in checkpoint.names():
        if name not in matrices:
            known = {"embed_types": "token types", "embed_class": "class vectors", "projection": "projections"}
            plain = known.get(name.removesuffix(".weight"), "learned positions")
            word = "biases" if name.endswith(".bias") else "norms" if "norm" in name else plain
            kinds.setdefault(word, []).append(checkpoint.info(name).size)
    why = dict.fromkeys(("learned positions", "token types"), "a table read one row a token")
    why["projections"] = "small, and last"
    return [f"{k}: {len(v)} tensors, {sum(v):,} weights, {why.get(k, 'vectors')}" for k, v in kinds.items()]


def _vocabulary(spec: AnySpec) -> int | None:
    if isinstance(spec, ModelSpec):
        return spec.vocab_size
    return None if isinstance(spec.inputs, PatchInputs) else spec.inputs.vocab_size


def _tokenizer(checkpoint: Checkpoint) -> str:
    if _vocabulary(checkpoint.spec) is None:
        return "none: it reads pictures"
    names = {path.name for path in checkpoint.tokenizer_files()}
    if "tokenizer.json" in names:
        return "tokenizer.json"
    slow = any(inside(checkpoint.folder, name).is_file() for name in ("tokenizer.model", "vocab.json"))
    return "a slow tokenizer, converted when compressing" if slow else "none: put tokenizer.json into the folder"


def _from_hub(name: str, revision: str | None, tower: str | None) -> Checkpoint:
    """Return a checkpoint of a hub id that knows its headers; reading its tensors needs `Checkpoint.open`."""
    folder = locate(name, revision, weights=False)
    if any(folder.glob("*.safetensors")):
        return Checkpoint.open(folder, tower=tower)
    config = read_config(inside(folder, "config.json"))
    try:
        from huggingface_hub import get_safetensors_metadata

        metadata: Any = get_safetensors_metadata(name, revision=revision)
        stored = {
            tensor: Stored(file, TensorInfo(info.dtype, tuple(info.shape)))
            for file, header in metadata.files_metadata.items()
            for tensor, info in header.tensors.items()
        }
    except Exception as error:  # the hub's library raises a dozen kinds, of three other libraries
        what = f"its headers could not be fetched from the hub ({first_line(error)})"
        raise InputMissing(what, where=name, fix="Check the connection, or give a folder with safetensors") from None
    if not stored:
        raise InputCorrupt("holds no tensors", where=name, fix="Check the name")
    return Checkpoint.of(folder, config, stored, metadata.files_metadata, tower=tower)
