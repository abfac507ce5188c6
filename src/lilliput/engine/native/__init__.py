"""The only door to C++: typed wrappers of the kernels, one by one, and of the models they add up to.

Every op takes `variant`, one of `variants(op)`; the empty name takes the best this CPU can run. All variants of an op
give the same bits. Arrays are float32 and contiguous unless said otherwise.
"""

from lilliput.engine.native.arrays import F32, Codes
from lilliput.engine.native.integer_model import IntegerModel
from lilliput.engine.native.integer_ops import (
    attention_integer,
    matmul_integer,
    multiply_integer,
    norm_integer,
    rotary_integer,
    sum_integer,
    table_integer,
)
from lilliput.engine.native.model import GROUP, PAGE, Activations, Course, Drafting, Glimpse, Made, Model, NextBits
from lilliput.engine.native.ops import (
    KV,
    SHARE,
    activation,
    attention,
    compiler,
    exponential,
    matmul_float,
    matmul_nested,
    matmul_nested_i8,
    nested_rows,
    norm,
    quantize_i8,
    read_bandwidth,
    rotary,
    sample,
    softcap,
    variants,
)

__all__ = [
    "F32",
    "GROUP",
    "KV",
    "PAGE",
    "SHARE",
    "Activations",
    "Codes",
    "Course",
    "Drafting",
    "Glimpse",
    "IntegerModel",
    "Made",
    "Model",
    "NextBits",
    "activation",
    "attention",
    "attention_integer",
    "compiler",
    "exponential",
    "matmul_float",
    "matmul_integer",
    "matmul_nested",
    "matmul_nested_i8",
    "multiply_integer",
    "nested_rows",
    "norm",
    "norm_integer",
    "quantize_i8",
    "read_bandwidth",
    "rotary",
    "rotary_integer",
    "sample",
    "softcap",
    "sum_integer",
    "table_integer",
    "variants",
]
