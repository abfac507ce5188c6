"""A recipe that ends with a Tuner: from a checkpoint to an artifact, and on from wherever it was killed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.core.progress import Silent
from lilliput.methods.quantize import tune
from lilliput.pipeline import compress

STEPS = 5
RTN = {"rtn": {"bits": [2, 4, 8], "group_size": 32, "end_bits": [4, 8], "shared": True}}
TUNE = {"tune": {"steps": STEPS, "batch": 2}}
SWEEP = 4  # the embedding, two blocks, the head
TEXT = 1  # all that the original writes, at once


@pytest.fixture(scope="module")
def options(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"recipe": [RTN, TUNE]}


@pytest.fixture(scope="module")
def whole(llama: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(llama, out, **options)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class Killed(BaseException):
    pass


class Counts(Silent):
    """Counts how often work was done, and ends the run as a kill would when it was done `after` times."""

    def __init__(self, after: int = -1) -> None:
        self.done, self.after = 0, after

    def advance(self, units: int) -> None:
        self.done += 1
        if self.done == self.after:
            raise Killed


def test_the_artifact_holds_what_was_tuned_and_says_so(
    llama: Path, whole: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    compress(llama, tmp_path / "plain", **(options | {"recipe": [RTN]}))
    assert verify(whole).ok
    made, plain = Artifact.open(whole), Artifact.open(tmp_path / "plain")
    assert {record.method for record in made.manifest.layers} == {"rtn+tune"}
    assert {record.name for record in made.manifest.layers} == set(made.quantized)
    assert made.bits == plain.bits == (2, 4, 8)
    assert [p.stat().st_size for p in sorted(whole.glob("*.safetensors"))] == [
        p.stat().st_size for p in sorted((tmp_path / "plain").glob("*.safetensors"))
    ]
    moved = {
        name for name in made.quantized for b in made.bits
        if not np.array_equal(made.dequantize(name, b), plain.dequantize(name, b))
    }  # fmt: skip
    assert 2 * len(moved) > len(list(made.quantized))  # so few steps may move no scale as far as the next byte
    kl = [{row.bits: row.kl for row in a.manifest.quality} for a in (made, plain)]
    assert kl[0][2] < kl[1][2]


@pytest.mark.parametrize(
    "after", [2, SWEEP, SWEEP + TEXT, SWEEP + TEXT + 3, SWEEP + TEXT + STEPS, SWEEP + TEXT + STEPS + 2]
)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    after: int, llama: Path, whole: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first sweep, at its end, with the text there, amid the training, at its end, and in the last sweep."""
    monkeypatch.setattr(tune, "EVERY", -1.0)  # a state after every step
    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", progress=Counts(after), **options)
    assert not (tmp_path / "out").exists()
    rest = Counts()
    assert compress(llama, tmp_path / "out", progress=rest, **options).resumed
    assert digests(tmp_path / "out") == digests(whole)
    # a killed step is done again, and so is the head of a sweep, which is its last step; nothing else is
    assert rest.done <= 2 * SWEEP + TEXT + STEPS - after + 2
