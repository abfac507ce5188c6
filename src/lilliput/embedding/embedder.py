"""An encoder's artifact as a runner: texts or pictures to vectors, at any width it serves (needs torch).

The matrices are dequantized to float32 by the artifact's reference formula, one width in memory at a time, so what comes
out is what the artifact says; the memory is that of the float model. Or the artifact's integer graph runs, as its
definition says, a text at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, InputCorrupt, Unsupported
from lilliput.core.spec import EncoderSpec, PatchInputs
from lilliput.data.images import open_picture, prepare
from lilliput.data.streams import padded
from lilliput.data.tokenizer import Tokenizer
from lilliput.engine.oracle import Oracle
from lilliput.models import Encoder

F32 = npt.NDArray[np.float32]
BATCH = 32
"""Texts or pictures run together."""


class Embedder:
    """A loaded encoder. spec: what it is; bits: widths that can be asked for, empty when nothing is quantized; of an
    integer graph the one of its weights.
    """

    spec: EncoderSpec
    bits: tuple[int, ...]

    def __init__(self, artifact: str | Path | Artifact, *, activations: Literal["float", "integer"] = "float") -> None:
        """artifact: a folder, or one that is open already. activations: what linear layers read; "integer" runs the
        artifact's integer graph (docs/integer.md).

        Raises what `Artifact.open` raises, Unsupported for an artifact that generates text, and ConfigError where there
        is no integer graph.
        """
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
        spec = artifact.manifest.spec
        if not isinstance(spec, EncoderSpec):
            what = f"holds a {spec.family} decoder, which generates text"
            raise Unsupported(what, where=str(artifact.path), fix="Use lilliput.engine.Engine, or `lilliput run`")
        self.artifact, self.spec, self.bits = artifact, spec, artifact.bits
        self._oracle: Oracle | None = None
        if activations == "integer":
            model = artifact.integer()
            if model is None:
                fix = "Leave activations out, or compress with mobilequant"
                raise ConfigError("it has no integer graph", where=str(artifact.path), fix=fix)
            self._oracle, self.bits = Oracle(model), (model.bits,)
        self._loaded: tuple[int | None, Encoder] | None = None
        self._tokenizer: Tokenizer | None = None

    def texts(self, texts: Sequence[str], *, bits: int | None = None) -> F32:
        """Return (texts, embedding_size) float32 rows of length 1, so that their dot products are cosines.

        Longer texts are cut to the positions there are. bits: one of `bits`, None for the widest. Raises ConfigError
        for a width that is not there, or where the encoder takes pictures.
        """
        if isinstance(self.spec.inputs, PatchInputs):
            raise ConfigError("takes pictures, not texts", where=str(self.artifact.path), fix="Use the text tower")
        tokenizer = self._tokenizer = self._tokenizer or Tokenizer.open(self.artifact.path)
        rows = [tokenizer.whole(text, self.spec.context) for text in texts]
        return self._unit((padded(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)), bits)

    def pictures(self, pictures: Sequence[Any], *, bits: int | None = None) -> F32:
        """Return (pictures, embedding_size) float32 rows of length 1. pictures: paths, or images of Pillow.

        Raises as `texts` does, and InputCorrupt for a file that is no picture.
        """
        inputs = self.spec.inputs
        if not isinstance(inputs, PatchInputs):
            raise ConfigError("takes texts, not pictures", where=str(self.artifact.path), fix="Use the vision tower")

        def prepared(some: Sequence[Any]) -> npt.NDArray[Any]:
            opened = [open_picture(p) if isinstance(p, str | Path) else p for p in some]
            return np.stack([prepare(picture, inputs) for picture in opened])

        return self._unit((prepared(pictures[at : at + BATCH]) for at in range(0, len(pictures), BATCH)), bits)

    def vectors(self, inputs: npt.NDArray[Any], *, bits: int | None = None) -> F32:
        """Return what `models.encoder.Encoder`, or the integer graph, makes of its inputs at a width: (batch,
        embedding_size) float32. Raises ConfigError for a width that an integer graph does not have.
        """
        if self._oracle is not None:
            if bits not in (None, *self.bits):
                what = f"the integer graph has weights of {self.bits[0]} bits, not {bits}"
                raise ConfigError(what, where="bits", fix="Leave the width out")
            return self._oracle.vectors(inputs)
        with torch.inference_mode():
            found: F32 = self._encoder(bits)(torch.from_numpy(np.array(inputs))).numpy()
        return found

    def _unit(self, batches: Iterator[npt.NDArray[Any]], bits: int | None) -> F32:
        parts = [self.vectors(batch, bits=bits) for batch in batches]
        rows: F32 = np.concatenate([*parts, np.zeros((0, self.spec.embedding_size), np.float32)])
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows

    def _encoder(self, bits: int | None) -> Encoder:
        if self._loaded is None or self._loaded[0] != bits:
            manifest = self.artifact.manifest
            with torch.device("meta"):
                encoder = Encoder(self.spec, manifest.floats.keys())
            names = [*manifest.floats, *(f"{name}.weight" for name in manifest.entries)]
            state = {n: torch.from_numpy(self._float(n, bits)) for n in names}
            try:
                encoder.load_state_dict(state, strict=True, assign=True)
            except RuntimeError as error:
                what = f"its tensors do not fit its spec ({str(error).splitlines()[-1].strip()})"
                raise InputCorrupt(what, where=str(self.artifact.path), fix="Make the artifact again") from None
            self._loaded = bits, encoder.eval()
        return self._loaded[1]

    def _float(self, name: str, bits: int | None) -> F32:
        module = name.removesuffix(".weight")
        entry = self.artifact.manifest.entries
        return self.artifact.dequantize(module, bits) if module in entry else self.artifact.tensor(name).to_float32()
