import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, OutOfResource
from lilliput.data import documents
from lilliput.data.documents import choose_files, read_documents


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    name = name if name.endswith("txt") else "a.txt.gz"
    path = write(tmp_path / name, "\ufeffone\n\ntwo\r\n")
    assert read_documents(path) == read_documents(str(path)) == ["one\n\ntwo\r\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ([{"title": "t", "text": "A"}, {"title": "t", "text": "B"}], None),
        ([{"content": "A", "url": "u"}, {"content": "B", "url": "u"}], None),
        ([{"pos": 1, "novel": "A"}, {"pos": 2, "novel": "B"}], None),  # the only field of strings
        ([{"text": "x", "poem": "A"}, {"text": "x", "poem": "B"}], "poem"),
    ],
)
def test_jsonl_gives_one_document_a_line(tmp_path: Path, name: str, rows: list[Any], field: str | None) -> None:
    path = write(tmp_path / name, lines(*rows).replace("\n", "\n\n"))  # blank lines do not matter
    assert read_documents(path, field=field) == ["A", "B"]


def test_unusual_line_separators_inside_a_string_do_not_split_it(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\r\n")
    assert read_documents(path) == [text]


def test_sources_are_joined_in_order_and_blank_documents_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "A"}, {"text": " \n"}, {"text": "B"}))
    assert read_documents(["x", ""], path, ("y",)) == ["x", "A", "B", "y"]


def test_parquet_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="reading Parquet is an extra")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["A", None, "B"], "poem": ["P", "Q", "R"]}), path)
    assert read_documents(path) == ["A", "B"]
    assert read_documents(path, field="poem") == ["P", "Q", "R"]
    with pytest.raises(
        ConfigError, match=r"there is no column of strings 'id', but id, text, poem\. Name one of these"
    ):
        read_documents(path, field="id")
    monkeypatch.setattr(documents, "MAX_BYTES", 4)
    with pytest.raises(OutOfResource, match="more than 4 bytes of text"):
        read_documents(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputCorrupt, match="broken Parquet file"):
        read_documents(path)


def test_parquet_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"reading Parquet needs pyarrow\. pip install 'lilliput\[compress\]'\."):
        read_documents(write(tmp_path / "a.parquet", "x"))


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("a.txt", "", InputCorrupt, r"a\.txt: the file is empty\."),
        ("a.txt", " \n\n", InputCorrupt, "the file is empty"),
        ("a.jsonl", "", InputCorrupt, "the file is empty"),
        ("a.jsonl.gz", "", InputCorrupt, "the file is empty"),
        ("a.txt", b"ab\xffc", InputCorrupt, "not UTF-8 at byte 2. Save the file as UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', InputCorrupt, "not UTF-8 at byte 10"),
        ("a.jsonl", '{"text": "A"}\n{"text": \n', InputCorrupt, r"line 2 is not JSON \(Expecting value\)"),
        ("a.jsonl", "[" * 100_000, InputCorrupt, r"line 1 is not JSON \(nested too deeply\)"),
        ("a.jsonl", '{"text": "A"}\n"B"\n', InputCorrupt, "line 2 holds no object"),
        ("a.jsonl", lines({"text": "A"}, {"txt": "B"}), InputCorrupt, "line 2 has no string 'text', but txt"),
        ("a.jsonl", lines({"text": "A"}, {"text": 5}), InputCorrupt, "line 2 has no string 'text'"),
        (
            "a.jsonl",
            lines({"a": "A", "b": "B"}),
            ConfigError,
            "cannot tell which field holds the text; there is a, b. Na",
        ),
        ("a.jsonl", lines({"a": 1}), ConfigError, "cannot tell which field"),
        ("a.jsonl", lines({}), ConfigError, "there is no field"),
        ("a.docx", "x", ConfigError, r"a\.docx: \.docx suffix\. Formats are \.parquet, \.jsonl"),
        ("a", "x", ConfigError, "no suffix"),
    ],
)
def test_each_fault_of_a_file_has_its_line(tmp_path: Path, name: str, content: str, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        read_documents(write(tmp_path / name, content))


def test_broken_gzip_is_corrupt(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "A"}' * 500)
    for data in (whole[:-9], whole[:15], b"no gzip at all", whole[:12] + b"\xff\xff" + whole[14:]):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(InputCorrupt, match=r"a\.jsonl\.gz: broken gzip file"):
            read_documents(tmp_path / "a.jsonl.gz")


def test_a_small_file_that_unpacks_to_a_huge_one_stops_at_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    with pytest.raises(OutOfResource, match="more than 1048576 bytes of text"):
        read_documents(write(tmp_path / "a.txt.gz", b"x" * (1 << 23)))


def test_what_is_not_there_or_not_a_source(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"nowhere\.txt: the file is not there\. Check the path"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(InputMissing, match="the file is not there"):
        read_documents("folder/nowhere.txt")  # a suffix we read: meant as a file, not asked of the hub
    with pytest.raises(ConfigError, match="a folder, not a file"):
        read_documents(tmp_path)
    with pytest.raises(ConfigError, match="not all of them are strings"):
        read_documents(["a", 1])  # type: ignore[list-item]
    with pytest.raises(InputCorrupt, match="calibration texts: the file is empty"):
        read_documents([])
    with pytest.raises(ConfigError, match="no source was given"):
        read_documents()


HUB = [
    "README.md",
    "wiki/test-00000-of-00001.parquet",
    "wiki/train-00001-of-00002.parquet",
    "wiki/train-00000-of-00002.parquet",
    "books/train.jsonl",
    "books/test.txt",
    "training_notes.txt",
]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, ["wiki/train-00000-of-00002.parquet", "wiki/train-00001-of-00002.parquet"]),
        ("test", ["wiki/test-00000-of-00001.parquet"]),
        ("books/train", ["books/train.jsonl"]),
        ("books", ["books/train.jsonl"]),
        ("validation", []),
    ],
)
def test_the_files_of_a_dataset(split: str | None, expected: list[str]) -> None:
    assert choose_files(HUB, split) == expected


def test_without_a_train_split_all_of_the_best_format_are_read() -> None:
    assert choose_files(["b.jsonl", "a.jsonl", "c.txt"], None) == ["a.jsonl", "b.jsonl"]


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", lines({"text": "A"}))
    write(tmp_path / "b.jsonl", lines({"text": "B"}))
    hub = SimpleNamespace(
        list_repo_files=lambda repo, repo_type: ["b.jsonl", "a.jsonl"],
        hf_hub_download=lambda repo, name, repo_type: str(tmp_path / name),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert read_documents("owner/name") == ["A", "B"]
    monkeypatch.setattr(documents, "ENOUGH_CHARACTERS", 1)
    assert read_documents("owner/name") == ["A"]
    with pytest.raises(InputMissing, match="owner/name:test: the dataset has no data files that fit"):
        read_documents("owner/name:test")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, repo_type: str) -> list[str]:
        raise OSError("no route\nand a second line")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(list_repo_files=fail))
    with pytest.raises(InputMissing) as caught:
        read_documents("owner/name")
    assert str(caught.value) == (
        "owner/name: no such file, and no such dataset can be reached (no route). "
        "Check the name and the network, or give a local file."
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs huggingface_hub\. pip install 'lilliput\[compress\]'"):
        read_documents("owner/name")
