"""An artifact as a foreign format, one file each, by the name the command line knows it by."""

from lilliput.core.registry import Registry

FORMATS = Registry(
    "format",
    **{
        "onnx-qdq": "lilliput.export.onnx_qdq:OnnxQdq",
        "onnx-integer": "lilliput.export.onnx_integer:OnnxInteger",
    },
)
