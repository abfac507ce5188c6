"""The conditions of a measurement: machine, versions, commit, and who else was using the processor."""

import math
import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

from lilliput.core.errors import Unsupported
from lilliput.engine import native
from lilliput.measure import memory

FLAGS: Final = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp")
"""The processor features our kernels ask for; `i8mm` and the like follow below."""
_MORE_FLAGS: Final = ("i8mm", "sve", "avx512vl", "avx512_vbmi", "avx512_bf16")
_PACKAGES: Final = ("lilliput", "numpy", "tokenizers", "safetensors", "torch", "transformers")


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """Return what a reader needs to judge a figure: plain strings, numbers and lists, ready for JSON.

    Absent facts are None (no torch installed, not a checkout); nothing is imported and nothing fails.
    """
    return {
        "cpu": cpu_model(root),
        "cpu_flags": cpu_flags(root),
        "architecture": platform.machine(),
        "cores": cores(root),
        "memory_bytes": memory.total_bytes(root),
        "available_bytes": memory.available_bytes(root),
        "os": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
        "compiler": compiler(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name as it gives it."""
    text = _read(root / "proc/cpuinfo")
    found = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_flags(root: Path = Path("/")) -> list[str]:
    """Those of the features our kernels know that this processor has."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    have = set(found[1].split()) if found else set()
    return [flag for flag in (*FLAGS, *_MORE_FLAGS) if flag in have]


def cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, and the quota of its control group rounded up; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        steps = [step for step in group.split("/") if step not in ("", "..")]
        for n in range(len(steps) + 1):
            if controllers == "":
                quota = _read((root / "sys/fs/cgroup").joinpath(*steps[:n]) / "cpu.max").split()
            elif "cpu" in controllers.split(","):
                folder = (root / "sys/fs/cgroup/cpu").joinpath(*steps[:n])
                quota = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                continue
            if len(quota) == 2 and all(q.isdigit() and int(q) > 0 for q in quota):
                quotas.append(math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min([count, *quotas]))


@cache
def commit() -> str | None:
    """The git commit of the checkout this package lies in, "+" behind it where files were changed; else None."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def compiler() -> str | None:
    """What built the kernels, as the native module says; None where it is not built or does not say."""
    try:
        return native.compiler()
    except Unsupported:
        return None


class ForeignLoad:
    """How busy other processes kept the machine between `__init__` and `cores()`, from /proc/stat."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """Mean number of cores others used, our waited-for children counted as ours; None where /proc is absent."""
        start, now = self._start, self._now()
        if start is None or now is None or now[0] - start[0] <= 0:
            return None
        return max(0.0, round((now[1] - start[1]) / (now[0] - start[0]), 3))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """(clock seconds, core seconds others were busy since boot)."""
        fields = _read(Path("/proc/stat")).split("\n", 1)[0].split()[1:]
        if len(fields) < 8 or not hasattr(os, "sysconf"):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - sum(os.times()[:4])


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return str(resolve_name("lilliput:__version__")) if name == "lilliput" else None  # a checkout, not installed


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
