"""Worker of llama.cpp, through the C functions that llama-cpp-python binds: its high-level class adds work of its own."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as c
import numpy as np
from job import Stepped, main


class LlamaCpp(Stepped):
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

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        array = (c.llama_token * len(tokens))(*tokens)
        if c.llama_decode(self.ctx, c.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        return np.ctypeslib.as_array(c.llama_get_logits_ith(self.ctx, -1), shape=(self.vocab,))

    def clear(self) -> None:
        c.llama_memory_clear(c.llama_get_memory(self.ctx), True)

    def facts(self) -> dict[str, Any]:
        info = c.llama_print_system_info()
        return {"engine_says": info.decode() if info else None}


if __name__ == "__main__":
    main(LlamaCpp)
