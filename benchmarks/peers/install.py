"""The peers' environment: a venv of their own, so that their versions and ours do not meet."""

import os
import subprocess
import sys
from pathlib import Path

LLAMA_CMAKE = (
    "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"
)
"""Compiled for this processor, as we are for every one; without the parts that nothing here uses."""
WHEELS = {"onnxruntime": ["onnxruntime", "onnx"], "openvino": ["openvino"]}
IMPORTS = {"llama.cpp": ("llama_cpp", "gguf"), "onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
DISTRIBUTIONS = ("llama-cpp-python", "gguf", "onnxruntime", "onnx", "openvino", "numpy")


def prepare(env: Path, peers: list[str], jobs: int) -> tuple[Path, dict[str, str]]:
    """Create `env` where it is not, install what is missing. Returns its Python, and {peer: why it is not there}.

    llama-cpp-python is compiled here by `jobs` compilers at low priority: ten minutes or more.
    """
    python = env.absolute() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    absent: dict[str, str] = {}
    for peer in peers:
        if _imports(python, peer) is None:
            continue
        if peer == "llama.cpp":
            options = ["--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.36", "gguf"]
        else:
            options = ["--only-binary", ":all:", *WHEELS[peer]]
        build = {"CMAKE_ARGS": LLAMA_CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
        command = ["nice", "-n", "19", str(python), "-m", "pip", "install", *options]
        with (env / f"install-{peer}.log").open("w") as log:
            done = subprocess.run(command, env=os.environ | build, stdout=log, stderr=subprocess.STDOUT)
        problem = _imports(python, peer)
        if problem is not None:
            where = f"see install-{peer}.log" if done.returncode else problem
            absent[peer] = f"does not install here ({where})" if done.returncode else f"does not load: {problem}"
    return python, absent


def versions(python: Path) -> dict[str, str]:
    """What is installed there, by distribution."""
    code = (
        "import sys, json\nfrom importlib.metadata import version, PackageNotFoundError\nout = {}\n"
        "for name in sys.argv[1:]:\n    try: out[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(*(f'{k} {v}' for k, v in out.items()), sep='\\n')"
    )
    done = subprocess.run([python, "-c", code, *DISTRIBUTIONS], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line)


def _imports(python: Path, peer: str) -> str | None:
    """None when the peer's modules import there, else the last line of the error."""
    code = "; ".join(f"import {module}" for module in IMPORTS[peer])
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]
