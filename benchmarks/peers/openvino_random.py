"""Write an OpenVINO Llama of random weights in the form its processor plugin fuses. Runs in the peers' environment.

    python openvino_random.py '{"path": .., "shape": {..}, "bits": 4}'

What its own exporter and weight compressor make of a Llama by default: blocks of 128 columns at 4 bits with zeros, the
embedding, the head, and everything at 8 bits in one block a row; keys and values as state, rotation and grouped heads
spelled out as the plugin's patterns know them, logits of the last token only.
Prints {"weight_bytes_per_token": .., "head": ..}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as op
from openvino.op.util import Variable, VariableInfo
from weights import BASE, EPS, Blocks, blocks, gains, matrices

GROUP = 128
"""Columns to a scale at 4 bits, the compressor's default."""


def form(name: str, columns: int, bits: int) -> tuple[int, int]:
    """Bits and group of a matrix: the ends stay at 8 bits."""
    return (bits, GROUP) if bits == 4 and name not in ("embed", "head") else (8, columns)


def matrix(name: str, size: tuple[int, int], bits: int) -> Blocks:
    """The codes of a matrix as this writer stores them."""
    width, group = form(name, size[1], bits)
    return blocks(name, *size, width, group, centred=False)


class Writer:
    """Builds the model; `bytes` grows with the codes, zeros, scales and gains it holds."""

    def __init__(self, shape: dict[str, int], bits: int) -> None:
        self.shape, self.bits, self.bytes = shape, bits, 0
        self.alive: list[np.ndarray] = []  # constants of packed types point into NumPy's memory and do not own it
        self.sizes = dict(matrices(shape))
        self.heads, self.kv = shape["heads"], shape["kv"]
        self.dim = shape["hidden"] // self.heads

    def values(self, name: str) -> Node:
        """(out, in) float32, from codes when it runs."""
        out, columns = self.sizes[name]
        given = matrix(name, (out, columns), self.bits)
        kind = ov.Type.u4 if given.bits == 4 else ov.Type.u8
        groups = given.scales.shape[1]
        whole = [out, columns] if groups == 1 else [out, groups, columns // groups]
        ones = [out, *[1] * (len(whole) - 1)] if groups == 1 else [out, groups, 1]
        zeros = given.zeros.reshape(-1)
        if given.bits == 4:
            zeros = zeros[0::2] | zeros[1::2] << 4
        scales = given.scales.astype(np.float16).reshape(ones)
        self.alive += [given.codes, zeros]
        codes, zero = (op.constant(ov.Tensor(a, ov.Shape(s), kind)) for a, s in ((given.codes, whole), (zeros, ones)))
        self.bytes += given.codes.nbytes + zeros.nbytes + scales.nbytes if name != "embed" else 0
        x = op.subtract(op.convert(codes, "f16"), op.convert(zero, "f16"))
        x = op.multiply(x, op.constant(scales))
        if groups > 1:
            x = op.reshape(x, op.constant([out, columns]), special_zero=False)
        return op.convert(x, "f32")

    def linear(self, x: Node, name: str) -> Node:
        return op.matmul(x, self.values(name), transpose_a=False, transpose_b=True)

    def norm(self, x: Node, name: str) -> Node:
        gain = gains(self.shape, name)
        self.bytes += gain.nbytes
        mean = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        inverse = op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(EPS))))
        return op.multiply(op.constant(gain.reshape(1, 1, -1)), op.multiply(x, inverse))

    def rotated(self, x: Node, cos: Node, sin: Node) -> Node:
        """x (batch, heads, length, dim) with one half of a head turned with the other."""
        half, end, step, axis = (op.constant([n]) for n in (self.dim // 2, np.iinfo(np.int64).max, 1, 3))
        first, second = op.slice(x, op.constant([0]), half, step, axis), op.slice(x, half, end, step, axis)
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def split_heads(self, x: Node, heads: int) -> Node:
        """(batch, length, heads * dim) as (batch, heads, length, dim)."""
        apart = op.reshape(x, op.constant([0, 0, heads, self.dim]), special_zero=True)
        return op.transpose(apart, op.constant([0, 2, 1, 3]))

    def kept(self, x: Node, name: str, batch: Node, beams: Node) -> tuple[Node, Node]:
        """Append x to the state `name`; returns all of it so far, and what stores it."""
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = (
            ov.PartialShape([-1, self.kv, -1, self.dim]),
            ov.Type.f32,
            name,
        )
        state = Variable(info)
        empty = op.broadcast(np.float32(0), op.concat([batch, op.constant([self.kv, 0, self.dim])], 0))
        past = op.gather(op.read_value(empty, state), beams, op.constant(0))
        full = op.concat([past, x], 2)
        return full, op.assign(full, state)

    def shared(self, x: Node) -> Node:
        """Keys or values for every head of the queries."""
        each = self.heads // self.kv
        if each == 1:
            return x
        size = op.shape_of(x)
        parts = [op.gather(size, op.constant([n]), op.constant(0)) for n in range(4)]
        wide = op.concat([parts[0], parts[1], op.constant([each]), parts[2], parts[3]], 0)
        many = op.broadcast(op.unsqueeze(x, op.constant(2)), wide, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(many, op.constant([0, self.heads, -1, self.dim]), special_zero=True)

    def model(self) -> ov.Model:
        """Inputs: tokens and positions (batch, length) int64, beams (batch,) int32. Output: logits (batch, 1, vocab)."""
        tokens, positions = (op.parameter([-1, -1], ov.Type.i64, name=name) for name in ("tokens", "positions"))
        beams = op.parameter([-1], ov.Type.i32, name="beams")
        batch = op.gather(op.shape_of(tokens), op.constant([0]), op.constant(0))
        frequencies = (BASE ** (-np.arange(self.dim // 2) / (self.dim // 2))).astype(np.float32).reshape(1, -1, 1)
        column = op.convert(op.unsqueeze(positions, op.constant(1)), "f32")
        angles = op.transpose(op.matmul(op.constant(frequencies), column, False, False), op.constant([0, 2, 1]))
        angles = op.concat([angles, angles], 2)
        cos, sin = (op.unsqueeze(turn(angles), op.constant(1)) for turn in (op.cos, op.sin))
        x = op.gather(self.values("embed"), op.convert(tokens, "i32"), op.constant(0))
        mask, sinks = None, []
        for layer in range(self.shape["layers"]):
            at, hidden = f"layers.{layer}", self.shape["hidden"]
            qkv = self.linear(self.norm(x, f"{at}.attn_norm"), f"{at}.qkv")
            wide = [hidden, self.kv * self.dim, self.kv * self.dim]
            q, k, v = op.variadic_split(qkv, 2, wide).outputs()
            q = self.rotated(self.split_heads(q, self.heads), cos, sin)
            k = self.rotated(self.split_heads(k, self.kv), cos, sin)
            v = self.split_heads(v, self.kv)
            k, keep_k = self.kept(k, f"{layer}.key", batch, beams)
            v, keep_v = self.kept(v, f"{layer}.value", batch, beams)
            sinks += [keep_k, keep_v]
            if mask is None:
                mask = self.mask(k, positions)
            mixed = op.scaled_dot_product_attention(q, self.shared(k), self.shared(v), mask)
            mixed = op.reshape(
                op.transpose(mixed, op.constant([0, 2, 1, 3])), op.constant([0, 0, hidden]), special_zero=True
            )
            x = op.add(x, self.linear(mixed, f"{at}.o"))
            y = self.norm(x, f"{at}.mlp_norm")
            x = op.add(
                x,
                self.linear(
                    op.multiply(op.swish(self.linear(y, f"{at}.gate")), self.linear(y, f"{at}.up")), f"{at}.down"
                ),
            )
        x = op.gather(self.norm(x, "final_norm"), op.constant([-1]), op.constant(1))
        logits = op.result(self.linear(x, "head"), name="logits")
        return ov.Model([logits], sinks, [tokens, positions, beams], "llama")

    def mask(self, keys: Node, positions: Node) -> Node:
        """(batch, 1, length, keys): 0 where a key is not later than the token, very negative elsewhere."""
        count = op.gather(op.shape_of(keys), op.constant(2), op.constant(0))
        earlier = op.range(op.constant(0), count, op.constant(1), output_type="i64")
        rows = op.unsqueeze(op.unsqueeze(positions, op.constant(2)), op.constant(1))
        return op.select(op.less_equal(earlier, rows), np.float32(0), np.float32(np.finfo(np.float32).min))


def write(path: Path, shape: dict[str, int], bits: int) -> dict[str, Any]:
    """Write PATH, an .xml, and the weights beside it."""
    writer = Writer(shape, bits)
    ov.save_model(writer.model(), path, compress_to_fp16=False)
    return {"weight_bytes_per_token": int(writer.bytes), "head": "8 bits", "group": GROUP if bits == 4 else 0}


def main() -> None:
    job = json.loads(sys.argv[1])
    print("\n" + json.dumps(write(Path(job["path"]), job["shape"], job["bits"])))


if __name__ == "__main__":
    main()
