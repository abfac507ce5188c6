"""The original model in torch, as a runner: what every compressed width is compared with. Torch loads on first use."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lilliput.artifact.read import StoredTensor
from lilliput.core.errors import ConfigError, Unsupported
from lilliput.core.progress import Progress, Silent
from lilliput.core.spec import ModelSpec
from lilliput.measure.quality import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.engine.engine import Engine
    from lilliput.models import Checkpoint, Decoder

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


class TorchRunner:
    """A whole decoder in memory. It computes in the dtype it was loaded in; `bits` has no meaning for it."""

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder.eval()

    def logits(self, tokens: I32, *, bits: int | None = None) -> F32:
        """(length,) token ids to (length, vocab) float32. Raises ConfigError for a width: the original has none."""
        import torch

        _no_bits(bits)
        with torch.inference_mode():
            return _numpy(self.decoder(_row(tokens)))


class StreamedRunner:
    """A decoder larger than memory: one block at a time meets all windows, whose hidden states are kept.

    Memory is one block, the embeddings and head, and 4 * hidden_size bytes a token of the windows. Only the windows
    given at the start have logits.
    """

    def __init__(self, checkpoint: "Checkpoint", windows: Sequence[I32], progress: Progress | None = None) -> None:
        import torch

        from lilliput.models import load_block, load_ends

        progress = progress or Silent()
        layers = checkpoint.spec.num_layers
        progress.begin("running the original", layers)
        self._ends = load_ends(checkpoint).eval()
        with torch.inference_mode():
            hidden = [self._ends.embed(_row(window)) for window in windows]
            for layer in range(layers):
                block = load_block(checkpoint, layer).eval()
                for i, state in enumerate(hidden):
                    hidden[i] = block(state)
                progress.advance(1)
        self._hidden = {_key(window): state for window, state in zip(windows, hidden, strict=True)}

    def logits(self, tokens: I32, *, bits: int | None = None) -> F32:
        """(length,) token ids of one of the windows to (length, vocab) float32. Raises ConfigError for others."""
        import torch

        _no_bits(bits)
        state = self._hidden.get(_key(tokens))
        if state is None:
            raise ConfigError("not one of the windows it was run on", where="original", fix="Give all windows at first")
        with torch.inference_mode():
            return _numpy(self._ends.finish(state))


class WritingOriginal:
    """The original in the engine's float kernels, all of it in memory as it is stored: writes reference answers."""

    def __init__(self, checkpoint: "Checkpoint", eos: Sequence[int], *, threads: int) -> None:
        """eos: tokens that end an answer. Raises Unsupported for an encoder."""
        from lilliput.engine.native import Model

        spec = checkpoint.spec
        if not isinstance(spec, ModelSpec):
            what = f"holds a {spec.family} encoder, which writes no text"
            raise Unsupported(
                what, where=str(checkpoint.folder), fix="Give the decoder that the artifact was made from"
            )
        floats = {name: _stored(checkpoint.read(name), checkpoint.info(name).dtype) for name in checkpoint.names()}
        self.spec, self._eos = spec, eos
        self._model = Model(spec, floats, {}, threads=threads)

    def logits(self, tokens: I32) -> F32:
        """(length,) token ids to (length, vocab) float32."""
        return self._model.logits([int(token) for token in tokens], 0)

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Continue prompts greedily; ids without the end-of-sequence id."""
        from lilliput.engine.sampling import Sampling

        made = self._model.generate(
            prompts,
            bits=0,
            max_new_tokens=max_new_tokens,
            context=self.spec.context,
            eos=self._eos,
            sampling=Sampling(),
        )
        return [tuple(one.tokens) for one in made]


def open_writer(source: str | Path, engine: "Engine") -> WritingOriginal:
    """Open the checkpoint that `engine`'s artifact was made from as the writer of references.

    Raises what `Checkpoint.open` raises, Unsupported for an encoder, ConfigError for a model of another vocabulary.
    """
    from lilliput.models import Checkpoint

    made = WritingOriginal(Checkpoint.open(source), engine.tokenizer.eos_ids, threads=engine.threads)
    if made.spec.vocab_size != engine.spec.vocab_size:
        what = f"has {made.spec.vocab_size} tokens, the artifact {engine.spec.vocab_size}"
        raise ConfigError(what, where=str(source), fix="Give the model that the artifact was made from")
    return made


def _stored(tensor: "Tensor", dtype: str) -> StoredTensor:
    import torch

    data = tensor.contiguous().view(torch.uint16) if dtype == "BF16" else tensor.contiguous()
    return StoredTensor(dtype, tuple(tensor.shape), data.numpy())


def open_original(
    source: str | Path, *, windows: Sequence[I32] | None = None, progress: Progress | None = None
) -> Runner:
    """Open a checkpoint folder or hub id as a float32 runner.

    windows: give those to be measured and the model is read block by block (`StreamedRunner`), else it is loaded whole.
    Raises what `Checkpoint.open` raises.
    """
    from lilliput.models import Checkpoint, load_decoder

    checkpoint = Checkpoint.open(source)
    return TorchRunner(load_decoder(checkpoint)) if windows is None else StreamedRunner(checkpoint, windows, progress)


def _no_bits(bits: int | None) -> None:
    if bits is not None:
        raise ConfigError(f"{bits} bits asked of the original", where="original", fix="Give it as `against`")


def _row(tokens: I32) -> "Tensor":
    import torch

    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]


def _numpy(logits: "Tensor") -> F32:
    array: F32 = logits[0].float().numpy()
    return array


def _key(tokens: I32) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()
