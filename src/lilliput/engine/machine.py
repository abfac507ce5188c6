"""What this process may use of the machine: cores and memory, under whatever limits a container sets."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores the scheduler may give us, at least 1: the affinity mask, cut to the control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes we could still allocate without swapping, None where the system does not say."""
    found = []
    for line in (_read(meminfo) or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, now = _read(cgroup / most), _read(cgroup / used)
        if limit and now and limit.isdigit() and now.isdigit():
            found.append(max(0, int(limit) - int(now)))
    return min(found, default=None)


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time the control group (version 2, then 1) allows; None for no limit."""
    both = _read(cgroup / "cpu.max")
    pair = both.split() if both else [_read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")]
    if len(pair) != 2 or not all(value and value.isdigit() and int(value) for value in pair):
        return None
    return int(pair[0] or 0) / int(pair[1] or 1)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
