from pathlib import Path
from typing import Any

import pytest

from support.families import FAMILIES


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two blocks, not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](folder, 0)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of `compress` for it, but for a recipe: a little text, and no gate."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The old man and the child went on and on, and the sea and the wind went with them. " * 20)
    return {"calibration": [text], "samples": 4, "length": 24, "gate": False}
