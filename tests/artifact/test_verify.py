import shutil
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact import verify as verifier
from lilliput.artifact.amend import amend
from lilliput.artifact.entries import FileEntry
from lilliput.artifact.read import Artifact
from lilliput.artifact.schema import load_manifest, seal
from lilliput.artifact.verify import verify
from lilliput.core.errors import InputCorrupt, InputMissing, Unsupported
from support.small_artifact import llama_spec, small_plan, write_small_artifact

PLAN = small_plan(
    llama_spec(layers=1, hidden=16, heads=1, kv_heads=1, inter=24), (2, 3), ladders={"embed_tokens": (2,)}, tables=(2,)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "whole"
    write_small_artifact(folder, plan=PLAN)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def problem(folder: Path) -> str:
    report = verify(folder)
    assert not report.ok
    return "\n".join(report.problems)


def test_a_whole_artifact_is_fine_and_all_of_it_was_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_CHUNK", 1000)
    seen: list[tuple[int, int]] = []
    report = verify(whole, lambda read, total: seen.append((read, total)))
    assert (report.ok, report.problems, report.bits) == (True, (), (2, 3))
    assert report.files == len(list(whole.iterdir()))
    assert report.bytes == sum(path.stat().st_size for path in whole.iterdir())
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_changed_byte_anywhere_is_found(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(copy.iterdir()):
        raw = path.read_bytes()
        for at in {0, 7, 8, len(raw) - 1, *rng.integers(0, len(raw), 8).tolist()}:
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :])
            try:
                assert not verify(copy).ok, (path.name, at)
            except Unsupported:  # the flip made it another schema version, which is refused as loudly
                assert path.name == "manifest.json"
        path.write_bytes(raw)
    assert verify(copy).ok


@pytest.mark.parametrize("cut", [0, 1, 5000])
def test_a_cut_file_is_found(copy: Path, cut: int) -> None:
    path = copy / "bits-2.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert f"bits-2.safetensors: {cut} bytes where the manifest says" in problem(copy)


def test_missing_and_extra_files_are_named(copy: Path, whole: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json: the file is not there" in problem(copy)
    shutil.copy(whole / "tokenizer.json", copy)
    (copy / "extra.bin").write_bytes(b"x")
    (copy / "folder").mkdir()
    assert "extra.bin: is not in the manifest. Move it out of the folder." in problem(copy)
    assert "folder: is not in the manifest" in problem(copy)


def test_what_a_download_leaves_behind_is_ignored_but_told(copy: Path) -> None:
    (copy / ".gitattributes").write_text("x")
    (copy / ".cache").mkdir()
    report = verify(copy)
    assert (report.ok, report.ignored) == (True, (".cache", ".gitattributes"))


def test_a_narrower_copy_is_fine_but_a_gap_is_not(copy: Path) -> None:
    rung = (copy / "bits-3.safetensors").read_bytes()
    (copy / "bits-3.safetensors").unlink()
    report = verify(copy)
    assert (report.ok, report.bits, report.absent) == (True, (2,), ("bits-3.safetensors",))
    (copy / "bits-3.safetensors").write_bytes(rung)
    (copy / "bits-2.safetensors").unlink()
    assert "bits-2.safetensors: the file is not there" in problem(copy)


def test_a_link_is_a_problem(copy: Path, whole: Path) -> None:
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(whole / "README.md")
    assert "README.md: a symbolic link, which we do not follow" in problem(copy)


def test_no_artifact_is_an_error_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"manifest\.json: the file is not there"):
        verify(tmp_path)


def forge(folder: Path, tensor: str, index: int, value: int) -> None:
    """Change one byte of a tensor and every digest to match, as a broken or hostile writer would."""
    file = PLAN.home[tensor][0] if tensor in PLAN.home else "bits-2.safetensors"
    layout = PLAN.files[file]
    slot = layout.slots[tensor]
    raw = bytearray((folder / file).read_bytes())
    raw[len(layout.head) + slot.begin + index % (slot.end - slot.begin)] = value
    (folder / file).write_bytes(raw)
    manifest = load_manifest((folder / "manifest.json").read_bytes(), "m")
    entry = FileEntry(sha256=verifier.hashlib.sha256(raw).hexdigest(), size=len(raw))
    (folder / "manifest.json").write_bytes(seal(manifest.model_copy(update={"files": manifest.files | {file: entry}})))


@pytest.mark.parametrize(
    ("tensor", "index", "value", "message"),
    [
        ("_pad.0", 5, 1, "_pad.0: padding is not zero"),
        ("layers.0.attn.q_proj.plane.0", 16, 255, ""),  # input 0 of row 4: inside
        ("layers.0.attn.q_proj.plane.0", 64, 1, "plane.0: a code outside the matrix is not zero"),  # input 16 of 16
        ("embed_tokens.plane.0", -1, 64, "plane.0: a code outside the matrix is not zero"),  # row 271 of 261
        ("embed_tokens.scale.2", -1, 1, "scale.2: a value outside the matrix is not zero"),
        ("embed_tokens.zero.2", 1, 0x7C, "zero.2: a value is not finite"),
        ("layers.0.mlp.up_proj.scale.3", 1, 0x7E, "scale.3: a value is not finite"),
        ("embed_tokens.table.2", 3, 127, ""),  # the last entry of row 0
        ("embed_tokens.table.2", 3, 128, "table.2: an entry is 128, beyond 7 bits"),
        ("embed_tokens.table.2", 3, 0, "table.2: the entries of a row go down"),
        ("embed_tokens.table.2", -1, 1, "table.2: a value outside the matrix is not zero"),
    ],
)
def test_what_must_be_zero_or_finite_is_checked_beyond_the_digests(
    copy: Path, tensor: str, index: int, value: int, message: str
) -> None:
    forge(copy, tensor, index, value)
    if message:
        assert message in problem(copy)
    else:
        assert verify(copy).ok


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (-1, 1, "embed_tokens.unit.3: a value outside the matrix is not zero"),
        (0, 32, "embed_tokens.unit.3: a unit is 32, beyond 31"),
        (0, 31, ""),
    ],
)
def test_units_are_within_their_range(tmp_path: Path, row: int, value: int, message: str) -> None:
    plan = small_plan(llama_spec(layers=1), (2, 3), ladders={"embed_tokens": (2, 3)}, grid_bits=8)
    write_small_artifact(tmp_path / "a", plan=plan)
    raw = bytearray((tmp_path / "a" / "bits-3.safetensors").read_bytes())
    layout = plan.files["bits-3.safetensors"]
    slot = layout.slots["embed_tokens.unit.3"]
    raw[len(layout.head) + (slot.begin if row == 0 else slot.end - 1)] = value
    (tmp_path / "a" / "bits-3.safetensors").write_bytes(raw)
    told = "\n".join(verify(tmp_path / "a").problems)
    assert message in told
    assert (".unit." in told) is bool(message)


def test_ratios_of_rows_outside_are_zero(tmp_path: Path) -> None:
    plan = small_plan(llama_spec(layers=1), (2, 3), ladders={"embed_tokens": (2, 3)}, shared=True)
    write_small_artifact(tmp_path / "a", plan=plan)
    assert verify(tmp_path / "a").ok
    raw = bytearray((tmp_path / "a" / "bits-3.safetensors").read_bytes())
    layout = plan.files["bits-3.safetensors"]
    raw[len(layout.head) + layout.slots["embed_tokens.ratio.3"].end - 1] = 128  # row 271 of 261
    (tmp_path / "a" / "bits-3.safetensors").write_bytes(raw)
    assert "embed_tokens.ratio.3: a value outside the matrix is not zero" in "\n".join(verify(tmp_path / "a").problems)


@pytest.mark.parametrize(
    ("part", "index", "values", "message"),
    [
        ("counts", 0, [7], "the rows have"),
        ("columns", -1, [16], "an outlier stands in column 16 of 16"),
        ("columns", 0, [9, 9], "the outliers of a row do not ascend"),
        ("values", 0, [0x7C00], "an outlier is not finite"),
        ("values", 0, [0x7BFF], ""),
    ],
)
def test_outliers_stand_in_their_matrix_and_are_finite(
    tmp_path: Path, part: str, index: int, values: list[int], message: str
) -> None:
    plan = small_plan(llama_spec(layers=1, hidden=16, heads=1, kv_heads=1, inter=24), (2,), outliers=0.12)
    write_small_artifact(tmp_path / "a", plan=plan)
    assert verify(tmp_path / "a").ok
    name = "layers.0.attn.q_proj"
    file = tmp_path / "a" / "bits-2.safetensors"
    raw, layout = bytearray(file.read_bytes()), plan.files[file.name]
    slot = layout.slots[f"{name}.outlier.{part}"]
    held = np.frombuffer(raw, np.uint16, (slot.end - slot.begin) // 2, len(layout.head) + slot.begin)
    held[index : index + len(values) or None] = values
    file.write_bytes(raw)
    told = "\n".join(verify(tmp_path / "a").problems)
    assert (f"{name}: {message}" in told) is bool(message)
    if message:
        with Artifact.open(tmp_path / "a") as artifact, pytest.raises(InputCorrupt, match=message):
            artifact.dequantize(name)


def test_a_damaged_artifact_is_not_amended_into_a_good_one(copy: Path) -> None:
    path = copy / "bits-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    amend(copy)
    assert "bits-2.safetensors: the contents do not match their SHA-256" in problem(copy)
