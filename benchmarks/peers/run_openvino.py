"""Worker of OpenVINO: its processor plugin, keys and values in the plugin's own state."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from job import Stepped, main


class OpenVino(Stepped):
    """A model of openvino_random.py. All settings are the defaults but threads, and one stream for one caller."""

    def __init__(self, job: dict[str, Any]) -> None:
        wanted = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = ov.Core().compile_model(job["path"], "CPU", wanted)
        self.request = self.compiled.create_infer_request()
        self.length = 0
        self.clear()

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        ids = np.array([tokens], dtype=np.int64)
        places = np.arange(self.length, self.length + len(tokens), dtype=np.int64)[None]
        self.length += len(tokens)
        given = {"tokens": ids, "positions": places, "beams": np.zeros(1, dtype=np.int32)}
        self.request.infer(given, share_inputs=True, share_outputs=True)
        return np.asarray(self.request.get_output_tensor(0).data[0, 0])

    def clear(self) -> None:
        self.request.reset_state()
        self.length = 0

    def facts(self) -> dict[str, Any]:
        operators = Counter(
            op.get_rt_info()["layerType"].astype(str) for op in self.compiled.get_runtime_model().get_ops()
        )
        names = ("KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_PRECISION_HINT")
        return {"engine_says": {k: str(self.compiled.get_property(k)) for k in names}, "operators": dict(operators)}


if __name__ == "__main__":
    main(OpenVino)
