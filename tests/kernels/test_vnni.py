"""The VNNI variants with their one instruction made of others, so that they are known right on machines without it."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILER = "g++"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-maybe-uninitialized"]


def has(flag: str) -> bool:
    """Whether the processor has it, by what Linux says."""
    told = Path("/proc/cpuinfo")
    return told.exists() and flag in told.read_text().split()


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64" or not has("avx2"), reason="needs AVX2")
def test_every_vnni_variant_is_the_reference_bit_for_bit(tmp_path: Path) -> None:
    ops = KERNELS / "ops"
    sources = {KERNELS / "tests/variants.cpp": [], KERNELS / "tests/vnni.cpp": []}
    sources |= {
        ops / op / "reference.cpp": list[str]()
        for op in ("quantize_i8", "matmul_nested", "matmul_nested_i8", "matmul_integer", "attention_integer")
    }
    for op in ("matmul_nested_i8", "matmul_integer"):
        sources[ops / op / "avxvnni.cpp"] = AVX2
        sources[ops / op / "avx512vnni.cpp"] = AVX512
    common = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-I", str(KERNELS)]
    objects = []
    for n, (source, flags) in enumerate(sources.items()):
        objects.append(tmp_path / f"{n}.o")
        emulated = ["-include", str(KERNELS / "tests/vnni.hpp")] if flags else []
        command = [COMPILER, *common, *flags, *emulated, "-c", str(source), "-o", str(objects[-1])]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        assert not built.stderr
    program = tmp_path / "variants"
    subprocess.run([COMPILER, *map(str, objects), "-o", str(program)], check=True)
    assert "vpdpbusd" not in subprocess.run(["objdump", "-d", str(program)], capture_output=True, text=True).stdout
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    isas = ["avxvnni", "avx512vnni"] if has("avx512bw") else ["avxvnni"]
    for op in ("matmul_nested_i8", "matmul_integer"):
        for isa in isas:
            assert f"{op}/{isa}" in ran.stdout
