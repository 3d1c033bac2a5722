"""llama.cpp, through the ctypes bindings of the build that runs factored weights.

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

from runtime_checks.runtimes.devices import ALL_LAYERS, CPU
from runtime_checks.runtimes.greedy import Rows, Timed, greedy, timed_batch

FILLER = 1
PADDING = 256
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


def fill(batch: Any, rows: Rows, position: int, every: bool) -> None:
    """A llama_batch of ids (sequences, n) that begin at a position; logits of all of them, or of each sequence's last."""
    for i, (sequence, column) in enumerate(np.ndindex(*rows.shape)):
        batch.token[i] = rows[sequence, column]
        batch.pos[i] = position + column
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = every or column == rows.shape[1] - 1
    batch.n_tokens = rows.size


class Runtime:
    """One model and one context; sequence 0 holds the tokens."""

    def __init__(self, path: str, threads: int, context: int, device: str) -> None:
        self.path, self.threads, self.context, self.device = path, threads, context, device
        self.lib = _bindings()
        self.buffers: dict[tuple[str, str], float] = {}
        self.errors: list[str] = []
        self._callback = self.lib.llama_log_callback(self._on_log)  # kept: C holds a pointer to it
        self.lib.llama_log_set(self._callback, None)
        self.lib.llama_backend_init()
        self.version = "llama.cpp"
        self.position = 0
        self.several: tuple[tuple[int, int], Any, Any] | None = None

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
        params.n_gpu_layers = 0 if self.device == CPU else ALL_LAYERS
        # on the CPU an empty list: by default a build with a GPU would use it for prompts
        devices = (ctypes.c_void_p * 2)(self._found_device(), None)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        self.model = self.lib.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise RuntimeError(self.errors[0] if self.errors else "llama.cpp could not load the model")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.vocab = self.lib.llama_vocab_n_tokens(self.vocabulary)
        self.ctx = self._made(self._options())
        self.tokens_in = self.lib.llama_batch_init(self.context, 0, 1)

    def _found_device(self) -> int | None:
        """The backend's device, the first whose name begins as the runtime's row says; None: the CPU. Raises RuntimeError."""
        if self.device == CPU:
            return None
        ggml = self.lib._lib  # libllama, whose dependencies have these symbols
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
        ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
        for number in range(ggml.ggml_backend_dev_count()):
            found: int = ggml.ggml_backend_dev_get(ctypes.c_size_t(number))
            if ggml.ggml_backend_dev_name(ctypes.c_void_p(found)).decode().startswith(self.device):
                return found
        raise RuntimeError(f"this llama.cpp finds no {self.device} device")

    def _options(self) -> Any:
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = self.context
        options.n_threads = options.n_threads_batch = self.threads
        if self._metadata("general.file_type") == ALL_F32:
            options.type_k = options.type_v = TYPE_F32
            options.flash_attn_type = FLASH_ATTENTION_OFF
        return options

    def _made(self, options: Any) -> Any:
        ctx = self.lib.llama_init_from_model(self.model, options)
        if not ctx:
            raise RuntimeError(self.errors[0] if self.errors else "llama.cpp could not make a context")
        return ctx

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
        fill(self.tokens_in, np.array([ids]), self.position, every)
        found = self._decoded(self.ctx, self.tokens_in, len(ids) if every else 1)
        self.position += len(ids)
        return found

    def _decoded(self, ctx: Any, tokens: Any, rows: int) -> npt.NDArray[np.float32]:
        """The logits (rows, vocab) that were asked for of these tokens; a copy."""
        code = self.lib.llama_decode(ctx, tokens)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        found = self.lib.llama_get_logits(ctx)  # waits for the result
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

    def batch(self, ids: list[int], count: int, sequences: int) -> Timed:
        """Seconds to the first tokens, of the steps after them, and all that were chosen; in a context of its own."""
        ctx, tokens = self._several(sequences, sequences * len(ids))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(ctx), True)
        position = 0

        def step(rows: Rows) -> npt.NDArray[np.float32]:
            nonlocal position
            fill(tokens, rows, position, False)
            position += rows.shape[1]
            return self._decoded(ctx, tokens, sequences)

        return timed_batch(step, ids, count, sequences)

    def _several(self, sequences: int, room: int) -> tuple[Any, Any]:
        """A context for so many sequences and a llama_batch for so many tokens: those of the last time where they fit."""
        if self.several is None or self.several[0] != (sequences, room):
            if self.several is not None:
                self.lib.llama_batch_free(self.several[2])
                self.lib.llama_free(self.several[1])
            self.several = None
            options = self._options()
            each = -(-self.context // PADDING) * PADDING  # as llama.cpp rounds the part of a sequence
            options.n_ctx, options.n_batch, options.n_seq_max = sequences * each, room, sequences
            self.several = ((sequences, room), self._made(options), self.lib.llama_batch_init(room, 0, 1))
        return self.several[1], self.several[2]

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
