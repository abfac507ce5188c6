"""The stages of a recipe that come before its last sweep, on the whole model in memory.

A ModelMethod's result is kept on disk, so an interrupted run repeats at most the stage it was in.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lilliput.artifact.disk import replacing
from lilliput.core.errors import ConfigError
from lilliput.core.progress import Progress
from lilliput.data.streams import Batches
from lilliput.methods.base import Method, ModelMethod
from lilliput.methods.fisher import gather_for
from lilliput.methods.journal import Journal
from lilliput.methods.sources import DecoderSource
from lilliput.methods.sweep import Job, Sweep, at_width
from lilliput.models import Checkpoint, Decoder, TensorInfo, load_decoder
from lilliput.numerics.nested import Quantized
from lilliput.pipeline.plan import assign, in_sweep


def run_model_methods(
    checkpoint: Checkpoint,
    runs: Sequence[Sequence[Method]],
    data: Batches | None,
    probe: Tensor,
    folder: Path,
    seed: int,
    progress: Progress,
) -> tuple[Decoder, Tensor]:
    """Apply runs of methods in order; return the decoder and the original's logits on the probe, (length, vocab).

    data: calibration or training rows, None where no method reads text. probe: (1, length) int64. folder: where finished stages are kept.
    """
    decoder = load_decoder(checkpoint)
    with torch.no_grad():
        reference = decoder(probe)[0]
    # One method a stage, each with a seed of its own: a resumed run skips finished stages and draws the same numbers.
    stages = [s for run in runs for s in ([[m] for m in run] if isinstance(run[0], ModelMethod) else [list(run)])]
    for index, run in enumerate(stages):
        torch.manual_seed(seed + index)
        kept = folder / f"stage-{index}.safetensors"
        method, now = run[0], (decoder.spec, _shapes(decoder.tensors()))
        if isinstance(method, ModelMethod):
            spec, tensors = method.respec(decoder.spec, decoder.tensors())
            now = spec, _shapes(tensors)
        if kept.exists():
            decoder = Decoder.of(now[0], load_file(kept))
            continue
        if isinstance(method, ModelMethod):
            progress.say(f"{method.name} on the whole model")
            decoder = method.apply(decoder, data)
            if (decoder.spec, _shapes(decoder.tensors())) != now:
                what = "it made another kind of model than it announced"
                raise ConfigError(what, where=method.name, fix="Correct its respec")
        else:
            _sweep_in_memory(decoder, run, data, probe, folder, progress)
        with replacing(kept) as fresh:
            save_file({k: v.contiguous() for k, v in decoder.state_dict().items()}, fresh)
    return decoder, reference


def _shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.items()}


def _sweep_in_memory(
    decoder: Decoder,
    run: Sequence[Method],
    data: Batches | None,
    probe: Tensor,
    folder: Path,
    progress: Progress,
) -> None:
    # Its results live in memory only, so what an interrupted run left of it is of no use.
    shutil.rmtree(folder / "between", ignore_errors=True)
    blocks, methods = in_sweep(run)
    chosen = assign(methods, decoder.spec.matrices())
    source = DecoderSource(decoder, made_by="an earlier stage")
    journal = Journal(folder / "between")
    fisher = gather_for(source, chosen, data, folder / "between" / "fisher.safetensors", progress)
    job = Job(chosen, (), probe, data, blocks=blocks, fisher=fisher)
    Sweep(source, _Into(decoder), job, journal, progress).run()


class _Into:
    """A Sink that puts results back into a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self._state = decoder.state_dict()

    def quantized(self, name: str, value: Quantized, weight: Tensor) -> None:
        self._state[f"{name}.weight"].copy_(at_width(value, value.bits[-1]))

    def floating(self, name: str, value: Tensor) -> None:
        self._state[name].copy_(value)

    def settle(self) -> None:
        """Nothing to wait for."""
