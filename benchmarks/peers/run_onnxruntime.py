"""Worker of ONNX Runtime: its processor provider, inputs and outputs bound once, keys and values appended in place."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from job import Stepped, main


class OnnxRuntime(Stepped):
    """A model of onnx_random.py. All settings are the defaults but threads: one pool of them, none for operators."""

    def __init__(self, job: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(job["path"], options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.cache = []
        for given in self.session.get_inputs():
            if not given.name.startswith("past."):
                continue
            _, heads, _, dim = given.shape
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, job["context"], dim), dtype=np.float32))
            self.cache.append(value)
            self.binding.bind_ortvalue_input(given.name, value)
            # the same memory goes in and comes out: attention then writes one row and copies nothing
            self.binding.bind_ortvalue_output(given.name.replace("past", "present"), value)
        self.logits = np.empty((1, 1, self.session.get_outputs()[0].shape[2]), dtype=np.float32)
        self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
        self.length = 0

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        self.length += len(tokens)
        self.binding.bind_cpu_input("tokens", np.array([tokens], dtype=np.int64))
        self.binding.bind_cpu_input("last", np.array([self.length - 1], dtype=np.int32))
        self.binding.bind_cpu_input("total", np.array(self.length, dtype=np.int32))
        self.session.run_with_iobinding(self.binding)
        return self.logits[0, 0]

    def clear(self) -> None:
        self.length = 0


if __name__ == "__main__":
    main(OnnxRuntime)
