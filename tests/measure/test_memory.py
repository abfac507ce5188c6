import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.core.errors import ConfigError
from lilliput.measure import memory
from lilliput.measure.memory import format_bytes, parse_size

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("1.1GB", 1_100_000_000),
        ("512M", 512_000_000),
        ("512MiB", 512 << 20),
        (" 4096 ", 4096),
        ("4096 B", 4096),
        ("2kb", 2000),
        ("1.5 KiB", 1536),
        (".5gib", 1 << 29),
        ("1.TiB", 1 << 40),
    ],
)
def test_sizes_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 GiBs", "-1GB", "1,1GB", "1e9", "8Gi B", "0x10", "nan", "\uff18GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^size: .* is no size\. Write it as 8GiB, 1\.1GB or 512MiB\.$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10_230, "9.99 KiB"),
        (10_240, "10.0 KiB"),
        (102_400, "100 KiB"),
        (1 << 20, "1.00 MiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (5 << 50, "5120 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_write_with_three_digits(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 1 << 50))
def test_a_size_written_reads_back_within_its_digits(size: int) -> None:
    assert parse_size(format_bytes(size)) == pytest.approx(size, rel=0.006)


@linux
def test_the_peak_follows_what_is_touched() -> None:
    before = memory.rss_bytes() or 0
    block = np.ones(1 << 23)  # 64 MiB
    assert (memory.peak_rss_bytes() or 0) >= before + block.nbytes // 2
    if memory.reset_peak():
        del block
        memory.reset_peak()
        assert (memory.peak_rss_bytes() or 0) < before + (1 << 25)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GIB = 1 << 30


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8 * GIB, 4 * GIB),
        (  # v2: the limit stands above the process's own group
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
            },
            2 * GIB,
            GIB + GIB // 2,
        ),
        (  # v2 in a container: the group's path is the host's, the files are at the root
            {
                "proc/self/cgroup": "0::/docker/123\n",
                "sys/fs/cgroup/memory.max": f"{GIB}",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}",
            },
            GIB,
            0,
        ),
        (  # v1
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{GIB}",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{GIB // 4}",
            },
            GIB,
            GIB - GIB // 4,
        ),
        ({"proc/self/cgroup": "0::/../../evil\ngarbage\n"}, 8 * GIB, 4 * GIB),
    ],
)
def test_limits_of_control_groups_count(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    root = machine(tmp_path, files)
    assert memory.total_bytes(root) == total
    assert memory.available_bytes(root) == available


def test_an_unknown_system_says_so(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path) is None
