import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.artifact import schema
from lilliput.artifact.entries import EmbeddingQuality
from lilliput.artifact.schema import Manifest, load_manifest, seal
from lilliput.core.errors import InputCorrupt, LilliputError, Unsupported
from support.small_artifact import llama_spec, small_plan, write_small_artifact


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("schema") / "a"
    return write_small_artifact(folder, plan=small_plan(llama_spec(layers=1), (2, 4)))


def changed(manifest: Manifest, path: str, value: Any) -> bytes:
    """Manifest with one field changed or added and a digest that fits."""
    data = manifest.model_dump(mode="json")
    *steps, last = path.split("/")
    at = data
    for step in steps:
        at = at[step]
    at[last] = value
    return schema._sealed(data, "m")


def test_a_manifest_round_trips_to_the_same_bytes(manifest: Manifest) -> None:
    raw = seal(manifest)
    assert raw.endswith(b"}\n")
    assert load_manifest(raw, "m") == manifest
    assert seal(load_manifest(raw, "m")) == raw


def test_every_changed_byte_is_found(manifest: Manifest) -> None:
    raw = seal(manifest)
    for at in range(0, len(raw), 7):
        for flip in (1, 32, 128):
            with pytest.raises(LilliputError):
                load_manifest(raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :], "m")
    for other in (
        raw + b"\n",
        raw[:-1],
        b" " + raw,
        raw.replace(b"  ", b"\t", 1),
        json.dumps(json.loads(raw)).encode(),
    ):
        with pytest.raises(InputCorrupt, match="does not match its own digest"):
            load_manifest(other, "m")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = st.sampled_from(
    [
        "bits",
        "entries",
        "floats",
        "files",
        "spec",
        "recipe",
        "seed",
        "data",
        "tools",
        "quality",
        "layers",
        "schedule",
        "spec/windows",
        "spec/norm",
        "spec/rotary/inv_freq",
        "spec/num_layers",
        "entries/embed",
        "floats/final_norm.weight",
        "files/config.json",
    ]
)


@settings(max_examples=80, deadline=None)
@given(path=PATHS, value=VALUES, minor=st.sampled_from(["1.0", "1.5"]))
def test_any_value_anywhere_is_accepted_or_refused(manifest: Manifest, path: str, value: Any, minor: str) -> None:
    raw = changed(manifest.model_copy(update={"schema_version": minor}), path, value)
    with suppress(LilliputError):
        assert load_manifest(raw, "m").spec == manifest.spec or path.startswith("spec")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not strict JSON"),
        (b"[]", "the JSON is a list, not an object"),
        (b"{}", "there is no schema_version, so this is not a Lilliput manifest"),
        (b'{"schema_version": 1}', "there is no schema_version"),
        (b'{"schema_version": "1.0", "seed": 1e999}', "a number is not finite"),
        (b'{"schema_version": "1.0", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply"),
        (b'{"schema_version": "1.0", "x": ' + b"[" * 400 + b"]" * 400 + b"}", "digest|nesting is too deep"),
        (b'{"schema_version": "1.0", "schema_version": "1.0"}', "'schema_version' appears twice"),
    ],
)
def test_what_is_no_manifest_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(InputCorrupt, match=message):
        load_manifest(raw, "m")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unknown", 1, "unknown: Extra inputs are not permitted"),
        ("spec/unknown", 1, "spec.unknown: Extra inputs"),
        ("spec/num_layers", 10**15, "layers but 1 windows"),
        ("spec/rotary/inv_freq", [1.0], "spec.rotary has 1 frequencies for 16 channels"),
        ("spec/vocab_size", 300, r"embed_tokens is \(261, 64\) but the spec says \(300, 64\)"),
        ("spec/tied_head", False, "lm_head is stored neither quantized nor in float"),
        ("bits", [4, 2], "is not strictly increasing"),
        ("bits", [2, 3, 4], "`files` lacks bits-3.safetensors"),
        ("bits", [], "the widths are"),
        ("entries/layers.0.attn.q_proj/out", 1 << 60, "less than or equal"),
        ("entries/layers.0.attn.q_proj/out", 32, r"q_proj is \(32, 64\) but the spec says \(64, 64\)"),
        ("entries/layers.0.attn.q_proj/group_size", 0, "neither -1 nor positive"),
        ("entries/layers.0.attn.q_proj/tables", [3], r"tables \[3\] are not widths of \[2, 4\] up to 4 bits"),
        ("entries/layers.0.attn.q_proj/tables", [4, 2], "are not widths"),
        ("entries/layers.0.attn.q_proj/tables", [2, 2], "are not widths"),
        (
            "entries/layers.9.attn.q_proj",
            {"out": 1, "columns": 1, "bits": [2], "group_size": -1, "sym": True},
            "no such",
        ),
        (
            "entries/..\\evil",
            {"out": 1, "columns": 1, "bits": [2], "group_size": -1, "sym": True},
            "should match pattern",
        ),
        ("floats/final_norm.weight/shape", [65], r"final_norm.weight is \(65,\) but the spec says \(64,\)"),
        ("floats/final_norm.weight/dtype", "F64", "Input should be 'F32', 'F16' or 'BF16'"),
        ("floats/layers.0.attn.q_proj.bias", {"dtype": "F32", "shape": [3]}, r"q_proj.bias is \(3,\)"),
        ("floats/lm_head.weight", {"dtype": "F32", "shape": [261, 64]}, "although the head is tied"),
        ("floats/layers.0.attn.q_proj.weight", {"dtype": "F32", "shape": [64, 64]}, "q_proj is stored twice"),
        ("files/..", {"sha256": "0" * 64, "size": 0}, "is not a plain file name"),
        ("files/a\\b", {"sha256": "0" * 64, "size": 0}, "is not a plain file name"),
        ("files/.hidden", {"sha256": "0" * 64, "size": 0}, "is not a plain file name"),
        ("files/new\nline", {"sha256": "0" * 64, "size": 0}, "is not a plain file name"),
        ("files/manifest.json", {"sha256": "0" * 64, "size": 0}, "`files` lists the manifest"),
        ("schedule", {"name": "static", "prefill_bits": 4, "ladder": [3, 2]}, "a width of 3 bits, which is not in"),
        ("schedule", {"name": "static", "prefill_bits": 8, "ladder": [4, 2]}, "a width of 8 bits, which is not in"),
        ("schedule", {"name": "static", "prefill_bits": 4, "ladder": [2, 4]}, r"the ladder \[2, 4\] does not fall"),
        ("schedule", {"name": "s", "prefill_bits": 4, "ladder": [4, 2], "steps": [[1, 4]]}, "do not ascend from 0"),
        ("schedule", {"name": "s", "prefill_bits": 4, "ladder": [4, 2], "steps": [[0, 4], [0, 2]]}, "do not ascend"),
        ("schedule", {"name": "s", "prefill_bits": 4, "ladder": [4], "steps": [[0, 2]]}, "a width that is not in"),
        ("schedule", {"name": "s", "prefill_bits": 4, "ladder": [4], "file": "a"}, "lacks the model or the horizon"),
        (
            "schedule",
            {"name": "s", "prefill_bits": 4, "ladder": [4], "file": "a", "model": "0" * 64, "horizon": 9},
            "`files` lacks a, which the schedule names",
        ),
        ("schedule", {"name": "../s", "prefill_bits": 4, "ladder": [4]}, "should match pattern"),
        ("files/config.json/size", -1, "greater than or equal to 0"),
        ("files/config.json/sha256", "../../etc/passwd", "should match pattern"),
    ],
)
def test_a_manifest_that_lies_is_refused(manifest: Manifest, path: str, value: Any, message: str) -> None:
    with pytest.raises(InputCorrupt, match=message):
        load_manifest(changed(manifest, path, value), "m")


def test_a_newer_major_is_refused_by_name(manifest: Manifest) -> None:
    with pytest.raises(Unsupported, match=r"^m: schema 2\.0, and this lilliput reads 1\.x\. Update lilliput\.$"):
        load_manifest(changed(manifest, "schema_version", "2.0"), "m")


def test_a_newer_minor_may_say_more_but_not_mean_more(manifest: Manifest) -> None:
    assert schema.SCHEMA_VERSION == "1.6"  # with the next minor, raise the numbers below
    newer = manifest.model_copy(update={"schema_version": "1.8"})
    for path in ("carbon_footprint", "source/licence", "files/config.json/mime"):
        read = load_manifest(changed(newer, path, "x"), "m")
        assert read.entries == manifest.entries
        assert read.schema_version == "1.8"
    for path in ("spec/sinks", "spec/kind", "entries/layers.0.attn.q_proj/codebook"):
        with pytest.raises(Unsupported, match=r"schema 1\.8 says .*Extra inputs.*Update lilliput, this one knows 1\.6"):
            load_manifest(changed(newer, path, "x"), "m")
    with pytest.raises(Unsupported, match=r"schema 1\.8 says spec\.activation"):
        load_manifest(changed(newer, "spec/activation", "mish"), "m")


def test_the_manifest_in_the_folder_is_what_the_writer_returned(tmp_path: Path) -> None:
    written = write_small_artifact(tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == seal(written)


def test_tables_raise_the_version_only_where_there_are_some(manifest: Manifest, tmp_path: Path) -> None:
    assert manifest.schema_version == "1.0"
    assert b'"tables"' not in seal(manifest)
    plan = small_plan(llama_spec(layers=1), (2, 4, 8), ladders={"embed_tokens": (8,)}, tables=(2, 4))
    written = write_small_artifact(tmp_path / "a", plan=plan)
    assert written.schema_version == "1.1"
    said = json.loads(seal(written))["entries"]
    assert said["layers.0.attn.q_proj"]["tables"] == [2, 4]
    assert "tables" not in said["embed_tokens"]


def test_outliers_raise_the_version_only_where_there_are_some(manifest: Manifest, tmp_path: Path) -> None:
    assert b'"outliers"' not in seal(manifest)
    written = write_small_artifact(tmp_path / "a", plan=small_plan(llama_spec(layers=1), (2, 4), outliers=0.01))
    assert written.schema_version == "1.6"
    assert json.loads(seal(written))["entries"]["layers.0.attn.q_proj"]["outliers"] == 41


def test_both_kinds_of_quality_read_back_and_newer_ones_may_say_more(manifest: Manifest) -> None:
    told = {"bits": 4, "inputs": 9, "cosine": 0.9, "cosine_min": 0.8, "error": 0.3, "inputs_are": "sentences"}
    newer = manifest.model_copy(update={"schema_version": "1.8"})
    read = load_manifest(changed(newer, "quality", [told | {"spread": 1.0}]), "m")
    assert read.quality == (EmbeddingQuality(**told),)  # type: ignore[arg-type]
    with pytest.raises(InputCorrupt, match=r"quality\.0\.cosine_min"):
        load_manifest(changed(manifest, "quality", [{k: v for k, v in told.items() if k != "cosine_min"}]), "m")
