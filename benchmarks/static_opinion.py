"""Independent opinions on static whole numbers: quantizers of others on the same float model, text and windows.

    python benchmarks/static_opinion.py --model stories260K/hf --calibration stories.jsonl --split 0.33

Needs onnx and onnxruntime beside torch; without nncf its lines are left out. Options, texts and the file of results are
those of mobilequant.py, into whose table the lines go; `--resume` leaves out what is recorded. The float model is written
as ONNX of a fixed length; weights and activations get 8 bits, one scale a tensor, ranges by the quantizers' own
calibrators. The graph is run as it is written, no operators fused, so that no kernel for want of an instruction
saturates. What the contenders hold in 8 bits:

    all operators      whatever ONNX Runtime's `quantize_static` knows, its default: sums, products and the softmax too
    matrix products    inputs and outputs of these alone; norms, sums and the softmax stay float, where ours are whole numbers
    NNCF               inputs of matrix products, which is what `nncf.quantize` chooses; as a transformer, behind
                       SmoothQuant's scales
"""

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import mobilequant
from harness import emit
from lilliput.data.documents import read_documents
from lilliput.data.streams import batches
from lilliput.data.tokenizer import Tokenizer
from lilliput.measure.quality import evaluate
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.models.sites import run_block, run_end, run_start

CONTENDERS: dict[str, dict[str, Any]] = {
    "ONNX Runtime, all operators": {},
    "ONNX Runtime, matrix products": {"op_types_to_quantize": ["MatMul", "Gemm"]},
    "ONNX Runtime, matrix products, percentile": {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "calibrate_method": CalibrationMethod.Percentile,
    },
}
NNCF: dict[str, dict[str, Any]] = {"NNCF": {}, "NNCF, as a transformer": {"model_type": "transformer"}}
if importlib.util.find_spec("nncf"):
    CONTENDERS |= NNCF


class Plain(torch.nn.Module):
    """A decoder in operators that every exporter knows: (1, length) ids to (1, length, vocab) logits."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        spec, tensors = self.model.spec, dict(self.model.named_parameters())
        hidden = run_start(spec, tensors, tokens)
        for layer in range(spec.num_layers):
            at = f"layers.{layer}."
            hidden = run_block(spec, layer, {n.removeprefix(at): t for n, t in tensors.items() if at in n}, hidden)
        return run_end(spec, tensors, hidden)


class Rows(CalibrationDataReader):
    """Calibration rows, one at a time."""

    def __init__(self, rows: npt.NDArray[np.int32]) -> None:
        self.left = iter(rows)

    def get_next(self) -> dict[str, npt.NDArray[np.int64]] | None:
        row = next(self.left, None)
        return None if row is None else {"tokens": row[None].astype(np.int64)}


class Session:
    """A graph of a fixed length as `measure.quality.Runner`; shorter texts have padding behind them, which nothing sees."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.length = length

    def logits(self, tokens: npt.NDArray[np.int32], *, bits: int | None = None) -> npt.NDArray[np.float32]:
        """(length,) ids to (length, vocab)."""
        given = np.zeros((1, self.length), np.int64)
        given[0, : len(tokens)] = tokens
        (found,) = self.session.run(None, {"tokens": given})
        return np.ascontiguousarray(found[0, : len(tokens)])


def main() -> int:
    a = mobilequant.arguments()
    a.work.mkdir(parents=True, exist_ok=True)
    asked = {k: getattr(a, k) for k in ("samples", "length", "window", "limit", "split", "tuning")}
    setup = mobilequant.digest(a.model / "model.safetensors", a.calibration, a.text, **asked)
    torch.set_num_threads(a.threads)
    given, original = mobilequant.texts(a), mobilequant.Remembered(a.model)
    exported = export(a.model, a.window, a.work / "float.onnx")
    float_perplexity = evaluate(original, given.cut, bits=[None])[0].perplexity
    (same,) = evaluate(Session(exported, a.window, a.threads), given.cut[:8], bits=[0], against=original)
    if same.kl > 1e-6:
        raise SystemExit(f"the exported float model is another one: {same.kl:.2g} nats")
    name = a.model.resolve().name if a.model.name != "hf" else a.model.resolve().parent.name
    finished = {(line["contender"], line["seed"]) for line in mobilequant.recorded(setup)}
    for seed in a.seeds:
        # as many tokens as ours, in rows of the length the graph has
        drawn = batches(
            read_documents(given.calibration), Tokenizer.open(a.model), length=a.window,
            samples=max(1, a.samples * a.length // a.window), bos=True, seed=seed,
        )  # fmt: skip
        for contender, options in CONTENDERS.items():
            if a.resume and (contender, seed) in finished:
                continue
            busy, out = time.process_time(), a.work / "static.onnx"
            quantizer(contender)(exported, out, drawn.rows, options)
            busy = time.process_time() - busy
            (row,) = evaluate(Session(out, a.window, a.threads), given.cut, bits=[0], against=original)
            told = {"contender": contender, "bits": 8, "seed": seed, "options": {"steps": 0}}
            figures = row.model_dump(exclude={"bits"}) | {"cpu_seconds": busy, "peak_rss_bytes": None}
            common = {"setup": setup, "model": name, **asked, "threads": a.threads}
            emit(mobilequant.NAME, **common, **told, **figures, original_perplexity=float_perplexity)
    print("\n" + mobilequant.table(mobilequant.recorded(setup)))
    return 0


def export(folder: Path, length: int, path: Path) -> Path:
    """The float model as ONNX, with the shapes of everything worked out."""
    model, example = load_decoder(Checkpoint.open(folder)).eval(), torch.zeros((1, length), dtype=torch.int64)
    raw = path.with_suffix(".raw.onnx")
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter that has taken its place needs one package more; what the tracer warns of is fixed with the length.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            Plain(model), (example,), str(raw), input_names=["tokens"], output_names=["logits"],
            opset_version=17, dynamo=False,
        )  # fmt: skip
    quant_pre_process(str(raw), str(path), skip_symbolic_shape=True)
    return path


def quantize(exported: Path, out: Path, rows: npt.NDArray[np.int32], options: dict[str, Any]) -> None:
    """Run the quantizer: 8 bits a weight and an activation, one scale a tensor."""
    quantize_static(
        str(exported), str(out), Rows(rows), quant_format=QuantFormat.QDQ, per_channel=False,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options,
    )  # fmt: skip


def quantize_nncf(exported: Path, out: Path, rows: npt.NDArray[np.int32], options: dict[str, Any]) -> None:
    """The same by NNCF."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    kind = nncf.ModelType(options["model_type"]) if "model_type" in options else None
    a_tensor = QuantizationParameters(num_bits=8, per_channel=False)
    made = nncf.quantize(
        onnx.load(str(exported)), nncf.Dataset([{"tokens": row[None].astype(np.int64)} for row in rows]),
        subset_size=len(rows), model_type=kind,
        advanced_parameters=AdvancedQuantizationParameters(
            weights_quantization_params=a_tensor, activations_quantization_params=a_tensor
        ),
    )  # fmt: skip
    onnx.save(made, str(out))


def quantizer(contender: str) -> Callable[..., None]:
    """Who makes a contender's graph."""
    return quantize_nncf if contender in NNCF else quantize


if __name__ == "__main__":
    sys.exit(main())
