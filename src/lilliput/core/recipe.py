"""A recipe: an ordered list of stages, each the name of a method and its options. YAML outside, data inside.

    - wanda: {sparsity: 0.3}
    - rtn: {bits: [2, 3, 4, 8], group_size: 64}

A recipe is named (one of `named()`), a path to a YAML file, or a list in Python. What a method's options mean is the
method's affair; here they are only carried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, UnknownName

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """One method and its options, as the recipe gives them."""

    method: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Stages in the order they run. `name` is where they came from, for messages."""

    name: str
    stages: tuple[Stage, ...]

    def data(self) -> list[dict[str, dict[str, Any]]]:
        """The stages as plain data, the form a recipe file has."""
        return [{stage.method: dict(stage.options)} for stage in self.stages]

    def text(self) -> str:
        """The stages as YAML."""
        return yaml.safe_dump(self.data(), sort_keys=False, default_flow_style=None)

    def override(self, **options: Any) -> "Recipe":
        """Return the recipe with options that are not None set in every stage that already names them."""
        given = {key: value for key, value in options.items() if value is not None}
        stages = tuple(
            replace(s, options={**s.options, **{k: v for k, v in given.items() if k in s.options}}) for s in self.stages
        )
        for key in given:
            if not any(key in stage.options for stage in stages):
                what = f"no stage has an option {key!r} to set"
                raise ConfigError(what, where=f"recipe {self.name}", fix="Put the option into the recipe")
        return replace(self, stages=stages)


def named() -> dict[str, str]:
    """Names of the recipes we ship to what the comment at the head of each says."""
    found = {}
    for entry in sorted(files("lilliput.recipes").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            head = takewhile(lambda line: line.startswith("#"), entry.read_text("utf-8").splitlines())
            found[entry.name.removesuffix(".yaml")] = " ".join(line.lstrip("# ") for line in head).rstrip(".")
    return found


def load_recipe(source: "str | Path | Recipe | Sequence[Mapping[str, Any]]") -> Recipe:
    """Read a recipe: a Recipe, the name of one we ship, a path to a YAML file, or a list of {method: options}.

    Raises UnknownName, InputMissing, InputCorrupt (not YAML, too large) or ConfigError (YAML, but no recipe).
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str) and source in named():
        return _parse(files("lilliput.recipes").joinpath(f"{source}.yaml").read_text("utf-8"), source)
    if isinstance(source, (str, Path)):
        return _read(Path(source))
    return _stages(list(source), "given in Python")


def _read(path: Path) -> Recipe:
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        known = ", ".join(named())
        raise UnknownName(f"{str(path)!r} is not known", where="recipe", fix=f"Try {known}, or a path to a .yaml file")
    if not path.is_file():
        raise InputMissing("there is no such file", where=str(path), fix="Give the path of a recipe in YAML")
    if path.stat().st_size > MAX_BYTES:
        raise InputCorrupt(f"a recipe of more than {MAX_BYTES} bytes", where=str(path), fix="Check the path")
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputCorrupt("not UTF-8 text", where=str(path), fix="Give a recipe in YAML") from error


def _parse(text: str, where: str) -> Recipe:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise InputCorrupt(f"not YAML ({first})", where=where, fix="Check the file's syntax") from error
    return _stages(data, where)


def _stages(data: Any, where: str) -> Recipe:
    fix = "Write a list of stages such as '- rtn: {bits: [4], group_size: 64}'"
    if not isinstance(data, list) or not data:
        raise ConfigError("a recipe is a list of at least one stage", where=where, fix=fix)
    stages = []
    for index, item in enumerate(data):
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, Mapping) or len(item) != 1 or not isinstance(next(iter(item)), str):
            raise ConfigError("not one method name with its options", where=f"{where}, stage {index + 1}", fix=fix)
        (method, options), *_ = item.items()
        options = {} if options is None else options
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ConfigError("the options are not names with values", where=f"{where}, stage {index + 1}", fix=fix)
        stages.append(Stage(method, dict(options)))
    return Recipe(where, tuple(stages))
