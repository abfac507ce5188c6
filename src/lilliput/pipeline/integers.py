"""The stage that makes an integer model: run once and kept on disk, then lowered into the artifact's graph."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lilliput.artifact.disk import sync
from lilliput.artifact.integer import Constants, write_graph
from lilliput.core.errors import ConfigError
from lilliput.core.graph import Graph, Grid
from lilliput.core.progress import Progress
from lilliput.core.spec import AnySpec, EncoderSpec
from lilliput.data.streams import Batches
from lilliput.methods.base import IntegerMethod, Integers
from lilliput.models import Decoder, Encoder
from lilliput.models.lowering import lower
from lilliput.pipeline.tune import Given, Store


@dataclass(frozen=True)
class Made:
    """What an IntegerMethod returned, read back from disk, and the graph it was lowered into."""

    integers: Integers
    graph: Graph
    constants: Constants

    def methods(self) -> dict[str, list[Given]]:
        """For a last sweep, the codes of every matrix."""
        codes = self.integers.codes
        return {name: [Given(bits=q.bits, group_size=q.group_size, sym=False, value=q)] for name, q in codes.items()}

    def write(self, folder: Path) -> None:
        """Put the graph into the artifact."""
        write_graph(folder, self.graph, self.constants)


def run_integer(
    method: IntegerMethod, model: Decoder | Encoder, data: Batches, folder: Path, seed: int, progress: Progress
) -> Made:
    """Have `method` make its integer model, or take it from a run that got this far. folder: where work is kept.

    Raises ConfigError when it made other codes than it announced, and as `lower` does where no graph can be had of it.
    """
    kept, told = Store(folder / "integer"), folder / "integer" / "told.json"
    spec: AnySpec = model.spec
    lowered = None
    if not kept.whole:
        torch.manual_seed(seed)
        progress.say(f"{method.name} on the whole model")
        made = method.make(model, data, folder / "integer-work", progress)
        _check(method, spec, made)
        lowered = lower(spec, made.grids, made.model.state_dict(), made.codes)  # what is wrong shows before a write
        for name, codes in made.codes.items():
            kept.quantized(name, codes, None)
        for name, value in made.model.state_dict().items():
            kept.floating(name, value)
        grids = {name: grid.model_dump() for name, grid in made.grids.items()}
        told.write_text(json.dumps({"grids": grids, "record": made.record}), "utf-8")
        sync(told)
        kept.settle(whole=True)
    data_kept: dict[str, Any] = json.loads(told.read_text("utf-8"))
    grids_kept = {name: Grid.model_validate(grid) for name, grid in data_kept["grids"].items()}
    whole = Encoder.of(spec, kept.floats()) if isinstance(spec, EncoderSpec) else Decoder.of(spec, kept.floats())
    integers = Integers(whole, kept.coded(), grids_kept, data_kept["record"])
    return Made(integers, *(lowered or lower(spec, grids_kept, whole.state_dict(), integers.codes)))


def _check(method: IntegerMethod, spec: AnySpec, made: Integers) -> None:
    for name, shape in spec.matrices().items():
        codes = made.codes.get(name)
        if codes is None or codes.bits != (method.width(name),) or codes.shape != shape:
            what = "has no codes" if codes is None else f"has codes {codes.shape} of {list(codes.bits)} bits"
            fix = f"{method.name} announced {shape} of {method.width(name)} bits: correct its make"
            raise ConfigError(what, where=name, fix=fix)
