"""Worker of OpenVINO: its processor plugin, keys and values in the plugin's own state."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from job import Runner, main


class OpenVino(Runner):
    """A model of openvino_random.py. All settings are the defaults but threads, and one stream for one caller."""

    def __init__(self, job: dict[str, Any]) -> None:
        wanted = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = ov.Core().compile_model(job["path"], "CPU", wanted)
        self.request = self.compiled.create_infer_request()
        self.length = 0
        self.clear()

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Append to the sequence; returns logits (vocab,) after the last, valid until the next call."""
        ids = np.array([tokens], dtype=np.int64)
        places = np.arange(self.length, self.length + len(tokens), dtype=np.int64)[None]
        self.length += len(tokens)
        given = {"tokens": ids, "positions": places, "beams": np.zeros(1, dtype=np.int32)}
        self.request.infer(given, share_inputs=True, share_outputs=True)
        return np.asarray(self.request.get_output_tensor(0).data[0, 0])

    def clear(self) -> None:
        """Begin a fresh sequence."""
        self.request.reset_state()
        self.length = 0

    def prefill(self, tokens: Sequence[int]) -> float:
        self.clear()
        start = time.perf_counter()
        self.read(tokens).argmax()
        return time.perf_counter() - start

    def decode(self, tokens: Sequence[int], count: int) -> tuple[float, float, int]:
        self.clear()
        start = time.perf_counter()
        token = int(self.read(tokens).argmax())
        first = time.perf_counter() - start
        for _ in range(count - 1):
            token = int(self.read([token]).argmax())
        return first, time.perf_counter() - start - first, count - 1

    def facts(self) -> dict[str, Any]:
        operators = Counter(
            op.get_rt_info()["layerType"].astype(str) for op in self.compiled.get_runtime_model().get_ops()
        )
        names = ("KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_PRECISION_HINT")
        return {"engine_says": {k: str(self.compiled.get_property(k)) for k in names}, "operators": dict(operators)}


if __name__ == "__main__":
    main(OpenVino)
