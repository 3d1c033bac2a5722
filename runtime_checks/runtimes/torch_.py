"""PyTorch in fp32 through transformers: the reference, on the CPU; what a device computes comes back from it at once."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

import sola_edge  # noqa: F401  (teaches transformers to load a compressed checkpoint)
from runtime_checks.runtimes.greedy import Rows, Timed, greedy, timed_batch
from sola_edge.architecture import attention_implementation
from sola_edge.checkpoint import open_checkpoint

FILLER = 1
BLOCK = 256  # positions whose logits are in float64 at once


def loading_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` is given, so that every PyTorch figure is of the same model: fp32, the model's own attention."""
    kernel = attention_implementation(config)
    return {"dtype": torch.float32} | ({"attn_implementation": kernel} if kernel else {})


class Runtime:
    """A checkpoint in `AutoModelForCausalLM`, fp32, eager or SDPA attention as transformers chooses."""

    def __init__(self, path: str, threads: int, context: int, device: str) -> None:
        import transformers
        from transformers import AutoModelForCausalLM

        self.loader = AutoModelForCausalLM
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path, self.device = path, device
        self.options = loading_options(open_checkpoint(path).config)
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.cache: Any = None

    def load(self) -> None:
        """Raises whatever transformers raises."""
        self.model = self.loader.from_pretrained(self.path, **self.options).eval().to(self.device)

    def _forward(self, ids: list[int], keep: int) -> torch.Tensor:
        """Logits (keep or all, vocab) of ids appended to the cache."""
        return self._rows(torch.tensor([ids]), keep)[0]

    def _rows(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """The same of ids (sequences, n), each appended to its sequence's cache."""
        placed = tokens.to(self.device)
        out = self.model(placed, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        self.cache = out.past_key_values
        found: torch.Tensor = out.logits.cpu()
        return found

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """All positions, no cache."""
        return self._logits(ids).numpy()

    def _logits(self, ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids], device=self.device)
        # told that nothing is padded, transformers asks for causal attention instead of making a mask: half the time
        seen = torch.ones_like(tokens)
        found: torch.Tensor = self.model(tokens, attention_mask=seen, use_cache=False).logits[0].float().cpu()
        return found

    def nll(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """What metrics.window_nll gives, on all threads: of ids[1:], NaN where a logit is not finite."""
        logits, targets = self._logits(ids)[:-1], torch.tensor(ids[1:])
        found = []
        for start in range(0, len(targets), BLOCK):
            rows = logits[start : start + BLOCK]
            each = F.cross_entropy(rows.double(), targets[start : start + BLOCK], reduction="none")
            found.append(each.masked_fill(~rows.isfinite().all(dim=1), torch.nan))
        return torch.cat(found).numpy()

    def reset(self) -> None:
        """Forget the context."""
        self.cache = None

    def append(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits of ids from where the context is."""
        return self._forward(ids, 0).float().numpy()

    def prefill(self, ids: list[int]) -> float:
        """Seconds for ids from where the context is; the logits of the last position."""
        start = time.perf_counter()
        self._forward(ids, 1)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for `count` single-token steps."""
        start = time.perf_counter()
        for _ in range(count):
            self._forward([FILLER], 1)
        return time.perf_counter() - start

    def batch(self, ids: list[int], count: int, sequences: int) -> Timed:
        """Seconds to the first tokens, of the steps after them, and all that were chosen."""
        self.reset()

        def step(rows: Rows) -> npt.NDArray[np.float32]:
            return self._rows(torch.from_numpy(rows), 1)[:, -1].float().numpy()

        return timed_batch(step, ids, count, sequences)

    def generate(self, ids: list[int], count: int, eos: list[int]) -> tuple[list[int], npt.NDArray[np.float32] | None]:
        """Greedy continuation and the logits that chose each of its tokens."""
        self.reset()
        steps: list[npt.NDArray[np.float32]] = []

        def step(following: list[int]) -> npt.NDArray[np.float32]:
            steps.append(self._forward(following, 1)[-1].float().numpy().copy())
            return steps[-1]

        return greedy(step, ids, count, eos), np.stack(steps)

    def parts(self) -> dict[str, int]:
        """Weights and the cache as it is now."""
        tensors = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        told = {"weights": sum(t.numel() * t.element_size() for t in tensors.values())}
        layers = getattr(self.cache, "layers", None)
        if layers:
            told["kv"] = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
        return told
