"""An environment for each peer: llm-compressor pins auto-round, GPTQModel NumPy, and none of them is ours."""

import os
import subprocess
import sys
from pathlib import Path

TORCH = "torch>=2.13,<2.14"
"""The release Lilliput is tested with; its CPU build, where one is found, ranks above the plain one."""
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "llm-compressor": ("llmcompressor",),
    "gptqmodel": ("gptqmodel",),
    "auto-round": ("auto-round",),
    "hqq": ("hqq",),
    "llama.cpp": ("llama-cpp-python>=0.3.36", "gguf", "safetensors"),
    "quanto": ("optimum-quanto", "transformers"),
}
MODULES = {
    "llm-compressor": "llmcompressor",
    "gptqmodel": "gptqmodel",
    "auto-round": "auto_round",
    "hqq": "hqq.core.quantize",
    "llama.cpp": "llama_cpp, gguf, safetensors",
    "quanto": "optimum.quanto, transformers",
}


def prepare(root: Path, peer: str, *, install: bool = True) -> tuple[Path, str | None]:
    """Make the peer's environment in ROOT/PEER where it is not. Returns its Python, and why it cannot be used or None.

    A torch built for CUDA is refused before anything is fetched: nothing here could use those gigabytes.
    """
    folder = root.absolute() / peer
    python = folder / "bin" / "python"
    if python.exists() and imports(python, peer) is None:
        return python, None
    if not install:
        return python, imports(python, peer) if python.exists() else "is not installed"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    limit = root.absolute() / "constraints.txt"
    limit.write_text(TORCH + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "-c", str(limit)]
    env = os.environ | {"PIP_CONSTRAINT": str(limit), "PIP_BUILD_CONSTRAINT": str(limit)}  # what builds a wheel, too
    plan = subprocess.run([*pip, "--dry-run", *REQUIREMENTS[peer]], capture_output=True, text=True, env=env)
    wanted = next((line for line in plan.stdout.splitlines() if line.startswith("Would install")), "")
    (folder / "install.log").write_text(plan.stdout + plan.stderr, encoding="utf-8")
    if plan.returncode:
        return python, f"cannot be installed with {TORCH}: {last_error(plan.stderr)}"
    if "nvidia-cudnn" in wanted or "nvidia-cublas" in wanted:
        return python, "needs a torch built for CUDA"
    with (folder / "install.log").open("a", encoding="utf-8") as log:
        subprocess.run([*pip, *REQUIREMENTS[peer]], stdout=log, stderr=subprocess.STDOUT, env=env)
    problem = imports(python, peer)
    if problem is not None:
        said = last_error((folder / "install.log").read_text(encoding="utf-8"))
        return python, f"does not install: {said}" if "rror" in said else f"does not load: {problem}"
    return python, None


def imports(python: Path, peer: str) -> str | None:
    """None when the peer's modules import there, else the last line of the error."""
    done = subprocess.run([python, "-c", f"import {MODULES[peer]}"], capture_output=True, text=True)
    return None if done.returncode == 0 else last_error(done.stderr)


def last_error(text: str) -> str:
    """The line of a log that says what went wrong: the last that names an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or line.lower().startswith("error")]
    return ([*lines[-1:], *named] or ["it says nothing"])[-1][:300]
