"""onnxruntime-genai: the folder as its users load it, one generator per context.

The logits of all positions of a prompt are the graph's output `logits`, which a generator hands out after
`append_tokens`.
"""

import json
import time

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from runtime_checks.runtimes.devices import CPU
from runtime_checks.runtimes.greedy import Timed


class Runtime:
    """A genai Model; greedy search."""

    def __init__(self, path: str, threads: int, context: int, device: str) -> None:
        self.path, self.threads, self.context, self.device = path, threads, context, device
        self.version = f"onnxruntime-genai {og.__version__}"

    def load(self) -> None:
        """Raises whatever onnxruntime-genai raises."""
        config = og.Config(self.path)
        session = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        config.clear_providers()  # the folder may name one of its own
        if self.device != CPU:
            config.append_provider(self.device)
        self.model = og.Model(config)
        self.reset()

    def _generator(self, length: int, shortest: int = 0, sequences: int = 1) -> og.Generator:
        params = og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=length, min_length=shortest, batch_size=sequences)
        return og.Generator(self.model, params)

    def reset(self) -> None:
        """A generator with an empty cache for `context` tokens (min_length: an EOS does not end a timing)."""
        self.generator = self._generator(self.context + 1, self.context + 1)
        self.empty = True

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """All positions, from an empty context."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        return np.asarray(generator.get_output("logits"))[0].astype(np.float32, copy=False)

    def append(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits of ids from where the context is."""
        self.prefill(ids)
        return np.asarray(self.generator.get_output("logits"))[0].astype(np.float32)

    def prefill(self, ids: list[int]) -> float:
        """Seconds for ids from where the context is."""
        start = time.perf_counter()
        self.generator.append_tokens(np.array([ids], dtype=np.int32))
        self.empty = False
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for `count` single-token steps, each with its greedy choice."""
        start = time.perf_counter()
        if self.empty:  # the first token has to come from somewhere: it is the first of the steps
            self.generator.append_tokens(np.array([[1]], dtype=np.int32))
            self.empty = False
        for _ in range(count):
            self.generator.generate_next_token()
        return time.perf_counter() - start

    def batch(self, ids: list[int], count: int, sequences: int) -> Timed:
        """Seconds to the first tokens (chosen when genai is asked for the next), of the steps after, all that were chosen."""
        length = len(ids) + count + 1
        generator = self._generator(length, length, sequences)
        rows = np.tile(np.array(ids, dtype=np.int32), (sequences, 1))
        start = time.perf_counter()
        generator.append_tokens(rows)
        generator.generate_next_token()
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        decode = time.perf_counter() - start
        return first, decode, [generator.get_sequence(i)[len(ids) :].tolist() for i in range(sequences)]

    def generate(self, ids: list[int], count: int, eos: list[int]) -> tuple[list[int], npt.NDArray[np.float32] | None]:
        """Greedy continuation by genai's own search."""
        generator = self._generator(len(ids) + count)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        found: list[int] = []
        while len(found) < count and not generator.is_done() and not (found and found[-1] in eos):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found, None

    def parts(self) -> dict[str, int]:
        """onnxruntime-genai tells nothing."""
        return {}
