"""Lilliput makes foundation models fit the devices people own.

    import lilliput

    lilliput.compress("path/to/model", "model.lilliput", bits=[2, 3, 4, 8])   # needs lilliput[compress]
    engine = lilliput.load("model.lilliput")
    print(engine.generate("Once upon a time", bits=4).text)

Nothing heavy is imported until one of these names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lilliput.core.version import VERSION

if TYPE_CHECKING:
    from lilliput.engine import Engine as Engine
    from lilliput.engine import load as load
    from lilliput.pipeline import compress as compress

__version__ = VERSION
__all__ = ["Engine", "__version__", "compress", "load"]

_HOMES = {"Engine": "lilliput.engine", "load": "lilliput.engine", "compress": "lilliput.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
