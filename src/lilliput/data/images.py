"""Pictures for encoders: files to rows of patches, prepared as `core.spec.PatchInputs` says. Pillow loads on first use."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing
from lilliput.core.spec import PatchInputs
from lilliput.data.streams import order

if TYPE_CHECKING:
    from PIL.Image import Image

F32 = npt.NDArray[np.float32]
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP")
ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS: Final = 1 << 26
"""Pixels of the largest picture that is decoded."""


class Pictures:
    """Prepared pictures in batches; iterate as often as you like, the order stays.

    rows: (samples, patches, columns) float32, read-only. Each batch is (batch_size, patches, columns), the last one may
    be smaller.
    """

    def __init__(self, rows: F32, batch_size: int = 1) -> None:
        self.rows: F32 = np.array(rows, dtype=np.float32, order="C")
        self.rows.setflags(write=False)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[F32]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]

    @property
    def tokens(self) -> int:
        """Patches of all pictures."""
        return int(self.rows.shape[0] * self.rows.shape[1])

    @property
    def sha256(self) -> str:
        """Of the shape, three little-endian int64, then the values as little-endian float32."""
        shape = np.array(self.rows.shape, dtype="<i8")
        return hashlib.sha256(shape.tobytes() + self.rows.astype("<f4").tobytes()).hexdigest()


def find_pictures(source: str | Path) -> list[Path]:
    """Return the picture files of a folder, by name, or the one file given. Raises InputMissing when there are none."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    found = [file for file in files if file.suffix.lower() in ENDINGS]
    if not found:
        fix = f"Give a folder of {', '.join(ENDINGS)} files"
        raise InputMissing("holds no pictures" if files else "there is no such folder", where=str(source), fix=fix)
    return found


def draw_pictures(files: list[Path], inputs: PatchInputs, *, samples: int, batch_size: int, seed: int) -> Pictures:
    """Draw `samples` of the files by `seed` and prepare them. Raises ConfigError where there are fewer."""
    if len(files) < samples:
        what = f"{len(files)} pictures are fewer than the {samples} asked for"
        raise ConfigError(what, where="calibration pictures", fix="Give more pictures or lower --samples")
    chosen = [files[at] for at in order(len(files), seed)[:samples]]
    return Pictures(np.stack([prepare(open_picture(file), inputs) for file in chosen]), batch_size)


def open_picture(path: str | Path) -> "Image":
    """Return one picture in red, green and blue. Raises InputCorrupt for a file that is none, or one that is too large."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                what = f"{opened.width} x {opened.height} pixels, above the limit of {MAX_PIXELS}"
                raise InputCorrupt(what, where=str(path), fix="Make it smaller")
            return opened.convert("RGB")
    except FileNotFoundError:
        raise InputMissing("there is no such file", where=str(path), fix="Check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputCorrupt):
            raise
        what = f"is no picture we read ({error})"
        raise InputCorrupt(what, where=str(path), fix=f"Give one of {', '.join(FORMATS)}") from None


def prepare(picture: "Image", inputs: PatchInputs) -> F32:
    """Return (patches, columns) float32: resized, the middle cut out, normalised, cut into patches."""
    from PIL import Image

    picture = picture.convert("RGB")
    short, long = sorted(picture.size)
    longer = int(inputs.resize * long / short)
    size = (inputs.resize, longer) if picture.width <= picture.height else (longer, inputs.resize)
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[inputs.resample]
    resized: npt.NDArray[np.uint8] = np.asarray(picture.resize(size, kind))
    top, left = ((side - inputs.image_size) // 2 for side in resized.shape[:2])
    return patches(resized[top : top + inputs.image_size, left : left + inputs.image_size], inputs)


def patches(square: npt.NDArray[np.uint8], inputs: PatchInputs) -> F32:
    """square: (image_size, image_size, 3) uint8; returns (patches, columns) float32, normalised."""
    mean, std = np.array(inputs.mean, np.float32), np.array(inputs.std, np.float32)
    values = (square.astype(np.float32) / np.float32(255) - mean) / std
    side, size = inputs.image_size // inputs.patch_size, inputs.patch_size
    cut = values.reshape(side, size, side, size, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cut.reshape(inputs.patches, inputs.columns))


def probe_pictures(inputs: PatchInputs, count: int = 8) -> F32:
    """Return `count` pictures made by rule, (count, patches, columns): slopes of colour, waves, discs, in that mixture.

    No photographs, but unlike noise they have what patches usually have: flat areas, edges and gratings.
    """
    y, x = np.mgrid[0 : inputs.image_size, 0 : inputs.image_size] / inputs.image_size
    made: list[Any] = []
    for k in range(count):
        turn = 2 * np.pi * k / count
        slope = 0.5 + 0.5 * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))
        waves = 0.5 + 0.5 * np.sin(2 * np.pi * (2 + 3 * k) * (x * np.sin(turn) + y * np.cos(turn)))
        disc = ((x - 0.3 - 0.05 * k) ** 2 + (y - 0.6 + 0.04 * k) ** 2 < (0.1 + 0.03 * k) ** 2).astype(np.float64)
        colours = np.roll(np.stack([slope, 0.6 * waves + 0.4 * slope, np.maximum(disc, 0.3 * slope)], axis=-1), k, -1)
        made.append(patches((255 * colours.clip(0, 1)).astype(np.uint8), inputs))
    return np.stack(made)
