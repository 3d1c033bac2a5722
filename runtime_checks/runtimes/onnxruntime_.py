"""ONNX Runtime itself: a session on model.onnx, the KV cache passed from `present.*` to `past_key_values.*` where it is.

Which inputs the graph has is read from the session, so a graph with position_ids runs like one without.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime_checks.runtimes.devices import CPU
from runtime_checks.runtimes.greedy import Rows, Timed, greedy, timed_batch

FILLER = 1
SIDES = ((1, "num_key_value_heads"), (3, "head_size"))  # of a cache tensor: axis, and what genai_config.json calls it
CPU_PROVIDER = "CPUExecutionProvider"
# where a provider keeps what it computes, as OrtValues have it
PLACES = {CPU_PROVIDER: "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runtime:
    """One InferenceSession; on a device the cache stays there."""

    def __init__(self, path: str, threads: int, context: int, device: str) -> None:
        folder = Path(path)
        self.file = folder / "model.onnx" if folder.is_dir() else folder
        self.options = ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3
        self.version = f"onnxruntime {ort.__version__}"
        self.provider = CPU_PROVIDER if device == CPU else device
        self.place = PLACES[self.provider]
        self.past: dict[str, Any] = {}
        self.length = 0

    def load(self) -> None:
        """Raises whatever ONNX Runtime raises, and RuntimeError where it would run elsewhere than it was asked to."""
        providers = list(dict.fromkeys((self.provider, CPU_PROVIDER)))
        self.session = ort.InferenceSession(str(self.file), self.options, providers=providers)
        if self.session.get_providers()[0] != self.provider:  # it falls back to the CPU with a warning
            raise RuntimeError(f"ONNX Runtime could not start {self.provider}; are its libraries installed?")
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.reset()

    def reset(self, sequences: int = 1) -> None:
        """An empty cache: past length 0."""
        self.length = 0
        self.past = {}
        for name, node in self.inputs.items():
            if name.startswith("past_key_values."):
                heads, width = (self._side(node, axis, key) for axis, key in SIDES)
                empty = np.zeros((sequences, heads, 0, width), dtype=DTYPES[node.type])
                self.past[name] = ort.OrtValue.ortvalue_from_numpy(empty)

    def _side(self, node: Any, axis: int, key: str) -> int:
        """A side of the cache: as the graph has it, or by genai_config.json, where another builder's graph names it only."""
        side = node.shape[axis]
        if isinstance(side, int):
            return side
        config = self.file.with_name("genai_config.json")
        decoder = json.loads(config.read_text())["model"]["decoder"] if config.is_file() else {}
        if key not in decoder:
            raise ValueError(f"{node.name} has a side {side!r} of which no genai_config.json tells the size ({key})")
        return int(decoder[key])

    def _forward(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (len(ids), vocab) of ids appended to the cache."""
        return self._rows(np.array([ids], dtype=np.int64))[0].astype(np.float32, copy=False)

    def _rows(self, ids: Rows) -> npt.NDArray[np.floating]:
        """Logits (sequences, n, vocab) of ids (sequences, n), each appended to its sequence's cache; in the graph's type."""
        sequences, total = len(ids), self.length + ids.shape[1]
        positions = np.arange(self.length, total, dtype=np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((sequences, total), dtype=np.int64),
            "position_ids": np.tile(positions, (sequences, 1)),
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(v) for name, v in feeds.items() if name in self.inputs}
        named = self._run({**values, **self.past})
        self.past = {name: named[name.replace("past_key_values.", "present.")] for name in self.past}
        self.length = total
        found: npt.NDArray[np.floating] = named["logits"].numpy()
        return found

    def _run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name: logits on the CPU, the others where the provider computes them."""
        bound = self.session.io_binding()
        for name, value in values.items():
            bound.bind_ortvalue_input(name, value)
        for name in self.outputs:
            bound.bind_output(name, PLACES[CPU_PROVIDER] if name == "logits" else self.place)
        self.session.run_with_iobinding(bound)
        return dict(zip(self.outputs, bound.get_outputs(), strict=True))

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """All positions, from an empty context."""
        self.reset()
        return self._forward(ids)

    def append(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits of ids from where the context is."""
        return self._forward(ids)

    def prefill(self, ids: list[int]) -> float:
        """Seconds for ids from where the context is."""
        start = time.perf_counter()
        self._forward(ids)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for `count` single-token steps."""
        start = time.perf_counter()
        for _ in range(count):
            self._forward([FILLER])
        return time.perf_counter() - start

    def batch(self, ids: list[int], count: int, sequences: int) -> Timed:
        """Seconds to the first tokens, of the steps after them, and all that were chosen."""
        self.reset(sequences)
        return timed_batch(lambda rows: self._rows(rows)[:, -1].astype(np.float32), ids, count, sequences)

    def generate(self, ids: list[int], count: int, eos: list[int]) -> tuple[list[int], npt.NDArray[np.float32] | None]:
        """Greedy continuation."""
        self.reset()
        return greedy(lambda following: self._forward(following)[-1], ids, count, eos), None

    def parts(self) -> dict[str, int]:
        """The cache as it is now (ONNX Runtime does not tell the weights)."""
        return {"kv": sum(int(np.prod(v.shape())) * _width(v) for v in self.past.values())}


def _width(value: Any) -> int:
    return np.dtype(DTYPES[value.data_type()]).itemsize
