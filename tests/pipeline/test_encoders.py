"""Encoders from checkpoint to artifact: what is stored, what is gathered, what is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.apps.cli import main
from lilliput.artifact.entries import EmbeddingQuality
from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.core.progress import Silent
from lilliput.core.spec import PADDING, EncoderSpec, PatchInputs
from lilliput.data.images import probe_pictures
from lilliput.data.streams import Batches
from lilliput.embedding import Embedder
from lilliput.methods.base import LayerMethod, Statistic
from lilliput.methods.journal import Journal
from lilliput.methods.sources import CheckpointSource
from lilliput.methods.sweep import Job, Sweep
from lilliput.models import Checkpoint
from lilliput.pipeline import compress
from support.encoders import write_encoder

RTN = [{"rtn": {"bits": [4, 8], "group_size": 32}}]
TEXT = [[0, 17, 44, 91, 200, 1], [0, 60, 61, 1], [0, 5, 1]]


def padded(rows: list[list[int]]) -> np.ndarray:
    return np.array([row + [PADDING] * (max(map(len, rows)) - len(row)) for row in rows])


def give_dequantized(theirs: Any, artifact: Artifact, checkpoint: Checkpoint, bits: int) -> None:
    """Put an artifact's matrices into the transformers model, under the names they had there."""
    weights = dict(theirs.named_parameters())
    for name in artifact.quantized:
        (stored,) = checkpoint._origins[f"{name}.weight"].stored
        matrix = torch.from_numpy(artifact.dequantize(name, bits))
        weights[stored].data.copy_(matrix.view_as(weights[stored]))


@torch.no_grad()
def bert(theirs: Any) -> np.ndarray:
    ids = torch.from_numpy(padded(TEXT))
    seen = ids != PADDING
    states = theirs(ids.clamp(min=0), attention_mask=seen.long()).last_hidden_state
    return ((states * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)).numpy()


@torch.no_grad()
def clip_text(theirs: Any) -> np.ndarray:
    ids = torch.from_numpy(padded(TEXT))
    seen = ids != PADDING
    said = theirs.text_model(ids.masked_fill(~seen, 1), attention_mask=seen.long()).pooler_output
    return theirs.text_projection(said).numpy()  # type: ignore[no-any-return]


@torch.no_grad()
def clip_vision(theirs: Any) -> np.ndarray:
    pictures = torch.from_numpy(pixels(patches()))
    return theirs.visual_projection(theirs.vision_model(pictures).pooler_output).numpy()  # type: ignore[no-any-return]


def patches() -> np.ndarray:
    inputs = PatchInputs(
        image_size=24, patch_size=8, resize=26, resample="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    return probe_pictures(inputs, 3)


def pixels(cut: np.ndarray) -> np.ndarray:
    """(n, 9, 3 * 64) patches back to (n, 3, 24, 24) pictures."""
    return np.ascontiguousarray(cut.reshape(-1, 3, 3, 3, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, 24, 24))


@pytest.mark.parametrize(
    ("family", "tower", "forward"), [("bert", None, bert), ("clip", "text", clip_text), ("clip", "vision", clip_vision)]
)
def test_an_artifact_says_what_transformers_computes_from_its_weights(
    family: str, tower: str | None, forward: Any, tmp_path: Path
) -> None:
    theirs = write_encoder(tmp_path / "model", family)
    original = forward(theirs)
    report = compress(tmp_path / "model", tmp_path / "out", recipe=RTN, tower=tower, gate=False)
    assert verify(tmp_path / "out").ok
    embedder = Embedder(tmp_path / "out")
    manifest = embedder.artifact.manifest
    assert manifest.schema_version == "1.5"  # for its grids in bytes
    assert manifest.entries.keys() == manifest.spec.matrices().keys() - {"projection"}
    inputs = patches() if tower == "vision" else padded(TEXT)
    errors = []
    for bits in (4, 8):
        give_dequantized(theirs, embedder.artifact, Checkpoint.open(tmp_path / "model", tower=tower), bits)
        meant, said = forward(theirs), embedder.vectors(inputs, bits=bits)
        assert np.abs(said - meant).max() <= 1e-5 * np.abs(meant).max()
        errors.append(np.linalg.norm(said - original))
    assert 0 < errors[1] < errors[0] / 4
    four, eight = manifest.quality
    assert isinstance(four, EmbeddingQuality)
    assert isinstance(eight, EmbeddingQuality)
    assert (four.bits, eight.bits) == (4, 8)
    assert four.cosine < eight.cosine <= 1
    assert eight.error < 0.05
    assert [row.cosine for row in report.rows] == [four.cosine, eight.cosine]


def test_the_gate_measures_the_vectors_of_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "model", "bert")
    monkeypatch.setitem(__import__("lilliput.pipeline.gate", fromlist=["COSINES"]).COSINES, 4, 0.99999)
    with pytest.raises(
        RuntimeError, match=r"^quality gate: 4 bits: the cosine to the original's vectors is .* below 0\.9"
    ):
        compress(tmp_path / "model", tmp_path / "out", recipe=RTN)
    report = compress(tmp_path / "model", tmp_path / "out", recipe=RTN, gate=False)
    assert report.resumed
    assert "cosine, mean" in (tmp_path / "out" / "README.md").read_text()


@dataclass(frozen=True, kw_only=True)
class Keeps(LayerMethod):
    """Leaves a weight as it is and keeps the statistic it was given."""

    needs: ClassVar[Statistic] = Statistic.GRAM
    found: ClassVar[list[Tensor]] = []

    def solve(self, weight: Tensor, stat: Tensor | None) -> Tensor:
        assert stat is not None
        self.found.append(stat)
        return weight


class Nowhere:
    """A Sink that keeps nothing."""

    def quantized(self, name: str, value: object, weight: Tensor) -> None: ...
    def floating(self, name: str, value: Tensor) -> None: ...
    def settle(self) -> None: ...


@torch.no_grad()
def test_statistics_are_those_of_the_tokens_and_not_of_padding(tmp_path: Path) -> None:
    theirs = write_encoder(tmp_path / "model", "bert")
    source, rows = CheckpointSource(Checkpoint.open(tmp_path / "model")), padded(TEXT)
    names = [name for layer in range(2) for name in source.spec.linears(layer)]
    job = Job({name: [Keeps()] for name in names}, (), torch.from_numpy(rows), Batches(rows, 2))
    Keeps.found.clear()
    Sweep(source, Nowhere(), job, Journal(tmp_path / "journal"), Silent()).run()
    assert len(Keeps.found) == len(names)
    grams: dict[str, Tensor] = {}
    modules = dict(theirs.named_modules())
    for name in names:
        (stored,) = Checkpoint.open(tmp_path / "model")._origins[f"{name}.weight"].stored

        def add(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0][0].double()
            grams[name] = grams.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=torch.double)) + x.T @ x

        modules[stored.removesuffix(".weight")].register_forward_pre_hook(add)
    for row in TEXT:  # each alone, so that there is no padding
        theirs(torch.tensor([row]))
    for name, found in zip(names, Keeps.found, strict=True):
        assert float((found - grams[name]).abs().max() / grams[name].abs().max()) < 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder / "model", "bert")
    assert main(["compress", str(folder / "model"), "-o", str(folder / "out"), "--group-size", "32", "--no-gate"]) == 0
    return folder / "out"


@pytest.mark.parametrize("verb", [["run", "-p", "a"], ["bench"], ["eval", "--text", "x.txt"], ["serve", "--port", "0"]])
def test_verbs_that_write_text_refuse_an_encoder_in_one_line(
    verb: list[str], artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb[0], str(artifact), *verb[1:]]) == 4
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "holds a bert encoder, which writes no text. " in said


def test_inspect_and_verify_describe_an_encoder(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    text = capsys.readouterr().out
    assert "cosine" in text
    assert "64 numbers, from mean of 48 positions" in text
    assert main(["inspect", str(artifact.parent / "model")]) == 0
    assert "token types: 1 tensors" in capsys.readouterr().out
    assert main(["verify", str(artifact)]) == 0


SWEPT = [
    [{"smoothquant": {}}, {"rtn": {"bits": [4], "group_size": 32}}],
    [{"awq": {"ratios": 3, "samples": 2, "length": 8}}, {"rtn": {"bits": [4], "group_size": 32}}],
    [{"gptq": {"bits": [4], "group_size": 32, "outliers": 0.01}}],
    [{"leanquant": {"bits": [4], "group_size": 32, "exponents": [2.0], "rounds": 1}}],
    [{"omniquant": {"bits": [4], "group_size": 32, "epochs": 1}}],
]


@pytest.mark.parametrize("recipe", SWEPT, ids=lambda recipe: next(iter(recipe[0])))
@pytest.mark.parametrize(("family", "tower"), [("bert", None), ("clip", "text"), ("clip", "vision")])
def test_every_method_of_the_sweep_takes_an_encoder(
    family: str, tower: str | None, recipe: list[Any], tmp_path: Path
) -> None:
    write_encoder(tmp_path / "model", family)
    if tower == "vision":
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "given").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
        for number, picture in enumerate(noise):
            image.fromarray(picture).save(tmp_path / "given" / f"{number}.png")
        given = tmp_path / "given"
    else:
        given = tmp_path / "text.txt"
        given.write_text("the sea and the wind\n" * 5 + "on and on\n" * 5)
    draw: dict[str, Any] = {"calibration": [given], "samples": 6, "length": 9}
    report = compress(tmp_path / "model", tmp_path / "out", recipe=recipe, tower=tower, gate=False, **draw)
    assert verify(tmp_path / "out").ok
    (row,) = report.rows
    assert row.cosine is not None
    assert row.cosine > 0.9


def test_methods_that_train_on_next_tokens_are_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model", "bert")
    (tmp_path / "text.txt").write_text("a\n" * 20)
    with pytest.raises(NotImplementedError, match=r"tune learns from predicting tokens, which a bert encoder"):
        compress(tmp_path / "model", tmp_path / "out", recipe=[*RTN, {"tune": {}}], calibration=[tmp_path / "text.txt"])


def test_calibration_takes_lines_and_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    write_encoder(tmp_path / "model", "clip")
    (tmp_path / "text.txt").write_text("the sea and the wind\n" * 5 + "on and on\n\n" * 5)
    recipe = [{"wanda": {"sparsity": 0.25}}, {"rtn": {"bits": [8], "group_size": 32}}]
    given = {"recipe": recipe, "samples": 4, "gate": False, "length": 7}
    compress(tmp_path / "model", tmp_path / "t", tower="text", calibration=[tmp_path / "text.txt"], **given)  # type: ignore[arg-type]
    data = Artifact.open(tmp_path / "t").manifest.data
    assert data is not None
    assert 0 < data.tokens <= 4 * 7
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 255, (30 + k, 40, 3), dtype=np.uint8)
        image.fromarray(noise).save(tmp_path / "pictures" / f"{k}.png")
    compress(tmp_path / "model", tmp_path / "v", tower="vision", calibration=[tmp_path / "pictures"], **given)  # type: ignore[arg-type]
    manifest = Artifact.open(tmp_path / "v").manifest
    assert manifest.data is not None
    assert manifest.data.tokens == 4 * 9
    assert isinstance(manifest.spec, EncoderSpec)
    assert not (tmp_path / "v" / "tokenizer.json").exists()
    vectors = Embedder(tmp_path / "v").pictures([tmp_path / "pictures" / "0.png"])
    assert vectors.shape == (1, 40)
    assert np.linalg.norm(vectors) == pytest.approx(1)
