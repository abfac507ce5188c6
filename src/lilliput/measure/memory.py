"""Bytes: what this process used at most, what the machine or the container leaves it, and how people write them."""

import os
import re
from pathlib import Path
from typing import Final

from lilliput.core.errors import ConfigError

_UNITS: Final[dict[str, int]] = {"": 1, "B": 1} | {
    f"{letter}{tail}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for tail, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_UNLIMITED: Final = 1 << 60
"""Control groups write "no limit" as "max" (v2) or as a number near 2**63 (v1)."""


def peak_rss_bytes() -> int | None:
    """Largest resident size of this process so far (or since `reset_peak`); None where /proc does not tell."""
    return _status("VmHWM")


def rss_bytes() -> int | None:
    """Resident size of this process now, memory-mapped pages included; None where /proc does not tell."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Start `peak_rss_bytes` again from the size of now. False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def total_bytes(root: Path = Path("/")) -> int | None:
    """Memory this process may ever have: the machine's, or less where its control group says so."""
    machine = _meminfo(root, "MemTotal")
    if machine is None:
        try:
            machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    return min([machine, *(limit for limit, _ in _limits(root))])


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory this process can still get without swapping, the limits of its control groups (v1 and v2) respected.

    Page cache a group holds counts as available, as the kernel gives it up first. None where the system does not tell.
    """
    free = [max(0, limit - used) for limit, used in _limits(root)]
    machine = _meminfo(root, "MemAvailable")
    return min([*free, *([] if machine is None else [machine])], default=None)


def parse_size(text: str) -> int:
    """Bytes of "8GiB" (2**30), "1.1GB" (10**9), "512M" or "4096". Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is no size", where="size", fix="Write it as 8GiB, 1.1GB or 512MiB")
    whole, _, part = match[1].partition(".")
    return int(whole or 0) * unit + int(part or 0) * unit // int("1" + "0" * len(part))  # exact: no float on the way


def format_bytes(count: int) -> str:
    """Three digits and a binary unit: 1536 is "1.50 KiB"."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 999.5 or unit == "TiB":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def _status(key: str) -> int | None:
    return _kilobytes(_read(Path("/proc/self/status")), key)


def _meminfo(root: Path, key: str) -> int | None:
    return _kilobytes(_read(root / "proc/meminfo"), key)


def _kilobytes(text: str, key: str) -> int | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group above this process that has a limit."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        steps = [step for step in group.split("/") if step not in ("", "..")]
        # A container often sees its own group at the root of the mount while the path names the host's.
        for folder in [base.joinpath(*steps[:n]) for n in range(len(steps) + 1)]:
            limit, used = _read(folder / names[0]).strip(), _read(folder / names[1]).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                cache = re.search(rf"^{names[2]} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                found.append((int(limit), int(used) - (int(cache[1]) if cache else 0)))
    return found
