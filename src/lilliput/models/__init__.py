"""Checkpoints in, Decoders and Encoders out: loads a model of any known family and describes it.

Names are imported when used, so that describing a checkpoint needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput.models.checkpoint import Checkpoint as Checkpoint
    from lilliput.models.checkpoint import Matrix as Matrix
    from lilliput.models.decoder import Block as Block
    from lilliput.models.decoder import Decoder as Decoder
    from lilliput.models.decoder import load_block as load_block
    from lilliput.models.decoder import load_decoder as load_decoder
    from lilliput.models.decoder import load_ends as load_ends
    from lilliput.models.encoder import Encoder as Encoder
    from lilliput.models.encoder import EncoderBlock as EncoderBlock
    from lilliput.models.encoder import load_encoder as load_encoder
    from lilliput.models.encoder import load_encoder_block as load_encoder_block
    from lilliput.models.origins import TensorInfo as TensorInfo
    from lilliput.models.summary import ModelSummary as ModelSummary
    from lilliput.models.summary import describe as describe

_HOMES = {
    "checkpoint": ("Checkpoint", "Matrix"),
    "decoder": ("Block", "Decoder", "load_block", "load_decoder", "load_ends"),
    "encoder": ("Encoder", "EncoderBlock", "load_encoder", "load_encoder_block"),
    "origins": ("TensorInfo",),
    "summary": ("ModelSummary", "describe"),
}
__all__ = [
    "Block",
    "Checkpoint",
    "Decoder",
    "Encoder",
    "EncoderBlock",
    "Matrix",
    "ModelSummary",
    "TensorInfo",
    "describe",
    "load_block",
    "load_decoder",
    "load_encoder",
    "load_encoder_block",
    "load_ends",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
