"""Pins the bytes of schemas 1.0 and 1.1, which adds tables. When one of these changes, artifacts in the world stop being readable: see the promise
in docs/artifact.md, and raise the schema version.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact import write
from lilliput.artifact.publish import publish
from lilliput.artifact.read import Artifact
from lilliput.artifact.write import ArtifactWriter
from support.small_artifact import llama_spec, provenance, small_plan

GOLDEN = {
    "bits-2.safetensors": "9cc55f882381a9a9",
    "bits-3.safetensors": "db1f2f867d01f2a2",
    "bits-4.safetensors": "d5384de03f54801c",
    "bits-8.safetensors": "2ae71abc877a4673",
    "float.safetensors": "1c1eeb2cca33a490",
    "manifest.json": "190e0582dd593577",
    "model.safetensors.index.json": "36e4a205313bec11",
}


WITH_TABLES = {
    "bits-2.safetensors": "7a03cb7905c9267d",
    "bits-3.safetensors": "27888d3a729136ac",
    "manifest.json": "32eba5f2bc1ffbfd",
}


def counted(shape: tuple[int, ...], step: int, below: int) -> np.ndarray:
    return (np.arange(int(np.prod(shape))) * step % below).reshape(shape)


def digests(folder: Path, tables: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(write, "_VERSION", "0.1.0")
    spec = llama_spec(layers=1, hidden=16, heads=1, kv_heads=1, inter=40)
    spec = spec.model_copy(update={"rotary": spec.rotary.model_copy(update={"inv_freq": (0.5,) * 8})})
    plan = small_plan(spec, (2, 3, 4, 8), ladders={"embed_tokens": (4, 8)}, tables=tables)
    with ArtifactWriter.start(folder / "p", plan, key="golden") as writer:
        for name, entry in plan.entries.items():
            grid = {b: (counted((entry.out, entry.groups), 3, 50) / 64).astype(np.float16) for b in entry.bits}
            codes = counted((entry.out, entry.columns), 37, 1 << entry.bits[-1]).astype(np.uint8)
            table = {b: np.sort(counted((entry.out, 1 << b), 29, 128).astype(np.uint8), axis=1) for b in entry.tables}
            writer.put_quantized(name, codes, grid, grid, table)
        for name, left in plan.floats.items():
            writer.put_float(name, (counted(left.shape, 5, 64) / 64).astype(np.float32))
        writer.finish(source=provenance(), recipe=[{"rtn": {"bits": [2, 3, 4, 8]}}], seed=0)
    publish(folder / "p", folder / "out")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted((folder / "out").iterdir())
    }


def test_the_bytes_of_schema_1_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digests(tmp_path, (), monkeypatch) == GOLDEN
    with Artifact.open(tmp_path / "out") as artifact:
        row = artifact.dequantize("layers.0.mlp.down_proj", 3)[1, :4]
    codes = [37 * k % 256 >> 5 for k in range(40, 44)]
    assert row.tolist() == [6 / 64 * (code - 3.5 - 6 / 64) for code in codes]


def test_the_bytes_of_schema_1_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = digests(tmp_path, (2, 3), monkeypatch)
    assert found["float.safetensors"] == GOLDEN["float.safetensors"]
    assert {name: digest for name, digest in found.items() if name in WITH_TABLES} == WITH_TABLES
    with Artifact.open(tmp_path / "out") as artifact:
        row = artifact.dequantize("layers.0.mlp.down_proj", 3)[1, :4]
    table = sorted(29 * k % 128 for k in range(8, 16))
    codes = [37 * k % 256 >> 5 for k in range(40, 44)]
    assert row.tolist() == [6 / 64 * (table[code] - 63.5 - 6 / 64) for code in codes]
