"""Write an ONNX Llama of random weights, with the operators that ONNX Runtime has for it. Runs in the peers' environment.

    python onnx_random.py '{"path": .., "shape": {..}, "bits": 4, "context": 2048}'

The graph is what ONNX Runtime's own model builder aims at for a processor: MatMulNBits in blocks of 32 that multiplies
in int8, queries, keys and values in one matrix, GroupQueryAttention that rotates and appends to a cache in place,
SkipSimplifiedLayerNormalization, the embedding in blocks, logits of the last token only. Weights lie in PATH.data.
Prints {"weight_bytes_per_token": .., "operators": {..}, "head": ..}.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from weights import EPS, blocks, gains, matrices, rotation

GROUP, INT8 = 32, 4
"""Columns to a scale; the accuracy_level that lets activations be int8."""
MICROSOFT = "com.microsoft"
_ONNX = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


class Graph:
    """Nodes and weights as they come; weights go to `data` at once, so that one matrix is in memory at a time."""

    def __init__(self, data: IO[bytes], location: str) -> None:
        self.data, self.location = data, location
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, array: np.ndarray) -> str:
        """Append an array to the data, at a page's start: it can be mapped there."""
        self.data.write(bytes(-self.data.tell() % 4096))
        tensor = TensorProto(name=name, data_type=_ONNX[array.dtype.name], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": self.location, "offset": self.data.tell(), "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(np.ascontiguousarray(array).data)
        self.weights.append(tensor)
        return name

    def small(self, name: str, array: np.ndarray) -> str:
        """An array inside the graph."""
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, name: str, inputs: list[str], outputs: int = 1, domain: str = "", **more: Any) -> str:
        """Append an operator; returns its first output, NAME. The others are NAME.1, NAME.2 .. ."""
        names = [name, *(f"{name}.{n}" for n in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **more))
        return name

    def matmul(self, name: str, x: str, size: tuple[int, int], bits: int) -> str:
        """x (.., in) times a matrix (out, in) of random codes."""
        out, columns = size
        given = blocks(name, out, columns, bits, GROUP)
        codes = given.codes.reshape(out, columns // GROUP, -1)
        inputs = [x, self.weight(f"{name}.codes", codes), self.weight(f"{name}.scales", given.scales)]
        form = {"K": columns, "N": out, "bits": bits, "block_size": GROUP, "accuracy_level": INT8}
        return self.node("MatMulNBits", name, inputs, domain=MICROSOFT, **form)


def write(path: Path, shape: dict[str, int], bits: int, context: int) -> dict[str, Any]:
    """Write the model and its data; the cache may be of any length up to `context`."""
    sizes, heads, kv = dict(matrices(shape)), shape["heads"], shape["kv"]
    dim = shape["hidden"] // heads
    cache = ["batch", kv, "context", dim]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])]
    inputs += [helper.make_tensor_value_info("last", TensorProto.INT32, ["batch"])]
    inputs += [helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, shape["vocab"]])]
    with path.with_name(path.name + ".data").open("wb") as data:
        g = Graph(data, path.name + ".data")
        cos, sin = rotation(shape, context)
        rotary = [g.small("cos", cos), g.small("sin", sin)]
        table = blocks("embed", *sizes["embed"], bits, GROUP)
        stored = [g.weight("embed.codes", table.codes), "tokens", g.weight("embed.scales", table.scales)]
        stored_as = {"gather_axis": 0, "quantize_axis": 1, "block_size": GROUP, "bits": bits}
        x = g.node("GatherBlockQuantized", "embed", stored, domain=MICROSOFT, **stored_as)
        residual, update = x, ""

        def norm(name: str) -> str:
            nonlocal residual
            gain = g.small(f"{name}.gain", gains(shape, name))
            if not update:
                return g.node("SimplifiedLayerNormalization", name, [residual, gain], epsilon=EPS, axis=-1)
            outs = [name, "", "", f"{name}.sum"]
            kind = "SkipSimplifiedLayerNormalization"
            last = name == "final_norm"
            ins = [residual, update, gain]
            g.nodes.append(
                helper.make_node(kind, ins, outs[:1] if last else outs, name=name, domain=MICROSOFT, epsilon=EPS)
            )
            residual = f"{name}.sum"
            return name

        for layer in range(shape["layers"]):
            at = f"layers.{layer}"
            past, present = ([f"{when}.{layer}.{what}" for what in ("key", "value")] for when in ("past", "present"))
            inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in past]
            outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in present]
            qkv = g.matmul(f"{at}.qkv", norm(f"{at}.attn_norm"), sizes[f"{at}.qkv"], bits)
            form = {"num_heads": heads, "kv_num_heads": kv, "do_rotary": 1, "scale": dim**-0.5}
            ins = [qkv, "", "", *past, "last", "total", *rotary]
            outs = [f"{at}.attn", *present]
            g.nodes.append(helper.make_node("GroupQueryAttention", ins, outs, name=outs[0], domain=MICROSOFT, **form))
            update = g.matmul(f"{at}.o", f"{at}.attn", sizes[f"{at}.o"], bits)
            x = norm(f"{at}.mlp_norm")
            gate = g.matmul(f"{at}.gate", x, sizes[f"{at}.gate"], bits)
            up = g.matmul(f"{at}.up", x, sizes[f"{at}.up"], bits)
            # x * sigmoid(1 * x), which is SiLU
            silu = g.node("QuickGelu", f"{at}.silu", [gate], domain=MICROSOFT, alpha=1.0)
            update = g.matmul(f"{at}.down", g.node("Mul", f"{at}.mlp", [silu, up]), sizes[f"{at}.down"], bits)
        if "" in (residual, update):
            raise SystemExit("a Llama has at least one layer")
        x = norm("final_norm")
        ends = [g.small(f"end.{k}", np.array([v], dtype=np.int64)) for k, v in (("from", -1), ("to", 1 << 31))]
        x = g.node("Slice", "last_token", [x, *ends, g.small("end.axis", np.array([1], dtype=np.int64))])
        g.matmul("head", x, sizes["head"], bits)
        g.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(g.nodes, "llama", inputs, outputs, g.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    read = [w for w in g.weights if not w.name.startswith(("embed.", "cos", "sin", "end."))]
    sized = {TensorProto.UINT8: 1, TensorProto.FLOAT: 4}
    return {
        "weight_bytes_per_token": int(sum(np.prod(w.dims) * sized[w.data_type] for w in read)),
        "operators": dict(Counter(n.op_type for n in g.nodes)),
        "head": f"{bits} bits",
        "group": GROUP,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    print("\n" + json.dumps(write(Path(job["path"]), job["shape"], job["bits"], job["context"])))


if __name__ == "__main__":
    main()
