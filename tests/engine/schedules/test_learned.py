"""Schedules that decide by the beginning of an answer: card section 8, item 6."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact import amend
from lilliput.artifact.verify import verify
from lilliput.core.errors import ConfigError, UnknownName
from lilliput.engine import load
from lilliput.engine.schedules.base import Follower, Signals
from lilliput.engine.schedules.learned import upright
from lilliput.engine.schedules.prompted import Prompted
from lilliput.engine.schedules.text import parse
from support.schedules import GRID, features, learned
from support.small_artifact import write_small_artifact


def signals(tokens: int = 9, seed: int = 1) -> Signals:
    draw = np.random.default_rng(seed)
    cache = tuple(draw.normal(0, 1, (2, tokens, 16)).astype(np.float32) for _ in range(2))
    row = draw.normal(0, 3, 50).astype(np.float32)
    return Signals(lambda: row, lambda: cache, lambda: 0.0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("schedule", [learned(), features(0), features(5, slope=0.1)], ids=["learned", "0", "5"])
def test_what_an_artifact_keeps_decides_the_same(tmp_path: Path, schedule: Prompted) -> None:
    folder = tmp_path / "small.lilliput"
    write_small_artifact(folder)
    amend.set_schedule(folder, schedule.entry(), schedule.tensors())
    engine = load(folder, threads=1)
    kept = engine.schedule
    assert isinstance(kept, Prompted)
    assert kept.entry().model_copy(update={"file": None, "model": None}) == schedule.entry()
    for seed in range(20):
        runs = [Follower(one, 9, 30) for one in (schedule, kept)]
        assert len({tuple(run.next_bits(t, signals(seed=seed)) for t in range(29)) for run in runs}) == 1
    used = engine.generate([257, 1, 2, 3], max_new_tokens=30)
    assert used.widths == engine.generate([257, 1, 2, 3], max_new_tokens=30, schedule=schedule).widths


def test_decisions_differ_by_prompt_fall_rung_by_rung_and_lie_on_the_grid() -> None:
    schedule, seen = learned(), set()
    for seed in range(40):
        follower = Follower(schedule, 9, 30)
        widths = [follower.next_bits(t, signals(seed=seed)) for t in range(29)]
        assert all(a >= b for a, b in pairwise(widths))
        assert {t for t, (a, b) in enumerate(pairwise([4, *widths])) if a != b} <= set(GRID)
        seen.add(tuple(widths))
    assert len(seen) > 1


def test_keys_turned_back_do_not_depend_on_where_they_stood() -> None:
    """Card section 5, trap 6: the same keys rotated as attention does, begun at position 0 and at 50."""
    draw, inv_freq = np.random.default_rng(0), np.array([1.0, 0.1, 0.01, 0.001], dtype=np.float32)
    plain = draw.normal(0, 1, (2, 60, 12))  # the last 4 channels are not rotated
    angle = np.arange(60)[:, None] * inv_freq
    turned = plain.copy()
    turned[..., :4] = plain[..., :4] * np.cos(angle) - plain[..., 4:8] * np.sin(angle)
    turned[..., 4:8] = plain[..., 4:8] * np.cos(angle) + plain[..., :4] * np.sin(angle)
    np.testing.assert_allclose(upright(turned.astype(np.float32), inv_freq), plain, atol=1e-5)
    none = np.zeros(0, dtype=np.float32)
    np.testing.assert_array_equal(upright(plain.astype(np.float32), none), plain.astype(np.float32))


def test_features_watch_before_they_decide() -> None:
    follower = Follower(features(5), 9, 30)
    widths = [follower.next_bits(t, signals(seed=t)) for t in range(29)]
    assert widths == [4] * 5 + [2] * 24  # nothing is lost by few bits, so it falls as soon as it may
    sure = Follower(features(0, slope=100.0), 9, 30)
    assert sure.next_bits(0, signals()) == 4  # unsure of the first token: bits are worth their price


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": {}}, "is not there"),
        ({"ladder": ()}, "is not there"),
        ({"ladder": (4, 2)}, r"out is \(8, 8\), which does not fit"),
        ({"grid": (0, 20, 10, 30)}, "do not ascend"),
        ({"grid": (0, 10, 20, 31)}, "do not ascend"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as told:
        learned(**change)
    assert "\n" not in str(told.value)


def test_a_longer_answer_gets_a_remark_and_text_cannot_make_one() -> None:
    assert learned().remarks(30) == ()
    assert "stays at the last width" in learned().remarks(31)[0]
    for text in ("learned", "features", "learned:horizon=30,grid=0/30,ladder=4/2"):
        with pytest.raises(ConfigError):
            parse(text)


def test_one_learned_for_another_model_or_horizon_is_refused(tmp_path: Path) -> None:
    from lilliput.artifact.schema import MANIFEST_FILE, Manifest, seal

    folder = tmp_path / "small.lilliput"
    write_small_artifact(folder)
    manifest = amend.set_schedule(folder, learned().entry(), learned().tensors())
    assert manifest.schedule is not None
    for change, match in (({"model": "0" * 64}, "another model"), ({"horizon": 60}, "answers of 30 tokens, not of 60")):
        entry = manifest.schedule.model_copy(update=change)
        said = Manifest.model_validate(manifest.model_copy(update={"schedule": entry}))
        (folder / MANIFEST_FILE).write_bytes(seal(said))
        with pytest.raises(ConfigError, match=match):
            _ = load(folder, threads=1).schedule
        report = verify(folder)
        assert not report.ok
        assert [match in line for line in report.problems] == [True]
    (folder / MANIFEST_FILE).write_bytes(seal(manifest))
    assert verify(folder).ok
    unknown = manifest.schedule.model_copy(update={"name": "of_a_newer_version"})
    (folder / MANIFEST_FILE).write_bytes(seal(manifest.model_copy(update={"schedule": unknown})))
    with pytest.raises(
        UnknownName, match=r"schedule: 'of_a_newer_version' is not known\. Update lilliput, or give --bits"
    ):
        _ = load(folder, threads=1).schedule
