import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lilliput.artifact.container import NUMPY, PAGE, Container, Layout, Planned, PlannedFile, parse_header
from lilliput.core.errors import InputCorrupt, LilliputError

NAMES = st.text("abcxyz.019_", min_size=1, max_size=12).filter(lambda name: not name.startswith("_pad."))
DTYPES = st.sampled_from(["U8", "F16", "BF16", "F32", "I64"])
TENSORS = st.lists(
    st.builds(
        Planned,
        NAMES,
        DTYPES,
        st.lists(st.integers(0, 7), max_size=4).map(tuple),
        st.sampled_from([1, 2, 64, PAGE]),
    ),
    max_size=6,
    unique_by=lambda tensor: tensor.name,
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_of(tensor: Planned, seed: int) -> np.ndarray:
    count = int(np.prod(tensor.shape)) * np.dtype(NUMPY[tensor.dtype]).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return raw.view(NUMPY[tensor.dtype]).reshape(tensor.shape)


def write(path: Path, tensors: list[Planned]) -> Layout:
    path.unlink(missing_ok=True)
    layout = Layout.of(tensors, {"format": "lilliput"})
    with PlannedFile.create(path, layout) as file:
        for seed, tensor in reversed(list(enumerate(tensors))):  # any order will do
            file.write(tensor.name, random_of(tensor, seed))
        file.sync()
    return layout


def header_file(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


@FEW
@given(tensors=TENSORS)
def test_a_plan_round_trips_and_every_byte_has_an_owner(tmp_path: Path, tensors: list[Planned]) -> None:
    path = tmp_path / "x.safetensors"
    layout = write(path, tensors)
    file = Container.open(path)
    assert path.stat().st_size == layout.size
    assert file.header.start % PAGE == 0
    assert [slot.name for slot in file.header.slots.values() if not slot.padding] == [t.name for t in tensors]
    for seed, tensor in enumerate(tensors):
        assert file.view(tensor.name).tobytes() == random_of(tensor, seed).tobytes()
        assert (file.header.start + file.header.slots[tensor.name].begin) % tensor.align == 0
    assert not any(file.view(name).any() for name, slot in file.header.slots.items() if slot.padding)


@FEW
@given(tensors=TENSORS)
def test_the_official_library_reads_the_same(tmp_path: Path, tensors: list[Planned]) -> None:
    path = tmp_path / "x.safetensors"
    layout = write(path, tensors)
    with safetensors.safe_open(path, "numpy") as official:
        assert set(official.keys()) == set(layout.slots)
        assert official.metadata() == {"format": "lilliput"}
        for seed, tensor in enumerate(tensors):
            assert official.get_slice(tensor.name).get_shape() == list(tensor.shape)
            assert official.get_slice(tensor.name).get_dtype() == tensor.dtype
            if tensor.dtype != "BF16" and tensor.shape:  # NumPy has no bfloat16
                assert official.get_tensor(tensor.name).tobytes() == random_of(tensor, seed).tobytes()


@FEW
@given(values=st.dictionaries(NAMES, st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4))
def test_we_read_what_the_official_library_writes(tmp_path: Path, values: dict[str, list[int]]) -> None:
    arrays = {name: np.full(shape, 3, np.float32) for name, shape in values.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    file = Container.open(tmp_path / "x.safetensors")
    assert file.header.slots.keys() == arrays.keys()
    assert all(np.array_equal(file.view(name), array) for name, array in arrays.items())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_but_never_crashes_us(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    whole = header_file(
        path,
        {
            "__metadata__": {"format": "x"},
            "a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]},
        },
        bytes(16),
    ).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 4))
    text = st.sampled_from(
        [b"[" * 3000, b"{", b'"', b"-1", b"1e999", b"NaN", b"9" * 5000, b"\\ud800", b"\xff", b"null"]
    )
    new = data.draw(st.one_of(st.binary(max_size=8), text))
    path.write_bytes(whole[:at] + new + whole[at + cut :])
    try:
        file = Container.open(path)
    except LilliputError:
        return
    for name, slot in file.header.slots.items():
        assert file.view(name).nbytes == slot.end - slot.begin


@FEW
@given(raw=st.binary(max_size=200), data_bytes=st.integers(0, 100))
def test_any_bytes_as_a_header_are_read_or_refused(raw: bytes, data_bytes: int) -> None:
    with suppress(InputCorrupt):
        parse_header(raw, data_bytes, "here")


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (one(dtype="U9"), r"a: the dtype 'U9' is unknown\. The file is damaged"),
        (one(dtype=["U8"]), r"the dtype \['U8'\] is unknown"),
        (one(shape=[-4]), "not a list of at most 8 sizes"),
        (one(shape=[True] * 2), "not a list of at most 8 sizes"),
        (one(shape=[4.0]), "not a list of at most 8 sizes"),
        (one(shape=[1] * 9), "not a list of at most 8 sizes"),
        (one(shape=[1 << 64]), "not a list of at most 8 sizes"),
        (one(shape=[1 << 40] * 8), r"needs \d+ bytes but has 4"),
        (one(shape=[5]), r"U8 \[5\] needs 5 bytes but has 4"),
        (one(data_offsets=[-4, 0]), "not a pair of byte counts"),
        (one(data_offsets=[4, 0]), "needs 4 bytes but has -4"),
        (one(data_offsets=[0]), "not a pair of byte counts"),
        (one(data_offsets=[1, 5]), "begins at 1 where 0 is next, so it leaves a hole"),
        (one(shape=[3], data_offsets=[0, 3]), "the tensors end at byte 3 of the data but the file has 4"),
        (one(shape=[8], data_offsets=[0, 8]), "the tensors end at byte 8 of the data but the file has 4"),
        (one(extra=1), "not exactly dtype, shape and data_offsets"),
        ({"a": 3}, "not exactly dtype, shape and data_offsets"),
        ({"": one()["a"]}, "the tensor name '' is empty"),
        ({"\x1b[2J": one()["a"]}, r"the tensor name '\\x1b\[2J' is empty, too long or not printable"),
        ({"n" * 600: one()["a"]}, "too long"),
        (one() | {"b": one()["a"]}, "b: begins at 0 where 4 is next, so it overlaps the one before it"),
        ({"__metadata__": {"format": 1}}, "__metadata__ is not a map of strings"),
        ({"__metadata__": []}, "__metadata__ is not a map of strings"),
        (b'{"a": {}, "a": {}}', "the key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not strict JSON"),
        (b'{"\xff": 1}', "byte 2 is not UTF-8"),
        (b"{}{}", "not strict JSON"),
        (b"[]", r"does not begin with '\{'"),
        (b" {}", r"does not begin with '\{'"),
        (b"", r"does not begin with '\{'"),
    ],
)
def test_each_attack_is_named(tmp_path: Path, header: bytes | dict[str, Any], message: str) -> None:
    with pytest.raises(InputCorrupt, match=message):
        Container.open(header_file(tmp_path / "x", header, bytes(4)))


@pytest.mark.parametrize("length", [3, 1 << 20, (1 << 64) - 1, 1 << 63])
def test_a_header_length_beyond_the_file_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = header_file(tmp_path / "x", b"{}", length=length)
    with pytest.raises(InputCorrupt, match=rf"x: the header claims {length} bytes in a file of 10"):
        Container.open(path)


def test_a_file_of_less_than_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x00" * 7)
    with pytest.raises(InputCorrupt, match="7 bytes are too few for a header"):
        Container.open(tmp_path / "x")


def test_views_are_read_only_and_outlive_the_container(tmp_path: Path) -> None:
    write(tmp_path / "x", [Planned("a", "F32", (3,))])
    view = Container.open(tmp_path / "x").view("a")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    os.unlink(tmp_path / "x")
    assert view.tobytes() == random_of(Planned("a", "F32", (3,)), 0).tobytes()


def test_rows_can_be_written_apart_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    layout = Layout.of([Planned("a", "U8", (4, 3))])
    with PlannedFile.create(tmp_path / "x", layout) as file:
        file.write("a", np.full((2, 3), 7, np.uint8), row=2)
        for array, row in ((np.zeros((2, 3), np.uint8), 3), (np.zeros((2, 2), np.uint8), 0), (np.zeros((2, 3)), 0)):
            with pytest.raises(ValueError, match="a: "):
                file.write("a", array, row)
    assert Container.open(tmp_path / "x").view("a").tolist() == [[0] * 3] * 2 + [[7] * 3] * 2


def test_a_layout_refuses_a_name_twice_or_reserved() -> None:
    for names in (["a", "a"], ["_pad.0"]):
        with pytest.raises(ValueError, match="named twice or reserved"):
            Layout.of([Planned(name, "U8", (1,)) for name in names])
