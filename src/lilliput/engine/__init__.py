"""Artifact to tokens on a CPU: NumPy and our own C++, no torch. Nothing is imported until it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput.engine.engine import Engine as Engine
    from lilliput.engine.engine import Generation as Generation
    from lilliput.engine.engine import load as load
    from lilliput.engine.sampling import Sampling as Sampling

__all__ = ["Engine", "Generation", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lilliput.engine.sampling" if name == "Sampling" else "lilliput.engine.engine"), name)
