import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact.amend import amend, set_schedule
from lilliput.artifact.entries import QualityEntry, ScheduleEntry
from lilliput.artifact.read import Artifact
from lilliput.artifact.schema import fingerprint
from lilliput.artifact.verify import verify
from lilliput.core.errors import ConfigError, InputMissing
from support.small_artifact import (
    contents,
    llama_spec,
    small_plan,
    write_small_artifact,
)

PLAN = small_plan(llama_spec(layers=1))


FALLS = ScheduleEntry(name="static", prefill_bits=8, ladder=(4, 2), steps=((0, 4), (9, 2)))
LEARNED = ScheduleEntry(name="learned", prefill_bits=4, ladder=(4, 2), horizon=64)


def test_amending_takes_in_quality_and_a_new_readme(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_small_artifact(folder, plan=PLAN)
    (folder / "README.md").write_text("# Now with numbers\n")
    assert not verify(folder).ok
    row = QualityEntry(bits=2, tokens=10, kl=0.1, top1_agreement=0.9, text="wiki")
    assert amend(folder, quality=[row]).quality == (row,)
    assert verify(folder).ok


def test_a_schedule_comes_and_goes_and_leaves_the_bytes_as_they_were(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a")
    before = contents(tmp_path / "a")
    manifest = set_schedule(tmp_path / "a", FALLS)
    assert (manifest.schema_version, manifest.schedule) == ("1.3", FALLS)
    assert contents(tmp_path / "a").keys() == before.keys()
    assert verify(tmp_path / "a").ok
    tensors = {"q": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, dtype=np.float32)}
    learned = set_schedule(tmp_path / "a", LEARNED, tensors)
    assert learned.schedule is not None
    assert learned.schedule.model == fingerprint(manifest) == fingerprint(learned)
    assert learned.schedule.file in learned.files
    assert verify(tmp_path / "a").ok
    with Artifact.open(tmp_path / "a") as artifact:
        found, said = artifact.schedule_tensors()
        assert said == {"format": "lilliput", "horizon": "64", "model": learned.schedule.model}
        assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert set_schedule(tmp_path / "a", LEARNED, tensors) == learned  # the same file, not deleted
    other = set_schedule(tmp_path / "a", LEARNED, {"q": tensors["q"] + 1})
    assert len(list((tmp_path / "a").glob("schedule-*"))) == 1
    assert other.schedule is not None
    assert other.schedule.file != learned.schedule.file
    assert amend(tmp_path / "a").schedule == other.schedule
    set_schedule(tmp_path / "a", None)
    assert contents(tmp_path / "a") == before


def test_a_schedule_that_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", bits=(2, 4))
    before = contents(tmp_path / "a")
    with pytest.raises(
        ConfigError, match=r"a: schedule: the schedule has a width of 8 bits, which is not in \[2, 4\]\. "
    ):
        set_schedule(tmp_path / "a", FALLS)
    with pytest.raises(ConfigError, match=r"^schedule: q is float32, or not finite\. "):
        set_schedule(tmp_path / "a", LEARNED, {"q": np.full(2, np.nan, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"what it learned lacks the model or the horizon"):
        set_schedule(tmp_path / "a", LEARNED.model_copy(update={"horizon": None}), {"q": np.ones(2, dtype=np.float32)})
    with pytest.raises(InputMissing):
        set_schedule(tmp_path / "nowhere", FALLS)
    assert contents(tmp_path / "a") == before


def failing(real: Callable[..., object], calls: int) -> Callable[..., object]:
    """A stand-in that dies at the call after `calls` good ones."""

    def fail(*args: object, **options: object) -> object:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    return fail


@pytest.mark.parametrize("call", ["replace", "fsync", "open", "unlink"])
def test_a_crash_while_a_schedule_is_set_leaves_one_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At every system call that changes the folder."""
    tensors = {"q": np.ones((2, 3), dtype=np.float32)}
    for at in range(9):
        folder = tmp_path / str(at)
        write_small_artifact(folder)
        first = set_schedule(folder, LEARNED, tensors)
        with monkeypatch.context() as broken, suppress(KeyboardInterrupt):
            broken.setattr(os, call, failing(getattr(os, call), at))
            set_schedule(folder, LEARNED, {"q": tensors["q"] * 2})
        with Artifact.open(folder) as artifact:
            found, _ = artifact.schedule_tensors()
            wanted = 1 if artifact.manifest == first else 2
            assert (found["q"] == wanted).all()
        set_schedule(folder, LEARNED, {"q": tensors["q"] * 3})
        assert verify(folder).ok
        assert len(list(folder.glob("schedule-*"))) == 1
