"""Artifacts of random weights in the shapes that benchmarks use: no torch, and nothing to download."""

import sys
import tempfile
from pathlib import Path

from lilliput.core.spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.small_artifact import llama_spec, small_plan, write_small_artifact

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "inter": 112},
    "7m": {"layers": 6, "hidden": 288, "heads": 6, "kv_heads": 6, "inter": 768},
    "110m": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "inter": 2048},
}


def spec_of(shape: str, context: int = 32768) -> ModelSpec:
    """The Llama of that shape; its vocabulary is the 261 tokens of the test tokenizer."""
    return llama_spec(**SHAPES[shape]).model_copy(update={"context": context})


def random_artifact(shape: str, context: int = 32768) -> Path:
    """Make an artifact of 2, 3, 4 and 8 bits once, and return its folder; later calls find it there."""
    folder = Path(tempfile.gettempdir()) / f"lilliput-random-{shape}-{context}.lilliput"
    if not folder.exists():
        plan = small_plan(spec_of(shape, context), group_size=32, sym=True, ladders={"embed_tokens": (4, 8)})
        write_small_artifact(folder, plan=plan)
    return folder
