from importlib.resources import files
from pathlib import Path

import pytest

from lilliput.core.recipe import load_recipe, named
from lilliput.methods.base import build_stage


@pytest.mark.parametrize("name", named())
def test_every_shipped_recipe_says_what_it_is_for_and_builds(name: str) -> None:
    assert len(named()[name]) > 20
    text = files("lilliput.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    first = next(line for line in text.splitlines() if not line.startswith("#"))
    assert text[: text.index(first)].replace("\n# ", " ").strip("# .\n") == named()[name]
    assert all(build_stage(stage) for stage in load_recipe(name).stages)


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = load_recipe("nested")
    file = tmp_path / "copy.yaml"
    file.write_text(recipe.text())
    assert load_recipe(file).stages == recipe.stages


def test_overrides_reach_the_stages_that_have_the_option() -> None:
    stages = load_recipe("wanda-nested").override(bits=[4]).stages
    assert "bits" not in stages[0].options
    assert stages[1].options["bits"] == [4]
    with pytest.raises(ValueError, match=r"^recipe .*: no stage has an option 'group_size' to set\."):
        load_recipe([{"wanda": {}}]).override(group_size=32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a list of at least one stage"),
        ("rtn: {}", "a recipe is a list of at least one stage"),
        ("- {rtn: {}, wanda: {}}", "stage 1: not one method name with its options"),
        ("- rtn: [1]", "stage 1: the options are not names with values"),
        ("- rtn: {bits: [4", "not YAML"),
        ("- !!python/object/apply:os.system [true]", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"bad.yaml.*{message}"):
        load_recipe(file)


def test_an_unknown_name_tells_the_known_ones_and_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'nestled' is not known\. Try any-precision, .*w4"):
        load_recipe("nestled")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: there is no such file"):
        load_recipe(tmp_path / "none.yaml")
