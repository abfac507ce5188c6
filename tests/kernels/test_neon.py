"""The Neon variants, cross-compiled and emulated: needs aarch64-linux-gnu-g++ and qemu-aarch64."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed")
def test_every_neon_variant_is_the_reference_bit_for_bit(tmp_path: Path) -> None:
    program = tmp_path / "variants"
    ops = KERNELS / "ops"
    sources = [
        KERNELS / "tests/variants.cpp",
        ops / "dispatch.cpp",
        *ops.glob("*/reference.cpp"),
        *ops.glob("*/neon.cpp"),
    ]
    flags = [
        "-std=c++20",
        "-O2",
        "-static",
        "-march=armv8.2-a+dotprod",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ]
    command = [COMPILER, *flags, "-I", str(KERNELS), *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    ran = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for op in ("quantize_i8", "matmul_nested_i8", "matmul_integer", "attention_integer"):
        assert f"{op}/neon" in ran.stdout
