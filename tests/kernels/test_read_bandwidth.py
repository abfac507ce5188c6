import pytest

from lilliput.engine import native


@pytest.mark.parametrize(("size_bytes", "threads"), [(1 << 20, 1), (1 << 20, 2), (3 * 4096 + 5, 3), (1 << 22, 7)])
def test_every_byte_is_read_by_any_number_of_threads(size_bytes: int, threads: int) -> None:
    # the kernel compares the sum of what it read with what it wrote, and throws where they differ
    assert native.read_bandwidth(size_bytes, threads, rounds=2) > 0.001


@pytest.mark.parametrize(
    ("size_bytes", "threads", "rounds"), [(4095, 1, 1), (1 << 20, 0, 1), (8191, 2, 1), (4096, 1, 0)]
)
def test_a_reading_of_nothing_is_refused(size_bytes: int, threads: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="a page of memory for every thread"):
        native.read_bandwidth(size_bytes, threads, rounds=rounds)
