"""`lilliput doctor`: what this machine and this install can do, and what is missing."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from lilliput import __version__
from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output, pairs
from lilliput.core.errors import Unsupported
from lilliput.measure.memory import format_bytes

PLAIN = ("numpy", "safetensors", "tokenizers", "jinja2", "pydantic", "pyyaml", "click", "rich")
EXTRAS = {
    "compress": ("torch", "transformers", "huggingface-hub", "pyarrow", "pillow"),
    "serve": ("starlette", "uvicorn"),
    "export": ("onnx", "onnxruntime"),
}
WITHOUT = {
    "compress": "compress, eval --against and hub ids do not work; artifacts made elsewhere run",
    "serve": "serve does not work",
    "export": "export does not work",
}
OPS = (
    *("matmul_nested_i8", "quantize_i8", "matmul_nested", "matmul_float", "attention", "norm", "rotary", "activation"),
    *(f"{op}_integer" for op in ("matmul", "attention", "norm", "rotary", "table", "multiply", "sum")),
)
VARIABLES = {
    "LILLIPUT_JSON": "--json for every verb",
    "LILLIPUT_QUIET": "--quiet for every verb",
    "LILLIPUT_SERVE_API_KEY": "the key `serve` asks for",
    "HF_HOME": "where hub files are kept",
    "HF_HUB_CACHE": "where downloaded models are kept",
    "HF_HUB_OFFLINE": "1: never fetch",
    "HF_ENDPOINT": "another hub",
    "HF_TOKEN": "the token for gated models",
    "OMP_NUM_THREADS": "threads of torch while compressing",
    "NO_COLOR": "progress without colour",
}
SECRET = ("LILLIPUT_SERVE_API_KEY", "HF_TOKEN")


@common
@click.command("doctor")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Say what this machine and this install can do. Exit code 0 when it can run artifacts, else 4.

    \b
    JSON: {"ok": bool, "problems": [text], "lilliput", "executable", "packages": {name: version or null},
           "extras": {extra: {"complete": bool, "missing": [name]}}, "kernels": {op: [variant, best last]} or null,
           "environment": {"cpu", "cores", "memory_bytes", ...}, "variables": {name: {"meaning", "value"}}}
    """
    from lilliput.measure import environment

    out: Output = ctx.obj
    packages = {name: _version(name) for name in (*PLAIN, *(n for names in EXTRAS.values() for n in names))}
    problems = [f"{name} is missing: reinstall lilliput" for name in PLAIN if packages[name] is None]
    extras = {
        extra: {"complete": not missing, "missing": missing}
        for extra, names in EXTRAS.items()
        for missing in [[name for name in names if packages[name] is None]]
    }
    kernels, broken = _kernels()
    document = {
        "ok": not problems and broken is None,
        "problems": problems + ([broken] if broken else []),
        "lilliput": __version__,
        "executable": sys.executable,
        "packages": packages,
        "extras": extras,
        "kernels": kernels,
        "environment": environment.describe(),
        "variables": {name: {"meaning": text, "value": _value(name)} for name, text in VARIABLES.items()},
    }
    out.result(document, lambda: _text(document))
    if not document["ok"]:
        ctx.exit(Unsupported.exit_code)


def _kernels() -> tuple[dict[str, list[str]] | None, str | None]:
    """The variants of every op this CPU runs, or why there are none."""
    from lilliput.engine import native

    try:
        return {op: native.variants(op) for op in OPS}, None
    except Unsupported as error:
        return None, str(error)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _value(name: str) -> str | None:
    value = os.environ.get(name)
    return "(set)" if value and name in SECRET else value


def _text(document: dict[str, Any]) -> str:
    machine, packages = document["environment"], document["packages"]
    memory, free = machine["memory_bytes"], machine["available_bytes"]
    facts = {
        "lilliput": f"{document['lilliput']}, Python {machine['python']} at {document['executable']}",
        "machine": f"{machine['cpu']} ({machine['architecture']}), {machine['os']}",
        "cores": f"{machine['cores']} (by affinity and control group)",
        "memory": f"{_bytes(memory)}, {_bytes(free)} available",
        "features": " ".join(machine["cpu_flags"]) or "none that the kernels use",
        "packages": ", ".join(f"{name} {packages[name] or 'MISSING'}" for name in PLAIN),
    }
    for extra, names in EXTRAS.items():
        missing = document["extras"][extra]["missing"]
        found = ", ".join(f"{name} {packages[name]}" for name in names if packages[name])
        gap = f"missing {', '.join(missing)}: {WITHOUT[extra]} (pip install 'lilliput[{extra}]')"
        facts[f"[{extra}]"] = "; ".join(filter(None, (found, gap if missing else "")))
    kernels = document["kernels"]
    for op, variants in (kernels or {}).items():
        facts[f"kernel {op}"] = f"{variants[-1]} (of {', '.join(variants)})" if variants else "none"
    variables = {name: f"{v['value'] or 'not set'}: {v['meaning']}" for name, v in document["variables"].items()}
    rule = "Any option: LILLIPUT_VERB_OPTION, as in LILLIPUT_RUN_BITS=4"
    verdict = "healthy: artifacts can be run" if document["ok"] else "\n".join(document["problems"])
    return f"{pairs(facts)}\n\nenvironment variables honoured\n{pairs(variables)}\n{rule}\n\n{verdict}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)
