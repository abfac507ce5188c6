import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lilliput.artifact import read
from lilliput.artifact.container import Layout, Planned
from lilliput.artifact.plan import Plan
from lilliput.artifact.read import Artifact
from lilliput.artifact.verify import verify
from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing
from support.small_artifact import (
    llama_spec,
    random_float,
    random_linear,
    random_ratios,
    random_tables,
    small_plan,
    write_small_artifact,
)

PLAN = small_plan(llama_spec(layers=1), ladders={"embed_tokens": (4, 8)})
NAME = "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read") / "whole"
    write_small_artifact(folder, plan=PLAN)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def reference(plan: Plan, name: str, bits: int, seed: int = 0) -> np.ndarray:
    """Spell out the formula of docs/architecture.md, weight by weight."""
    rng = np.random.default_rng(seed)
    parts = (random_linear, random_tables, random_ratios)
    made = {n: [part(entry, rng) for part in parts] for n, entry in plan.entries.items()}
    (codes, scale, zero), table, ratio = made[name]
    entry = plan.entries[name]
    own = entry.bits[0] if ratio else bits
    size = entry.columns if entry.group_size == -1 else entry.group_size
    out = np.empty(codes.shape, np.float32)
    for n, k in np.ndindex(codes.shape):
        code = codes[n, k] >> (entry.bits[-1] - bits)
        c = np.float32(code) - np.float32((2**bits - 1) / 2)
        if bits in table:
            c = np.float32(table[bits][n, code]) - np.float32(63.5)
        times = np.float32(1)
        if bits in ratio:
            times = np.float32((128 + int(ratio[bits][n])) / 256 / 2 ** (bits - own))
        if own in zero:
            c -= np.float32(zero[own][n, k // size]) * (np.float32(1) / times)
        out[n, k] = np.float32(scale[own][n, k // size]) * times * c
    return out


@pytest.mark.parametrize("group_size", [-1, 1, 32, 48, 500])
@pytest.mark.parametrize("sym", [True, False])
def test_dequantizing_is_the_formula_bit_for_bit(tmp_path: Path, group_size: int, sym: bool) -> None:
    plan = small_plan(llama_spec(layers=1), (2, 5), group_size=group_size, sym=sym)
    write_small_artifact(tmp_path / "a", plan=plan)
    with Artifact.open(tmp_path / "a") as artifact:
        for bits in (2, 5):
            assert artifact.dequantize(NAME, bits).tobytes() == reference(plan, NAME, bits).tobytes()


@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("sym", [True, False])
def test_levels_of_a_table_are_the_formula_bit_for_bit(tmp_path: Path, group_size: int, sym: bool) -> None:
    spec = llama_spec(layers=1, hidden=48, heads=3, kv_heads=3, inter=40)
    plan = small_plan(spec, (1, 2, 3, 4, 8), group_size=group_size, sym=sym, tables=(1, 3, 4))
    manifest = write_small_artifact(tmp_path / "a", plan=plan)
    assert manifest.schema_version == "1.1"
    with Artifact.open(tmp_path / "a") as artifact:
        for bits in plan.bits:
            assert artifact.dequantize(NAME, bits).tobytes() == reference(plan, NAME, bits).tobytes()
        linear = artifact.linear(NAME, 3)
        assert {b: t.shape for b, t in linear.table.items()} == {1: (3, 16, 2), 3: (3, 16, 8)}
        assert all(t.ctypes.data % 64 == 0 for t in linear.table.values())
        assert artifact.plan.home[f"{NAME}.table.3"][0] == "bits-3.safetensors"


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", [{}, {"shared": True}, {"tables": (2, 3)}], ids=str)
def test_a_grid_in_bytes_is_the_formula_bit_for_bit(tmp_path: Path, form: dict[str, Any], sym: bool) -> None:
    spec = llama_spec(layers=1, hidden=48, heads=3, kv_heads=3, inter=40)
    plan = small_plan(spec, (2, 3, 8), group_size=16, sym=sym, grid_bits=8, ladders={"embed_tokens": (3,)}, **form)
    manifest = write_small_artifact(tmp_path / "a", plan=plan)
    assert manifest.schema_version == "1.5"
    with Artifact.open(tmp_path / "a") as artifact:
        for bits in plan.bits:
            assert artifact.dequantize(NAME, bits).tobytes() == reference(plan, NAME, bits).tobytes()
        linear = artifact.linear(NAME, 2)
        assert (linear.scale[2].dtype, linear.unit[2].shape) == (np.uint8, (3, 16))
        assert sym or linear.zero[2].dtype == np.int8
        artifact.read_ahead(3)
    assert verify(tmp_path / "a").ok
    for bits in (3, 8):
        (tmp_path / "a" / f"bits-{bits}.safetensors").unlink()
    with Artifact.open(tmp_path / "a") as narrow:
        assert narrow.dequantize(NAME, 2).tobytes() == reference(plan, NAME, 2).tobytes()


@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("sym", [True, False])
def test_a_shared_grid_is_the_formula_bit_for_bit(tmp_path: Path, group_size: int, sym: bool) -> None:
    spec = llama_spec(layers=1, hidden=48, heads=3, kv_heads=3, inter=40)
    plan = small_plan(spec, (2, 3, 4, 8), group_size=group_size, sym=sym, shared=True, ladders={"embed_tokens": (4,)})
    manifest = write_small_artifact(tmp_path / "a", plan=plan)
    assert manifest.schema_version == "1.4"
    with Artifact.open(tmp_path / "a") as artifact:
        for bits in plan.bits:
            assert artifact.dequantize(NAME, bits).tobytes() == reference(plan, NAME, bits).tobytes()
        linear = artifact.linear(NAME, 3)
        assert (list(linear.scale), {b: r.shape for b, r in linear.ratio.items()}) == ([2], {2: (3, 16), 3: (3, 16)})
        assert artifact.plan.home[f"{NAME}.ratio.3"][0] == "bits-3.safetensors"
        artifact.read_ahead(4)
    for bits in (3, 4, 8):
        (tmp_path / "a" / f"bits-{bits}.safetensors").unlink()
    with Artifact.open(tmp_path / "a") as narrow:
        assert narrow.dequantize(NAME, 2).tobytes() == reference(plan, NAME, 2).tobytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.sets(st.integers(1, 8), min_size=1, max_size=4).map(lambda widths: tuple(sorted(widths))))
def test_any_ladder_round_trips(tmp_path: Path, bits: tuple[int, ...]) -> None:
    plan = small_plan(llama_spec(layers=1, hidden=16, heads=1, kv_heads=1, inter=24), bits)
    folder = tmp_path / "-".join(map(str, bits))
    if not folder.exists():
        write_small_artifact(folder, plan=plan)
    artifact = Artifact.open(folder)
    assert artifact.bits == bits
    for b in bits:
        assert artifact.dequantize(NAME, b).tobytes() == reference(plan, NAME, b).tobytes()
    artifact.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    plan = small_plan(llama_spec(layers=1), (), float_dtype=dtype)
    write_small_artifact(tmp_path / "a", plan=plan)
    rng = np.random.default_rng(0)
    with Artifact.open(tmp_path / "a") as artifact:
        assert (artifact.bits, artifact.quantized) == ((), ())
        for name, entry in plan.floats.items():
            values, stored = random_float(entry, rng), artifact.tensor(name)
            assert (stored.dtype, stored.shape) == (entry.dtype, entry.shape)
            assert stored.data.tobytes() == values.tobytes()
            wide = values.astype(np.uint32) << 16 if entry.dtype == "BF16" else values.astype(np.float32)
            assert artifact.dequantize(name).tobytes() == wide.tobytes()
        assert artifact.dequantize(NAME).shape == (64, 112)


def test_a_matrix_runs_at_its_own_width(whole: Path) -> None:
    artifact = Artifact.open(whole)
    assert [artifact.linear("embed_tokens").width_at(b) for b in artifact.bits] == [4, 4, 4, 8]
    for asked, own in ((2, 4), (4, 4), (8, 8)):
        assert np.array_equal(artifact.dequantize("embed_tokens", asked), reference(PLAN, "embed_tokens", own))


def test_a_narrow_use_never_opens_a_wider_file(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real: Callable[..., object] = read.open_tensors
    monkeypatch.setattr(read, "open_tensors", lambda plan, file, *rest: opened.append(file) or real(plan, file, *rest))
    artifact = Artifact.open(whole)
    linear = artifact.linear(NAME, max_bits=3)
    assert opened == ["float.safetensors", "bits-2.safetensors", "bits-3.safetensors"]
    assert (linear.bits, linear.fields, len(linear.planes)) == ((2, 3), (2, 1), 2)
    assert (linear.scale.keys(), linear.zero.keys()) == ({2, 3}, {2, 3})
    assert np.array_equal(linear.dequantize(3), artifact.dequantize(NAME, 3))
    assert all(not plane.flags.writeable for plane in linear.planes)
    assert all(plane.ctypes.data % 4096 == 0 for plane in linear.planes)


def test_names_are_answered_and_unknown_ones_explained(whole: Path) -> None:
    artifact = Artifact.open(whole)
    assert artifact.has("final_norm.weight")
    assert artifact.has(NAME)
    assert not artifact.has("lm_head.weight")
    assert artifact.size_bytes == sum(path.stat().st_size for path in whole.iterdir())
    assert artifact.bytes_at() == PLAN.total_bytes()
    with pytest.raises(InputMissing, match=r"there is no tensor 'lm_head\.weight'\. See `entries` and `floats`"):
        artifact.dequantize("lm_head", 4)
    with pytest.raises(InputMissing, match="'final_norm' is not a quantized matrix"):
        artifact.linear("final_norm")
    with pytest.raises(ConfigError, match=r"whole: 5 is not one of the widths \[2, 3, 4, 8\]"):
        artifact.linear(NAME, 5)


def test_a_copy_without_its_wider_files_serves_the_narrower_widths(copy: Path, whole: Path) -> None:
    for rung in (4, 8):
        (copy / f"bits-{rung}.safetensors").unlink()
    artifact = Artifact.open(copy)
    assert artifact.bits == (2, 3)
    assert artifact.size_bytes == sum(path.stat().st_size for path in copy.iterdir())
    assert np.array_equal(artifact.dequantize(NAME), Artifact.open(whole).dequantize(NAME, 3))
    with pytest.raises(InputMissing, match=r"bits-4\.safetensors is not there, so this copy serves only \[2, 3\] bits"):
        artifact.dequantize(NAME, 4)
    shutil.copy(whole / "bits-4.safetensors", copy)
    assert Artifact.open(copy).bits == (2, 3, 4)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("bits-2.safetensors", r"bits-2\.safetensors: the manifest lists this file but it is not there"),
        ("bits-3.safetensors", r"bits-3\.safetensors is not there, and bits-4\.safetensors is of no use without it"),
        ("float.safetensors", r"float\.safetensors: the manifest lists this file"),
        ("tokenizer.json", r"tokenizer\.json: the manifest lists this file"),
        ("manifest.json", r"manifest\.json: the file is not there"),
    ],
)
def test_a_missing_file_is_named(copy: Path, gone: str, message: str) -> None:
    (copy / gone).unlink()
    with pytest.raises(InputMissing, match=message):
        Artifact.open(copy)


def test_no_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        InputMissing, match=r"nowhere: there is no such folder\. Give a folder that `lilliput compress`"
    ):
        Artifact.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputMissing, match="cannot be opened as a folder"):
        Artifact.open(tmp_path / "file")


@pytest.mark.parametrize(("change", "kind"), [(-1, "cut off"), (1, "too long")])
def test_a_file_of_the_wrong_size_is_refused(copy: Path, change: int, kind: str) -> None:
    path = copy / "bits-8.safetensors"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(InputCorrupt, match=f"{size + change} bytes instead of {size}: the file is {kind}"):
        Artifact.open(copy)


@pytest.mark.parametrize("name", ["bits-2.safetensors", "tokenizer.json", "manifest.json"])
def test_a_link_is_not_followed_and_a_pipe_does_not_hang(copy: Path, whole: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).symlink_to(whole / name)
    with pytest.raises(InputCorrupt, match=r"a symbolic link, which we do not follow\. Copy the file itself"):
        Artifact.open(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(InputCorrupt, match="not a regular file"):
        Artifact.open(copy)


def rewrite(path: Path, tensors: list[Planned]) -> None:
    """Put a file of zeros with other tensors in the place of one, of the same size as before."""
    layout, size = Layout.of(tensors), path.stat().st_size
    table = {
        s.name: {"dtype": s.dtype, "shape": s.shape, "data_offsets": (s.begin, s.end)} for s in layout.slots.values()
    }
    end = layout.size - len(layout.head)
    table["_pad.rest"] = {
        "dtype": "U8",
        "shape": (size - layout.size,),
        "data_offsets": (end, end + size - layout.size),
    }
    text = json.dumps(table).encode().ljust(len(layout.head) - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size - len(layout.head)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[1:], r"plane\.1: is in the manifest but not in the file"),
        (
            lambda tensors: [*tensors, Planned("a.stranger", "U8", (0,))],
            "a.stranger: is in the file but not in the man",
        ),
        (
            lambda tensors: [replace(tensors[0], shape=(1, 1, 64)), *tensors[1:]],
            r"plane\.1: is U8 \(1, 1, 64\) where the manifest says U8 \(4, 2, 64\)",
        ),
        (
            lambda tensors: [replace(tensors[0], dtype="I8"), *tensors[1:]],
            r"plane\.1: is I8 \(4, 2, 64\) where the manifest says U8 \(4, 2, 64\)",
        ),
        (
            lambda tensors: [replace(tensor, align=64) for tensor in tensors],
            r"plane\.1: begins at byte \d+, which is not a multiple of 4096",
        ),
    ],
)
def test_a_header_that_is_not_the_manifest_s_is_refused(
    copy: Path, change: Callable[[list[Planned]], list[Planned]], message: str
) -> None:
    rewrite(copy / "bits-3.safetensors", change(PLAN.tensors["bits-3.safetensors"]))
    with Artifact.open(copy) as artifact:
        assert artifact.linear(NAME, 2).bits == (2,)
        with pytest.raises(InputCorrupt, match=message):
            artifact.linear(NAME, 3)
