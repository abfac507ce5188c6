import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lilliput.measure import environment
from lilliput.measure.environment import ForeignLoad, cores, describe


def test_the_description_is_json_and_tells_the_essentials() -> None:
    found = json.loads(json.dumps(describe()))
    assert {"cpu", "cpu_flags", "cores", "memory_bytes", "os", "python", "versions", "commit", "compiler"} <= set(found)
    assert found["cores"] >= 1
    assert found["versions"]["numpy"]
    assert found["versions"]["lilliput"]


def test_describing_imports_no_torch() -> None:
    code = "import sys; from lilliput.measure.environment import describe; describe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_cores_are_those_we_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == expected


def test_an_arm_machine_is_described(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nFeatures : fp asimd asimddp i8mm\nCPU part : 0xd40\n")
    found = describe(tmp_path)
    assert found["cpu"] == "0xd40"
    assert found["cpu_flags"] == ["asimd", "asimddp", "i8mm"]


def test_our_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"clock": 100.0, "busy": 50.0, "ours": 10.0}
    stat = "cpu  {} 0 0 999 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1\n"
    times = SimpleNamespace(sysconf=lambda _: 100, times=lambda: (at["ours"], 0.0, 0.0, 0.0, at["clock"]))
    monkeypatch.setattr(environment, "os", times)
    monkeypatch.setattr(environment, "time", SimpleNamespace(monotonic=lambda: at["clock"]))
    monkeypatch.setattr(environment, "_read", lambda _: stat.format(round(100 * at["busy"])))
    load = ForeignLoad()
    assert load.cores() is None  # no time has passed
    at.update(clock=102.0, busy=53.5, ours=11.0)
    assert load.cores() == 1.25
    at.update(ours=14.0)  # ticks are coarse: more than all there was
    assert load.cores() == 0.0
    monkeypatch.setattr(environment, "_read", lambda _: "")
    assert load.cores() is None
