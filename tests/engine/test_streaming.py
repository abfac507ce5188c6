"""Stop strings against every way of cutting a text into pieces."""

from collections.abc import Sequence
from itertools import combinations

import pytest

from lilliput.engine.streaming import TextStream


class Pieces:
    """A tokenizer whose token n is the n-th piece; the last one only comes out on flush."""

    def __init__(self, pieces: Sequence[str], last: str = "") -> None:
        self.pieces, self.last = pieces, last

    def stream(self) -> "Pieces":
        return self

    def put(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.last


def run(pieces: Sequence[str], stops: tuple[str, ...], last: str = "") -> tuple[str, bool]:
    told: list[str] = []
    stream = TextStream(Pieces(pieces, last), [], stops, told.append)  # type: ignore[arg-type]
    for token in range(len(pieces)):
        if not stream.put(token):
            break
    stream.finish()
    assert stream.text == "".join(told)
    return stream.text, stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("one two", ("three",), "one two"),
        ("xyz", ("z", "yz"), "x"),
        ("abab", ("ababa",), "abab"),
        ("stop", ("stop",), ""),
    ],
)
def test_every_cut_of_a_text_ends_before_the_stop(text: str, stops: tuple[str, ...], expected: str) -> None:
    for count in range(len(text)):
        for cuts in combinations(range(1, len(text)), count):
            pieces = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
            assert run(pieces, stops) == (expected, expected != text)


def test_a_stop_completed_by_the_last_flush_counts() -> None:
    assert run(["ab", "c"], ("cd",), last="de") == ("ab", True)
    assert run(["ab", "c"], ("cd",), last="e") == ("abce", False)
