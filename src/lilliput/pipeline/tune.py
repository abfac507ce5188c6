"""The stages of a recipe that come after its sweep, on codes of the whole model in memory.

The sweep's results are kept on disk as it makes them, and so is what every Tuner returns, so an interrupted run repeats
at most the stage it was in. A last sweep then follows the probe through the final codes and writes them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput.artifact.disk import sync
from lilliput.artifact.entries import OUTLIER_PARTS
from lilliput.core.progress import Progress
from lilliput.core.spec import ModelSpec
from lilliput.data.streams import Batches
from lilliput.methods.base import LayerMethod, Quantizer, Tuner
from lilliput.methods.journal import Journal
from lilliput.methods.sources import DecoderSource, Source
from lilliput.methods.sweep import FLOAT, Job, Sweep
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import Outliers


@dataclass(frozen=True, kw_only=True)
class Given(Quantizer):
    """Codes that are there already; stands in a last sweep for the methods that made them."""

    value: Quantized
    rows_alone = False

    def solve(self, weight: Tensor, stat: Tensor | None) -> Quantized:
        """Return them."""
        return self.value


@dataclass(frozen=True)
class Tuned:
    """source, methods: for the last sweep. records: of the first sweep. reference: the original's logits on the probe."""

    source: Source
    methods: Mapping[str, Sequence[LayerMethod]]
    records: list[dict[str, Any]]
    reference: Tensor


def run_tuners(
    checkpoint: Checkpoint,
    source: Source,
    job: Job,
    tuners: Sequence[Tuner],
    data: Batches,
    folder: Path,
    seed: int,
    progress: Progress,
) -> Tuned:
    """Run the recipe's sweep into memory and disk, then every Tuner on its result. folder: where work is kept."""
    store = Store(folder / "coded")
    outcome = Sweep(source, store, job, Journal(folder / "coded"), progress).run()
    original = load_decoder(checkpoint)
    assert isinstance(source.spec, ModelSpec), "planning refuses to tune an encoder"
    student = deepcopy(original) if source.spec == original.spec else Decoder(source.spec, list(store.floats()))
    state = student.state_dict()
    for name, value in store.floats().items():
        state[name].copy_(value)
    coded = store.coded()
    for index, tuner in enumerate(tuners):
        torch.manual_seed(seed + index)
        kept = Store(folder / f"tuned-{index}")
        if not kept.whole:
            progress.say(f"{tuner.name} on the whole model")
            kept_at = folder / f"tuning-{index}"
            made = tuner.tune(original, deepcopy(student), coded, data, kept_at, progress, job.widths)
            for name, codes in made.items():
                kept.quantized(name, codes, None)
            kept.settle(whole=True)
        coded = kept.coded()
    methods = {
        name: [Given(bits=q.bits, group_size=q.group_size, sym=not q.zero, value=q)] for name, q in coded.items()
    }
    reference = outcome.logits[FLOAT]
    return Tuned(DecoderSource(student, made_by=tuners[-1].name), methods, outcome.records, reference)


def amended(
    last: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]], tuners: Sequence[Tuner]
) -> list[dict[str, Any]]:
    """Records of a last sweep, with the methods and notes of the one that made the codes."""
    before = {record["name"]: record for record in first}
    names = [tuner.name for tuner in tuners]
    return [
        {**record, "method": "+".join([before[record["name"]]["method"], *names])}
        | {key: before[record["name"]][key] for key in ("note",) if key in before[record["name"]]}
        if record["name"] in before
        else record
        for record in last
    ]


@dataclass
class Store:
    """A Sink of files, one a tensor of the model, in `folder`."""

    folder: Path
    _fresh: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def quantized(self, name: str, value: Quantized, weight: Tensor | None) -> None:
        """Keep codes, and the weight they stand for."""
        tensors = {"codes": value.codes} | ({} if weight is None else {"weight": weight})
        for kind in ("scale", "zero", "table", "ratio"):
            tensors |= {f"{kind}.{b}": t for b, t in getattr(value, kind, {}).items()}
        if value.outliers is not None:
            tensors |= {f"outlier.{part}": getattr(value.outliers, part) for part in OUTLIER_PARTS}
        self._save(f"{name}.coded", tensors, {"bits": list(value.bits), "group_size": value.group_size})

    def floating(self, name: str, value: Tensor) -> None:
        """Keep a float tensor."""
        self._save(f"{name}.float", {"value": value}, {})

    def settle(self, whole: bool = False) -> None:
        """Have it on disk; `whole`: and note that all is there."""
        for path in self._fresh:
            sync(path)
        self._fresh.clear()
        if whole:
            (self.folder / "whole").touch()
        sync(self.folder)

    @property
    def whole(self) -> bool:
        """Whether all is there."""
        return (self.folder / "whole").exists()

    def floats(self) -> dict[str, Tensor]:
        """Every float tensor by full name, the weights behind codes among them."""
        kept = {name: tensors["value"] for name, tensors, _ in self._load("float")}
        return kept | {f"{n}.weight": t["weight"] for n, t, _ in self._load("coded") if "weight" in t}

    def coded(self) -> dict[str, Quantized]:
        """Every matrix in codes by canonical name."""
        found = {}
        for name, tensors, told in self._load("coded"):
            parts: dict[str, dict[int, Tensor]] = {}
            beside = [tensors.pop(f"outlier.{part}") for part in OUTLIER_PARTS if f"outlier.{part}" in tensors]
            outliers = Outliers(*beside) if beside else None
            for key, tensor in tensors.items():
                kind, _, width = key.partition(".")
                if width:
                    parts.setdefault(kind, {})[int(width)] = tensor
            bits, group_size = tuple(told["bits"]), told["group_size"]
            found[name] = Quantized(tensors["codes"], bits, group_size, **parts, outliers=outliers)
        return found

    def _save(self, stem: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        path = self.folder / f"{stem}.safetensors"
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata={"told": json.dumps(told)})
        self._fresh.append(path)

    def _load(self, kind: str) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        for path in sorted(self.folder.glob(f"*.{kind}.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
                yield path.name.removesuffix(f".{kind}.safetensors"), tensors, json.loads(file.metadata()["told"])
