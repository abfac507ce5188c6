"""ONNX graphs in which every edge has a QuantizeLinear and a DequantizeLinear: `prefill.onnx` and `decode.onnx`, or
`encoder.onnx`.

`onnx_nodes` says how nodes become operators, `onnx_graph` what these are written with, `onnx_file` how they become files, `encodings` what stands beside them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from onnx import TensorProto, ValueInfoProto

from lilliput.artifact.integer import IntegerModel
from lilliput.core.errors import ConfigError
from lilliput.core.graph import Attend
from lilliput.core.spec import EncoderSpec
from lilliput.export.base import Format
from lilliput.export.encodings import encodings
from lilliput.export.onnx_file import save
from lilliput.export.onnx_graph import LENGTH, OPSET, VECTOR, Phase
from lilliput.export.onnx_nodes import Builder, phases

DTYPES = {
    int(TensorProto.FLOAT): "float32",
    int(TensorProto.INT8): "int8",
    int(TensorProto.INT16): "int16",
    int(TensorProto.INT64): "int64",
}

_ADVICE = (
    "On x86-64 without VNNI, ONNX Runtime's fused 8-bit kernels may saturate: set the session option",
    "`session.x64quantprecision` to `1`, or switch graph optimizations off.",
)


@dataclass(frozen=True, kw_only=True)
class OnnxQdq(Format):
    """`length`: tokens of a prefill, and slots for keys and values of a decode; None leaves both to the run.

    external_from: bytes of arrays from which on they stand in one file beside both graphs.
    """

    NAME: ClassVar[str] = "onnx-qdq"
    EXTERNAL_FROM: ClassVar[int] = 1_500_000_000
    BUILDER: ClassVar[type[Builder]] = Builder
    ADVICE: ClassVar[tuple[str, ...]] = _ADVICE
    EXACT: ClassVar[bool] = False
    """Whether every code is the definition's, not one near it."""
    ACTIVATIONS: ClassVar[str] = (
        "has a fixed grid, as QuantizeLinear and DequantizeLinear, which `*.encodings.json` has in the form that NPU compilers "
        "take beside a model"
    )
    length: int | None = None
    external_from: int = EXTERNAL_FROM

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            what = f"length is {self.length}, and a prefill has one token at least"
            raise ConfigError(what, where=f"{self.NAME}.length", fix="Give a number of tokens, or none for any length")

    def write(self, model: IntegerModel, folder: Path) -> dict[str, Any]:
        """See `Format.write`. Raises ConfigError for a length beyond the positions of the graph."""
        room = model.graph.positions
        if self.length is not None and self.length > room:
            what = f"length is {self.length}, and the graph has {room} positions"
            raise ConfigError(what, where=f"{self.NAME}.length", fix=f"Give at most {room}")
        made = phases(model, self.length, self.BUILDER)
        save(made, folder, self.external_from)
        for phase in made if not self.EXACT else ():
            text = json.dumps(encodings(phase), indent=1, allow_nan=False)
            (folder / f"{phase.name}.encodings.json").write_text(text + "\n", encoding="utf-8")
        cache = _cache(model) if len(made) == 2 else []
        (folder / "README.md").write_text(self._readme(model, made, cache), encoding="utf-8")
        return {
            "opset": OPSET,
            "exact": self.EXACT,
            "length": self.length,
            "positions": room,
            "weight_bits": model.bits,
            "models": {f"{phase.name}.onnx": _ports(phase) for phase in made},
            "cache": cache,
            "sites": {
                name: {"kind": site.kind, "edge": site.edge, **site.grid.model_dump()}
                for name, site in made[0].sites.items()
            },
        }

    def _readme(self, model: IntegerModel, made: list[Phase], cache: list[dict[str, Any]]) -> str:
        length = self.length
        names = [f"`{phase.name}.onnx`" for phase in made]
        size = "any number of tokens" if length is None else f"{length} tokens"
        lines = [
            "# An integer model as ONNX",
            "",
            f"{' and '.join(names)} of a {model.spec.family} model with weights of {model.bits} bits, opset {OPSET}, "
            f"for {size}; {model.graph.positions} positions at most. Every activation {self.ACTIVATIONS}; `export.json` lists "
            "the grids, with the files, the inputs and the outputs.",
            "",
            "```python",
            "import json",
            "from pathlib import Path",
            "import numpy as np",
            "import onnxruntime as ort",
            "",
            "tokens = [1, 2, 3]  # ids from tokenizer.json",
            f'{made[0].name} = ort.InferenceSession("{made[0].name}.onnx")',
        ]
        if length is None:
            lines += ["ids = np.array([tokens])"]
        else:
            lines += [f"ids = np.zeros((1, {length}), np.int64)  # what stands behind the tokens is not seen by them"]
            lines += ["ids[0, : len(tokens)] = tokens"]
        feed = '{"input_ids": ids}'
        if any(value.name == LENGTH for value in made[0].inputs):
            feed = '{"input_ids": ids, "length": np.array([len(tokens)])}'
        if isinstance(model.spec, EncoderSpec):
            lines += [
                f'vector = encoder.run(["{VECTOR}"], {feed})[0][0]',
                "vector /= np.linalg.norm(vector)  # so that products of two are cosines",
                "```",
                "",
                *self.ADVICE,
            ]
            return "\n".join(lines) + "\n"
        lines += [
            f"names = [output.name for output in prefill.get_outputs()]  # {model.graph.output}, then keys and values",
            f"found = dict(zip(names, prefill.run(None, {feed})))",
            f'token = int(found["{model.graph.output}"][0, len(tokens) - 1].argmax())',
        ]
        if cache:
            lines += [
                "",
                'decode, count = ort.InferenceSession("decode.onnx"), len(tokens)',
                'cache = json.loads(Path("export.json").read_text())["cache"]',
            ]
            if length is None:
                lines += [
                    'past = {c["past"]: found[c["new"]] for c in cache}',
                    "for _ in range(20):",
                    '    feed = past | {"input_ids": np.array([[token]]), "past_length": np.array([count])}',
                    "    found = dict(zip(names, decode.run(names, feed)))",
                    '    past = {c["past"]: np.concatenate([past[c["past"]], found[c["new"]]], axis=2) for c in cache}',
                ]
            else:
                lines += [
                    'past = {c["past"]: found[c["new"]].copy() for c in cache}  # slots from `count` on are free',
                    f"while count < {length}:",
                    '    feed = past | {"input_ids": np.array([[token]]), "past_length": np.array([count])}',
                    "    found = dict(zip(names, decode.run(names, feed)))",
                    "    for c in cache:",
                    '        past[c["past"]][:, :, count] = found[c["new"]][:, :, 0]',
                ]
            lines += [f'    token, count = int(found["{model.graph.output}"][0, -1].argmax()), count + 1']
        lines += [
            "```",
            "",
            "Keys and values are codes. A slot that was never written holds `fill`, the code of zero; it is not seen anyway.",
            *self.ADVICE,
        ]
        return "\n".join(lines) + "\n"


def _ports(phase: Phase) -> dict[str, Any]:
    return {"inputs": [_port(value) for value in phase.inputs], "outputs": [_port(value) for value in phase.outputs]}


def _port(value: ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": DTYPES[tensor.elem_type], "shape": shape}


def _cache(model: IntegerModel) -> list[dict[str, Any]]:
    """Where decode's keys and values come from, in which form, and what an empty slot holds."""
    found = []
    for node in model.graph.nodes:
        if isinstance(node, Attend):
            for edge in (node.k, node.v):
                grid = model.graph.edges[edge].grid
                sizes = {"heads": node.kv_heads, "head_dim": node.head_dim, "bits": grid.bits, "fill": grid.zero}
                found.append({"past": f"past.{edge}", "new": f"new.{edge}"} | sizes)
    return found
