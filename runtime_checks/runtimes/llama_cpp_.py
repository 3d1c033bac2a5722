"""llama.cpp on the CPU, through the ctypes bindings of the build that runs factored weights.

Only the bindings' low-level module is imported (the package's own `__init__` pulls in a server's worth of libraries).
The context is llama.cpp's default but for two things. One batch holds a whole window, so that all its logits are there
at once. And a file of F32 weights gets an F32 KV cache and no flash attention: those round to F16 (mean KL to PyTorch of
SmolLM2 4e-7, without them 1e-11), which would hide what the file itself does.
"""

import ctypes
import importlib
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime_checks.runtimes.greedy import greedy

FILLER = 1
BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")
PARTS = {"model": "weights", "KV": "kv", "compute": "compute", "output": "output"}
ALL_F32 = "0"  # general.file_type
TYPE_F32 = 0
FLASH_ATTENTION_OFF = 0


def _bindings() -> Any:
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(Path(os.environ["SOLA_EDGE_LLAMA_CPP_PYTHON"]) / "llama_cpp")]
    sys.modules.setdefault("llama_cpp", package)
    return importlib.import_module("llama_cpp.llama_cpp")


class Runtime:
    """One model and one context; sequence 0 holds the tokens."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self.path, self.threads, self.context = path, threads, context
        self.lib = _bindings()
        self.buffers: dict[tuple[str, str], float] = {}
        self.errors: list[str] = []
        self._callback = self.lib.llama_log_callback(self._on_log)  # kept: C holds a pointer to it
        self.lib.llama_log_set(self._callback, None)
        self.lib.llama_backend_init()
        self.version = "llama.cpp"
        self.position = 0

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip()
        if found := BUFFER.search(line):
            self.buffers[found[1], found[2]] = float(found[3])
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(line)
            print(line, file=sys.stderr)

    def load(self) -> None:
        """Raises RuntimeError with llama.cpp's own first error line."""
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise RuntimeError(self.errors[0] if self.errors else "llama.cpp could not load the model")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.vocab = self.lib.llama_vocab_n_tokens(self.vocabulary)
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = self.context
        options.n_threads = options.n_threads_batch = self.threads
        if self._metadata("general.file_type") == ALL_F32:
            options.type_k = options.type_v = TYPE_F32
            options.flash_attn_type = FLASH_ATTENTION_OFF
        self.ctx = self.lib.llama_init_from_model(self.model, options)
        if not self.ctx:
            raise RuntimeError(self.errors[0] if self.errors else "llama.cpp could not make a context")
        self.batch = self.lib.llama_batch_init(self.context, 0, 1)

    def _metadata(self, key: str) -> str:
        text = ctypes.create_string_buffer(256)
        self.lib.llama_model_meta_val_str(self.model, key.encode(), text, len(text))
        return text.value.decode()

    def reset(self) -> None:
        """Empty the KV cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        self.position = 0

    def _forward(self, ids: list[int], every: bool) -> npt.NDArray[np.float32]:
        """Logits of all (or the last) of ids, appended to the context; a copy."""
        if self.position + len(ids) > self.context:
            raise RuntimeError(f"{self.position + len(ids)} tokens do not fit a context of {self.context}")
        for i, token in enumerate(ids):
            self.batch.token[i] = token
            self.batch.pos[i] = self.position + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = every or i == len(ids) - 1
        self.batch.n_tokens = len(ids)
        code = self.lib.llama_decode(self.ctx, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        self.position += len(ids)
        rows = len(ids) if every else 1
        found = self.lib.llama_get_logits(self.ctx)  # waits for the result
        return np.ctypeslib.as_array(found, shape=(rows, self.vocab)).copy()

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """All positions, from an empty context."""
        self.reset()
        return self._forward(ids, every=True)

    def append(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits of ids from where the context is."""
        return self._forward(ids, every=True)

    def prefill(self, ids: list[int]) -> float:
        """Seconds for ids from where the context is."""
        start = time.perf_counter()
        self._forward(ids, every=False)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for `count` single-token steps."""
        start = time.perf_counter()
        for _ in range(count):
            self._forward([FILLER], every=False)
        return time.perf_counter() - start

    def generate(self, ids: list[int], count: int, eos: list[int]) -> tuple[list[int], npt.NDArray[np.float32] | None]:
        """Greedy continuation."""
        self.reset()
        return greedy(lambda following: self._forward(following, every=False)[-1], ids, count, eos), None

    def bos(self) -> int | None:
        """What llama.cpp's own tools put before a text: by the file's metadata, or by its kind of tokenizer."""
        return (
            int(self.lib.llama_vocab_bos(self.vocabulary))
            if self.lib.llama_vocab_get_add_bos(self.vocabulary)
            else None
        )

    def tokens(self, text: str) -> list[int]:
        """With the special tokens that the file's metadata asks for."""
        encoded = text.encode()
        room = (self.lib.llama_token * (len(encoded) + 8))()
        count = self.lib.llama_tokenize(self.vocabulary, encoded, len(encoded), room, len(room), True, True)
        return list(room[:count])

    def parts(self) -> dict[str, int]:
        """llama.cpp's own account of its buffers (a mapped model counts in full)."""
        told: dict[str, int] = {}
        for (_, what), size in self.buffers.items():
            told[PARTS[what]] = told.get(PARTS[what], 0) + int(size * 2**20)
        return told
