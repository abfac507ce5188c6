import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact import publish as publishing
from lilliput.artifact.publish import check_output, partial_of, publish
from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.artifact.write import ArtifactWriter
from lilliput.core.errors import ConfigError, InputMissing
from support.small_artifact import (
    contents,
    llama_spec,
    small_plan,
    write_small_artifact,
)

PLAN = small_plan(llama_spec(layers=1))
NAME = "layers.0.mlp.down_proj"


def finished(folder: Path, seed: int = 0) -> Path:
    write_small_artifact(folder, plan=PLAN, seed=seed)
    return folder


@pytest.mark.parametrize("exchange", [True, False])
def test_publishing_replaces_an_artifact_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    old, new = finished(tmp_path / "out"), finished(tmp_path / "new", seed=1)
    expected = contents(new)
    opened = Artifact.open(old)
    before = opened.dequantize(NAME, 2)
    with pytest.raises(ConfigError, match=r"out: already exists\. Give --overwrite or another folder\.$"):
        publish(new, old)
    assert contents(new) == expected
    publish(new, old, overwrite=True)
    assert contents(old) == expected
    assert os.listdir(tmp_path) == ["out"]
    assert np.array_equal(opened.dequantize(NAME, 2), before)  # a reader of the old one goes on
    assert not np.array_equal(Artifact.open(old).dequantize(NAME, 2), before)


def test_an_empty_folder_may_be_published_on(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(finished(tmp_path / "new"), tmp_path / "out")
    assert verify(tmp_path / "out").ok


def test_a_folder_that_is_not_only_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    new = finished(tmp_path / "new")
    for name in ("photos", "fake", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "fake" / "manifest.json").write_text('{"name": "a browser extension"}')
    shutil.copytree(finished(tmp_path / "other"), tmp_path / "notes", dirs_exist_ok=True)
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for name, message in {
        "photos": r"photos: holds cat\.jpg, which is not part of an artifact",
        "fake": "holds manifest.json, which is not part",
        "notes": "holds notes.txt, which is not part",
        "file": "exists and is not a folder",
        "link": "exists and is not a folder",
    }.items():
        with pytest.raises(ConfigError, match=message):
            publish(new, tmp_path / name, overwrite=True)
        with pytest.raises(ConfigError, match=message):
            check_output(tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_an_unfinished_folder_is_not_published(tmp_path: Path) -> None:
    ArtifactWriter.start(partial_of(tmp_path / "out"), PLAN).close()
    with pytest.raises(InputMissing, match=r"manifest\.json: the file is not there"):
        publish(partial_of(tmp_path / "out"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
