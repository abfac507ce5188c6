"""One version, said in two places."""

import tomllib
from pathlib import Path

import lilliput
from lilliput.core.version import VERSION


def test_the_package_and_its_build_say_the_same_version() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == VERSION == lilliput.__version__
