"""Where a sweep reads weights: a checkpoint on disk, a block at a time, or a decoder that is in memory anyway."""

from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor

from lilliput.core.errors import InputCorrupt
from lilliput.core.spec import AnySpec, EncoderSpec
from lilliput.models import Block, Checkpoint, Decoder, Encoder, load_block, load_decoder, load_encoder_block

Frame = Decoder | Encoder
_ENDS = ("embed_tokens.weight", "embed_patches.weight", "lm_head.weight")


class Source(Protocol):
    """Weights, as few at a time as possible."""

    @property
    def spec(self) -> AnySpec: ...

    def block(self, index: int) -> Block:
        """Return one block in float32, the caller's to change."""

    def frame(self) -> Frame:
        """Return the model without blocks, the matrices of its embedding and its head left on the meta device."""

    def whole(self) -> Decoder:
        """Return all of it in float32, the caller's to change."""

    def read(self, name: str) -> Tensor:
        """Return one tensor by its canonical name, in the dtype it is stored in."""

    def has(self, name: str) -> bool: ...


class CheckpointSource:
    """A checkpoint read from its files; memory is that of what was asked for. Raises as `Checkpoint.read` does."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())

    @property
    def spec(self) -> AnySpec:
        """The model's description."""
        return self._checkpoint.spec

    def block(self, index: int) -> Block:
        """Return block `index` in float32."""
        load = load_encoder_block if isinstance(self.spec, EncoderSpec) else load_block
        return load(self._checkpoint, index)

    def frame(self) -> Frame:
        """Return norms, learned positions, the head's bias and the like in float32, around no blocks."""
        frame: Frame
        with torch.device("meta"):
            if isinstance(self.spec, EncoderSpec):
                frame = Encoder(self.spec, self._names, layers=0)
            else:
                frame = Decoder(self.spec, self._names, layers=0)
        small = [n for n in self._names if not n.startswith("layers.") and n not in _ENDS]
        frame.load_state_dict({n: self.read(n).float() for n in small}, strict=False, assign=True)
        return frame

    def whole(self) -> Decoder:
        """Return all of it in float32."""
        return load_decoder(self._checkpoint)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._checkpoint.read(name)

    def has(self, name: str) -> bool:
        """Whether the model has that tensor."""
        return name in self._names


class DecoderSource:
    """A whole decoder, such as a ModelMethod returns, or an encoder; given out in copies, so a sweep may change what it gets."""

    def __init__(self, decoder: Frame, made_by: str) -> None:
        self._decoder = decoder
        self._state = decoder.state_dict()
        for name, value in self._state.items():
            if not bool(torch.isfinite(value).all()):
                what = f"{made_by} left NaN or infinity there"
                raise InputCorrupt(what, where=name, fix="Lower its learning rate, or leave this stage out")

    @property
    def spec(self) -> AnySpec:
        """The model's description."""
        return self._decoder.spec

    def block(self, index: int) -> Block:
        """Return a copy of block `index` in float32."""
        block = deepcopy(self._decoder.blocks[index])
        assert isinstance(block, Block), "a decoder has blocks"
        return block.float()

    def frame(self) -> Frame:
        """Return copies of the norms, learned positions and the head's bias in float32, around no blocks."""
        frame: Frame
        with torch.device("meta"):
            if isinstance(self.spec, EncoderSpec):
                frame = Encoder(self.spec, self._state.keys(), layers=0)
            else:
                frame = Decoder(self.spec, self._state.keys(), layers=0)
        small = {n: v.float().clone() for n, v in self._state.items() if not n.startswith("layers.") and n not in _ENDS}
        frame.load_state_dict(small, strict=False, assign=True)
        return frame

    def whole(self) -> Decoder:
        """Return a copy of all of it in float32."""
        assert isinstance(self._decoder, Decoder), "asked for by methods that planning refuses for an encoder"
        return deepcopy(self._decoder).float()

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        value: Tensor = self._state[name]
        return value

    def has(self, name: str) -> bool:
        """Whether the model has that tensor."""
        return name in self._state
