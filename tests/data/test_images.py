"""Pictures to patches."""

from pathlib import Path

import numpy as np
import pytest

from lilliput.core.spec import PatchInputs
from lilliput.data.images import draw_pictures, find_pictures, open_picture, patches, prepare, probe_pictures

Image = pytest.importorskip("PIL.Image")
INPUTS = PatchInputs(
    image_size=8, patch_size=4, resize=8, resample="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)


def test_patches_go_channel_by_channel_and_row_by_row() -> None:
    square = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = patches(square, INPUTS)
    assert found.shape == (4, 48)
    for patch, column, channel, row, at in ((0, 0, 0, 0, 0), (1, 17, 1, 0, 5), (2, 38, 2, 5, 2), (3, 15, 0, 7, 7)):
        value = (square[row, at, channel] / 255 - INPUTS.mean[channel]) / INPUTS.std[channel]
        assert found[patch, column] == pytest.approx(value, rel=1e-5)


def test_the_shorter_side_is_resized_and_the_middle_cut_out() -> None:
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 255  # the middle 8 of 20 columns
    white = patches(np.full((8, 8, 3), 255, np.uint8), INPUTS)
    assert np.array_equal(prepare(Image.fromarray(wide), INPUTS), white)
    assert np.array_equal(prepare(Image.fromarray(wide.transpose(1, 0, 2)), INPUTS), white)
    grey = Image.new("L", (33, 17), 255)
    assert np.array_equal(prepare(grey, INPUTS), white)


def test_the_library_prepares_clip_pictures_alike() -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None)
    if kind is None:
        pytest.skip("this release of transformers has no processor without torchvision")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (31, 45, 3), dtype=np.uint8))
    inputs = INPUTS.model_copy(update={"image_size": 16, "resize": 18})
    told = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}
    theirs = kind(**told, image_mean=list(INPUTS.mean), image_std=list(INPUTS.std))(picture)["pixel_values"][0]
    ours = prepare(picture, inputs).reshape(4, 4, 3, 4, 4).transpose(2, 0, 3, 1, 4).reshape(3, 16, 16)
    assert np.abs(ours - np.asarray(theirs)).max() < 1e-5


def test_files_are_drawn_by_seed_and_bad_ones_named(tmp_path: Path) -> None:
    for k in range(5):
        Image.new("RGB", (9, 9), (k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    files = find_pictures(tmp_path)
    assert [file.name for file in files] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    drawn = draw_pictures(files, INPUTS, samples=3, batch_size=2, seed=0)
    assert [len(batch) for batch in drawn] == [2, 1]
    assert drawn.sha256 == draw_pictures(files, INPUTS, samples=3, batch_size=1, seed=0).sha256
    with pytest.raises(ValueError, match=r"5 pictures are fewer than the 6 asked for"):
        draw_pictures(files, INPUTS, samples=6, batch_size=1, seed=0)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"bad\.png: is no picture we read"):
        open_picture(tmp_path / "bad.png")
    with pytest.raises(FileNotFoundError, match=r"there is no such folder"):
        find_pictures(tmp_path / "absent")


def test_the_probe_is_made_by_rule_and_its_pictures_differ() -> None:
    found = probe_pictures(INPUTS, 8)
    assert found.shape == (8, 4, 48)
    assert np.array_equal(found, probe_pictures(INPUTS, 8))
    apart = np.abs(found[:, None] - found).mean((2, 3))
    assert apart[~np.eye(8, dtype=bool)].min() > 0.1
