import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact import container, write
from lilliput.artifact.publish import publish
from lilliput.artifact.verify import verify
from lilliput.artifact.write import ArtifactWriter, Plan
from lilliput.core.errors import ConfigError, OutOfResource, QualityFailed
from support.small_artifact import (
    contents,
    fill,
    llama_spec,
    provenance,
    random_linear,
    random_ratios,
    small_plan,
    write_small_artifact,
    write_tokenizer,
)

PLAN = small_plan(llama_spec(layers=1))
NAME = "layers.0.mlp.down_proj"


def finish(writer: ArtifactWriter) -> None:
    writer.finish(source=provenance(), recipe=[], seed=0)


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_small_artifact(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_packing_in_pieces_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_artifact(tmp_path / "a")
    monkeypatch.setattr(write, "_CHUNK", 100)
    write_small_artifact(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "whole", plan=PLAN)
    rng = np.random.default_rng(0)
    first, second = list(PLAN.entries)[:2]
    linears = {name: random_linear(entry, rng) for name, entry in PLAN.entries.items()}
    with ArtifactWriter.start(tmp_path / "p", PLAN, key="run") as writer:
        writer.put_quantized(first, *linears[first])
        writer.sync()
        writer.put_quantized(second, *linears[second])  # lost: never synced
    with (tmp_path / "p" / ".written").open("ab") as journal:
        journal.write(b"layers.0.attn.v_proj")  # a line cut off by a power failure counts for nothing
    with ArtifactWriter.start(tmp_path / "p", PLAN, key="run") as writer:
        assert writer.done == {first}
        fill(writer)
        write_tokenizer(tmp_path / "p")
        (tmp_path / "p" / "README.md").write_text("# A small artifact\n")
        writer.finish(source=provenance(), recipe=[{"rtn": {"bits": [2, 3, 4, 8]}}], seed=0)
    with ArtifactWriter.start(tmp_path / "p", PLAN, key="run") as writer:  # finished, but died before publishing
        assert writer.done == PLAN.entries.keys() | PLAN.floats.keys()
        writer.finish(source=provenance(), recipe=[{"rtn": {"bits": [2, 3, 4, 8]}}], seed=0)
    publish(tmp_path / "p", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_run_s_folder_is_left_alone(tmp_path: Path) -> None:
    ArtifactWriter.start(tmp_path, PLAN, key="rtn").close()
    with pytest.raises(ConfigError, match=r"holds the unfinished work of another run\. Delete it .*\('rtn'\)\.$"):
        ArtifactWriter.start(tmp_path, PLAN, key="gptq")
    with pytest.raises(ConfigError, match="was planned for another artifact"):
        ArtifactWriter.start(tmp_path, small_plan(llama_spec(layers=1), group_size=16), key="rtn")
    with (
        ArtifactWriter.start(tmp_path, PLAN, key="rtn"),
        pytest.raises(ConfigError, match=r"another run is writing here\. Wait"),
    ):
        ArtifactWriter.start(tmp_path, PLAN, key="rtn")


def test_a_finished_artifact_is_not_written_into(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", plan=PLAN)
    before = contents(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds a finished artifact"):
        ArtifactWriter.start(tmp_path / "a", PLAN)
    assert contents(tmp_path / "a") == before


def test_a_file_of_the_user_s_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "float.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"already holds a float\.safetensors\. Give another folder"):
        ArtifactWriter.start(tmp_path, PLAN)
    assert contents(tmp_path) == {"float.safetensors": b"mine"}


def test_a_run_that_died_while_it_reserved_its_space_starts_over(tmp_path: Path) -> None:
    ArtifactWriter.start(tmp_path, PLAN).close()
    (tmp_path / "bits-8.safetensors").unlink()
    with ArtifactWriter.start(tmp_path, PLAN) as writer:
        fill(writer)
        finish(writer)
    assert verify(tmp_path).ok


def test_a_tensor_that_was_never_put_is_noticed(tmp_path: Path) -> None:
    with ArtifactWriter.start(tmp_path, PLAN) as writer, pytest.raises(ValueError, match="never put, the first is emb"):
        finish(writer)


def test_what_does_not_fit_the_plan_is_refused(tmp_path: Path) -> None:
    codes, scale, zero = random_linear(PLAN.entries[NAME], np.random.default_rng(0))
    with ArtifactWriter.start(tmp_path, PLAN) as writer:
        with pytest.raises(ValueError, match=r"codes are uint8 \(63, 112\), not uint8 \(64, 112\)"):
            writer.put_quantized(NAME, codes[1:], scale, zero)
        with pytest.raises(ValueError, match="scale is float32"):
            writer.put_quantized(NAME, codes, {b: s.astype(np.float32) for b, s in scale.items()}, zero)
        with pytest.raises(QualityFailed, match=r"down_proj: the zero for 3 bits is not finite in float16\. Exclude"):
            writer.put_quantized(NAME, codes, scale, zero | {3: np.full_like(zero[3], np.inf)})
        with pytest.raises(ValueError, match="does not fit"):
            writer.put_float("final_norm.weight", np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="does not fit F32"):
            writer.put_float("final_norm.weight", np.zeros(64))
    narrow = small_plan(llama_spec(layers=1), (2,), sym=True)
    with ArtifactWriter.start(tmp_path / "n", narrow) as writer:
        with pytest.raises(ValueError, match=r"a code is \d+, beyond 2 bits"):
            writer.put_quantized(NAME, codes, {2: scale[2]})
        with pytest.raises(ValueError, match=r"zeros for the widths \[2\], not \[\]"):
            writer.put_quantized(NAME, codes & 3, {2: scale[2]}, {2: zero[2]})


def test_a_grid_that_bytes_cannot_say_is_refused(tmp_path: Path) -> None:
    plan = small_plan(llama_spec(layers=1), (4,), grid_bits=8)
    codes, scale, zero = random_linear(plan.entries[NAME], np.random.default_rng(0))
    with ArtifactWriter.start(tmp_path, plan) as writer:
        writer.put_quantized(NAME, codes, scale, zero)
        for bad, message in (
            ({4: scale[4] * np.float16(1.01)}, "a scale is not what a byte"),
            ({4: -scale[4]}, "a scale is not what a byte"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.put_quantized(NAME, codes, bad, zero)
        for step in (1 / 64, 8.0):
            with pytest.raises(ValueError, match="a zero is not what a byte can say"):
                writer.put_quantized(NAME, codes, scale, {4: zero[4] + np.float16(step)})


def test_a_ratio_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    plan = small_plan(llama_spec(layers=1), (2, 8), shared=True)
    rng = np.random.default_rng(0)
    made, ratio = random_linear(plan.entries[NAME], rng), random_ratios(plan.entries[NAME], rng)
    with ArtifactWriter.start(tmp_path, plan) as writer:
        writer.put_quantized(NAME, *made, ratio=ratio)
        with pytest.raises(ValueError, match=r"ratios for the widths \[2\], not \[2, 8\]"):
            writer.put_quantized(NAME, *made, ratio={2: ratio[2]})
        with pytest.raises(ValueError, match=r"the ratio is uint8 \(63,\), not uint8 \(64,\)"):
            writer.put_quantized(NAME, *made, ratio=ratio | {8: ratio[8][1:]})


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    plan = small_plan(llama_spec(layers=1), (2, 8), tables=(2,))
    made = random_linear(plan.entries[NAME], np.random.default_rng(0))
    good = np.tile(np.array([0, 40, 90, 127], np.uint8), (64, 1))
    with ArtifactWriter.start(tmp_path, plan) as writer:
        for bad, message in (
            (None, r"tables for the widths \[\], not \[2\]"),
            ({2: good, 8: good}, r"tables for the widths \[2, 8\]"),
            ({2: good[1:]}, r"the table is uint8 \(63, 4\), not uint8 \(64, 4\)"),
            ({2: good.astype(np.int64)}, "the table is int64"),
            ({2: good + np.uint8(1)}, "beyond 7 bits, or down"),
            ({2: good[:, ::-1]}, "beyond 7 bits, or down"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.put_quantized(NAME, *made, bad)
        writer.put_quantized(NAME, *made, {2: good})
    plain = small_plan(llama_spec(layers=1), (2, 8))
    with ArtifactWriter.start(tmp_path / "n", plain) as writer, pytest.raises(ValueError, match=r"not \[\]"):
        writer.put_quantized(NAME, *made, {2: good})


@pytest.mark.parametrize(
    ("ladders", "bits", "where"),
    [
        ({"embed_tokens": (8,)}, (2, 3), {"plane.0": 2, "plane.1": 2, "scale.8": 2}),
        ({"embed_tokens": (4, 8)}, (2, 3, 4, 8), {"plane.0": 2, "plane.1": 8, "scale.4": 2, "scale.8": 8}),
        ({"embed_tokens": (2, 4)}, (2, 3, 4, 8), {"plane.0": 2, "plane.1": 3, "scale.2": 2, "zero.4": 3}),
    ],
)
def test_a_field_stands_where_its_matrix_first_needs_it(
    ladders: dict[str, tuple[int, ...]], bits: tuple[int, ...], where: dict[str, int]
) -> None:
    plan = small_plan(llama_spec(layers=1), bits, ladders=ladders)
    assert {name: plan.home[f"embed_tokens.{name}"][0] for name in where} == {
        name: f"bits-{rung}.safetensors" for name, rung in where.items()
    }


def test_a_width_nobody_asks_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens has the width 8, which no width of \[2, 4\] uses"):
        small_plan(llama_spec(layers=1), (2, 4), ladders={"embed_tokens": (4, 8)})


def test_a_plan_that_is_not_the_decoder_is_refused() -> None:
    left = {name: entry for name, entry in PLAN.floats.items() if name != "embed_tokens.weight"}
    with pytest.raises(ConfigError, match="embed_tokens is stored neither quantized nor in float"):
        Plan(PLAN.spec, PLAN.entries, left, PLAN.bits)
    with pytest.raises(ConfigError, match=r"gate_proj is \(112, 64\) but the spec says \(96, 64\)"):
        Plan(llama_spec(layers=1, inter=96), PLAN.entries, PLAN.floats, PLAN.bits)


def test_the_counts_of_a_plan_are_those_of_its_files(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a", plan=PLAN)
    sizes = {name: (tmp_path / "a" / name).stat().st_size for name in PLAN.files}
    assert PLAN.total_bytes() == sum(sizes.values()) == PLAN.bytes_at()
    assert PLAN.bytes_at(3) == sum(sizes[f] for f in ("float.safetensors", "bits-2.safetensors", "bits-3.safetensors"))
    with pytest.raises(ConfigError, match=r"bits: 5 is not one of the widths \[2, 3, 4, 8\]"):
        PLAN.bytes_at(5)


def test_bits_a_weight_count_padding_scales_and_zeros() -> None:
    plan = small_plan(llama_spec(layers=1, hidden=64, inter=128), (2, 4), group_size=32)
    assert plan.bits_per_weight(2) == 2 + 2 * 16 / 32
    assert plan.bits_per_weight(4) == 4 + 2 * 16 / 32
    assert small_plan(llama_spec(layers=1, inter=128), (4,), sym=True).bits_per_weight(4) == 4 + 16 / 32
    spec = llama_spec(
        layers=1, hidden=64, inter=64
    )  # every matrix has 64 columns: a table of 2**b bytes for 64 weights
    wide = small_plan(spec, (2, 4, 8), sym=True, group_size=-1, tables=(2, 4))
    assert [wide.bits_per_weight(b) for b in (2, 4, 8)] == [2 + (16 + 32) / 64, 4 + (16 + 128) / 64, 8 + 16 / 64]
    one = small_plan(spec, (2, 4, 8), group_size=32, shared=True)  # a byte a row for each width
    assert [one.bits_per_weight(b) for b in (2, 4, 8)] == [b + 32 / 32 + 8 / 64 for b in (2, 4, 8)]


# --- full disks ---


def test_a_full_disk_is_told_before_the_work_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.posix_fallocate, []

    def full(handle: int, at: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, at, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfResource, match=r"bits-3\.safetensors: the disk is full for a file of \d+\.\d kB"):
        ArtifactWriter.start(tmp_path, PLAN)
    assert contents(tmp_path) == {}


def test_a_disk_that_cannot_reserve_is_asked_for_its_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_small_artifact(tmp_path / "a", plan=PLAN)
    assert verify(tmp_path / "a").ok
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(container.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        OutOfResource, match=r"b: \d+\.\d kB are needed and 1\.0 kB are free\. Free \d+\.\d kB, or give"
    ):
        ArtifactWriter.start(tmp_path / "b", PLAN)
    assert contents(tmp_path / "b") == {}


def test_a_file_size_limit_of_the_system_is_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OutOfResource, match=r"float\.safetensors: the disk is full"):
            ArtifactWriter.start(tmp_path, PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == {}


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not mount or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(OutOfResource, match=r"disk: \d+\.\d kB are needed and \d+\.\d kB are free"):
            ArtifactWriter.start(disk, PLAN)
        assert contents(disk) == {}
        with pytest.MonkeyPatch.context() as patch:  # and when the space goes between asking and reserving
            patch.setattr(write, "check_free_space", lambda *_: None)
            with pytest.raises(OutOfResource, match=r"safetensors: the disk is full for a file of"):
                ArtifactWriter.start(disk, PLAN)
        assert contents(disk) == {}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_reading_and_writing_need_no_torch() -> None:
    code = "import sys, lilliput.artifact.write, lilliput.artifact.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_messages_are_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        small_plan(llama_spec(layers=1), (2, 4), ladders={"embed_tokens": (4, 8)})
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
