"""Windows for measuring, and the seeded stream, whose bytes are fixed for all time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.core.errors import ConfigError, InputCorrupt
from lilliput.core.spec import PADDING
from lilliput.data.documents import read_documents
from lilliput.data.streams import Batches, batches, order, sentences, windows
from lilliput.data.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"


class Letters:
    """A letter's code is its id; BOS is 1 unless told otherwise, written "^" in a text."""

    def __init__(self, bos_id: int | None = 1) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids = [1 if c == "^" and self.bos_id else ord(c) for c in text]
        return [self.bos_id, *ids] if bos and self.bos_id and ids[:1] != [self.bos_id] else ids


def texts(found: list[np.ndarray]) -> list[str]:
    return ["".join("^" if i == 1 else chr(i) for i in w) for w in found]


@pytest.mark.parametrize(
    ("documents", "bos", "options", "expected"),
    [
        (["abcde", "fg"], 1, {"length": 3}, ["^ab", "^cd", "^e", "^fg"]),
        (["abcde", "fg"], 1, {"length": 3, "join": True}, ["^ab", "^cd", "^ef", "^g"]),
        (["abcde", "fg"], None, {"length": 3}, ["abc", "de", "fg"]),
        (["abcd", "f"], None, {"length": 3}, ["abc"]),  # one token predicts nothing
        (["abcde", "fg"], 1, {"length": 3, "limit": 2}, ["^ab", "^cd"]),
        (["^abc"], 1, {"length": 4}, ["^abc"]),  # a BOS spelled in the text is not doubled
        (["ab", "", "c"], 1, {"length": 9}, ["^ab", "^c"]),
    ],
)
def test_windows_in_order(documents: list[str], bos: int | None, options: dict[str, int], expected: list[str]) -> None:
    found = windows(documents, Letters(bos), **options)  # type: ignore[arg-type]
    assert texts(found) == expected
    assert all(w.dtype == np.int32 and w.ndim == 1 for w in found)


@given(st.lists(st.text("abc", max_size=20), min_size=1).filter(any), st.integers(2, 9), st.booleans())
def test_every_token_is_predicted_exactly_once(documents: list[str], length: int, join: bool) -> None:
    found = windows(documents, Letters(), length=length, join=join)
    assert "".join(texts(found)).replace("^", "") == "".join(documents)
    assert all(2 <= len(w) <= length and w[0] == 1 for w in found)


def test_windows_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(ConfigError, match=r"windows: length is 1\."):
        windows(["abc"], Letters(), length=1)
    with pytest.raises(ConfigError, match=r"windows: limit is 0\."):
        windows(["abc"], Letters(), length=4, limit=0)
    with pytest.raises(InputCorrupt, match=r"evaluation text: no two tokens to measure on\. Give more text\."):
        windows(["a"], Letters(None), length=4)


def test_the_order_of_a_seed_never_changes() -> None:
    assert order(10, 0).tolist() == ORDER_0
    assert order(10, -1).tolist() == ORDER_MINUS_1
    assert sorted(order(100, 7).tolist()) == list(range(100))
    assert order(0, 0).tolist() == []


ORDER_0 = [1, 6, 0, 8, 4, 3, 7, 9, 2, 5]
ORDER_MINUS_1 = [5, 1, 0, 6, 3, 9, 2, 7, 8, 4]
GOLDEN = {
    True: "83b9c624a661a807815689101d0089b915c67327a3c57b44e4d867dd6977d7b3",
    False: "a59b535c647e53921cea7743d8754bd4189b4ce6d719acc6f580c2601c612bdd",
}
DOCUMENTS = [chr(97 + i % 26) * (i % 7 + 3) for i in range(40)]


@pytest.mark.parametrize("join", [True, False])
def test_the_batches_of_a_seed_never_change(join: bool) -> None:
    found = batches(DOCUMENTS, Letters(), length=4, samples=20, batch_size=3, join=join, seed=5)
    assert found.sha256 == GOLDEN[join]
    assert found.sha256 != batches(DOCUMENTS, Letters(), length=4, samples=20, join=join, seed=6).sha256
    assert found.sha256 == batches(DOCUMENTS, Letters(), length=4, samples=20, join=join, seed=5).sha256


def test_batches_iterate_again_and_count_themselves() -> None:
    found = batches(DOCUMENTS, Letters(), length=4, samples=20, batch_size=3)
    first, second = list(found), list(found)
    assert len(found) == len(first) == 7
    assert [b.shape for b in first] == [(3, 4)] * 6 + [(2, 4)]
    assert all(b.dtype == np.int32 for b in first)
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
    assert found.tokens == 80
    with pytest.raises(ValueError, match="read-only"):
        first[0][0, 0] = 5


def test_joined_rows_are_the_documents_end_to_end_with_a_bos_each() -> None:
    found = batches(["abc", "de"], Letters(), length=7, samples=1)
    assert texts(list(found.rows)) in (["^abc^de"], ["^de^abc"])


def test_kept_apart_each_row_is_of_one_document_and_starts_with_bos() -> None:
    found = batches(DOCUMENTS, Letters(), length=4, samples=20, join=False)
    for row in texts(list(found.rows)):
        assert row[0] == "^"
        assert len(set(row[1:])) == 1


@pytest.mark.parametrize("bos", [1, None])
def test_rows_may_all_begin_with_a_bos_where_there_is_one(bos: int | None) -> None:
    plain, begun = (
        batches(["abcdefgh" * 4], Letters(bos), length=4, samples=5, bos=asked).rows for asked in (False, True)
    )
    assert (begun[:, 0] == 1).all() if bos else (begun == plain).all()
    assert (begun[:, 1:] == plain[:, 1:]).all()


def test_the_digest_depends_on_shape_and_tokens_only() -> None:
    rows = np.arange(12, dtype=np.int32)
    digest = Batches(rows.reshape(3, 4)).sha256
    assert digest == Batches(rows.reshape(3, 4).astype(">i4"), batch_size=2).sha256
    assert digest != Batches(rows.reshape(4, 3)).sha256


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^calibration text: 120 tokens are fewer than the 128 x 2048 asked for\. Give more text or lower --samples\.$",
    ):
        batches(["x" * 119], Letters(), length=2048, samples=128)
    with pytest.raises(ConfigError, match="4 tokens in documents of 4 or more are fewer than the 2 x 4 asked for"):
        batches(["abc", "de"], Letters(), length=4, samples=2, join=False)
    with pytest.raises(ConfigError, match=r"calibration: samples is 0\. Give 1 or more\."):
        batches(["abc"], Letters(), length=4, samples=0)


@pytest.mark.skipif(not (SHARED / "tales7m").is_dir(), reason=f"the reference data is not at {SHARED}")
def test_the_windows_of_the_reference_texts_count_as_published() -> None:
    tokenizer = Tokenizer.open(SHARED / "tales7m/hf")
    found = windows(read_documents(SHARED / "corpus/valid.jsonl.gz"), tokenizer, length=256)
    assert sum(len(w) - 1 for w in found) == 171_808
    tokenizer = Tokenizer.open(SHARED / "stories260K/hf")
    stories = [s for s in read_documents(SHARED / "tinystories/stories_a.jsonl") if len(tokenizer.encode(s)) <= 512]
    found = windows(stories, tokenizer, length=512)
    assert (len(found), sum(len(w) - 1 for w in found)) == (490, 172_592)


class Spelled:
    """Characters as ids, 1 in front and 2 behind."""

    def whole(self, text: str, limit: int) -> list[int]:
        return [*[1, *map(ord, text)][: limit - 1], 2]


def test_an_encoder_is_given_lines_with_padding_behind_the_short_ones() -> None:
    drawn = sentences(["ab\n\nabcdefgh", "x"], Spelled(), length=6, samples=3, seed=1)
    rows = sorted(row[row != PADDING].tolist() for row in drawn.rows)
    assert rows == sorted([[1, 97, 98, 2], [1, 97, 98, 99, 100, 2], [1, 120, 2]])
    assert drawn.rows.shape == (3, 6)
    assert all((row[list(row).index(2) + 1 :] == PADDING).all() for row in drawn.rows)
    assert drawn.tokens == 13
    with pytest.raises(ValueError, match=r"3 lines are fewer than the 4 asked for"):
        sentences(["ab\n\nabcdefgh", "x"], Spelled(), length=6, samples=4)
