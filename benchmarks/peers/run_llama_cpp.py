"""Worker of llama.cpp, through the C functions that llama-cpp-python binds: its high-level class adds work of its own."""

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as c
import numpy as np
from job import Runner, main


class LlamaCpp(Runner):
    """A GGUF. All settings are llama.cpp's defaults but threads, the context, and a batch that holds the prompt."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(job["path"].encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx = job["context"]
        params.n_batch = params.n_ubatch = max(512, job["prefill_tokens"])
        params.n_threads = params.n_threads_batch = job["threads"]
        self.ctx = c.llama_init_from_model(self.model, params) if self.model else None
        if not self.ctx:
            raise SystemExit("llama.cpp cannot open " + job["path"])
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def _read(self, tokens: Sequence[int]) -> int:
        """Append to the sequence; returns the likeliest next token."""
        array = (c.llama_token * len(tokens))(*tokens)
        if c.llama_decode(self.ctx, c.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        logits = c.llama_get_logits_ith(self.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def _clear(self) -> None:
        c.llama_memory_clear(c.llama_get_memory(self.ctx), True)

    def prefill(self, tokens: Sequence[int]) -> float:
        self._clear()
        start = time.perf_counter()
        self._read(tokens)
        return time.perf_counter() - start

    def decode(self, tokens: Sequence[int], count: int) -> tuple[float, float, int]:
        self._clear()
        start = time.perf_counter()
        token = self._read(tokens)
        first = time.perf_counter() - start
        for _ in range(count - 1):
            token = self._read([token])
        return first, time.perf_counter() - start - first, count - 1

    def facts(self) -> dict[str, Any]:
        info = c.llama_print_system_info()
        return {"engine_says": info.decode() if info else None}


if __name__ == "__main__":
    main(LlamaCpp)
