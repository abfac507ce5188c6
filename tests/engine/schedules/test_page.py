"""The examples in docs/schedules.md are executed, so that they stay true."""

import re
from pathlib import Path

import pytest

from support.small_artifact import write_small_artifact

PAGE = Path(__file__).parents[3] / "docs" / "schedules.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[-1][:40])
def test_the_examples_on_the_page_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_artifact(tmp_path / "model.lilliput")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})
