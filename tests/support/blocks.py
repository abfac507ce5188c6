"""One small random block, and calibration text at it, with a few loud inputs as real models have."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.core.spec import ModelSpec
from lilliput.methods.base import BlockData, Quantizer
from lilliput.methods.journal import Activations
from lilliput.methods.quantize.rtn import RTN
from lilliput.models import Block

SPEC: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "context": 32,
    "norm": {"kind": "rms", "eps": 1e-6},
    "activation": "silu",
    "rotary": {"dim": 8, "inv_freq": (1.0, 0.3, 0.1, 0.03)},
    "attn_scale": 8**-0.5,
    "windows": (0,),
}
LOUD = (3, 17, 30)


def tiny_block(seed: int = 0, **changes: Any) -> Block:
    """Return block 0 of a random model, without biases; some of the norms' weights are large."""
    block = Block(ModelSpec(**(SPEC | changes)), 0, ())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in block.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "norm" in name else noise * value.shape[-1] ** -0.5)
            if "norm" in name:
                value[list(LOUD)] *= 12
    return block


@torch.no_grad()
def calibration(folder: Path, block: Block, seed: int = 1, drift: float = 0.0, samples: int = 6) -> BlockData:
    """Return rows of 16 tokens; what comes in is off by `drift` from what the targets were made of."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 16, block.spec.hidden_size)
    x = torch.randn(shape, generator=generator)
    inputs, targets = Activations(folder / "in.f32", shape), Activations(folder / "out.f32", shape)
    inputs.write(iter([x + drift * torch.randn(shape, generator=generator)]))
    targets.write(iter([block(x)]))
    return BlockData(inputs, targets, 3)


def followed_by(block: Block, **options: Any) -> dict[str, Quantizer]:
    """Return rtn with those options for every layer of the block."""
    rtn = RTN(**({"bits": (4,), "group_size": 16} | options))
    return dict.fromkeys(block.linears(), rtn)


@torch.no_grad()
def output_error(block: Block, data: BlockData, grid: Quantizer, bits: int) -> float:
    """Squared error of the block's output against its targets, its weights rounded to nearest now, relative."""
    assert data.targets is not None
    kept = {name: layer.weight.data for name, layer in block.linears().items()}
    for layer in block.linears().values():
        layer.weight.data = grid.solve(layer.weight.data, None).dequantize(bits)
    x, y = (of.take(range(of.samples)) for of in (data.inputs, data.targets))
    error = float((block(x) - y).square().mean() / y.square().mean())
    for name, layer in block.linears().items():
        layer.weight.data = kept[name]
    return error


def state(block: Block) -> dict[str, Tensor]:
    """Return copies of all tensors of the block."""
    return {name: value.detach().clone() for name, value in block.named_parameters()}
