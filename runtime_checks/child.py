"""A child process that holds one model in one runtime: `python -m runtime_checks.child MODULE`.

One JSON request per line on stdin, one JSON answer per line on stdout ({"ok": …} or {"error": "…"}). Logits go to
a raw float32 file that the request names. What a library prints on stdout is sent to stderr. Only the runtime's own
library is imported, so the memory figures are its own.
"""

import importlib
import json
import os
import sys
from typing import Any

import numpy as np

from runtime_checks.memory import library_pages, resident
from runtime_checks.metrics import window_nll


class Session:
    """The requests that a child answers; each method is one."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.runtime: Any = None
        self.libraries: int | None = None

    def load(self, path: str, threads: int, context: int, device: str) -> dict[str, Any]:
        """Import the library (baseline), then load the model (after_load)."""
        made = importlib.import_module(f"runtime_checks.runtimes.{self.module}").Runtime
        self.runtime = made(path, threads, context, device)
        baseline, self.libraries = resident()["now"], library_pages()
        self.runtime.load()
        told = {"version": self.runtime.version, "pid": os.getpid()}
        return {**told, "baseline": baseline, "after_load": resident()["now"]}

    def use(self, prompt: list[int], decode: int) -> dict[str, Any]:
        """A prompt and some decoding, as a user's process would do; then the memory figures so far."""
        self.runtime.reset()
        self.runtime.prefill(prompt)
        self.runtime.decode(decode)
        found, libraries = resident(), library_pages()
        more = None if libraries is None or self.libraries is None else libraries - self.libraries
        return {**found, "libraries": more, "parts": self.runtime.parts()}

    def logits(self, ids: list[int], out: str) -> dict[str, Any]:
        """Logits of every position of ids as raw float32 (n, vocab)."""
        found = np.ascontiguousarray(self.runtime.logits(ids), dtype=np.float32)
        found.tofile(out)
        return {"shape": list(found.shape)}

    def nll(self, ids: list[int]) -> dict[str, Any]:
        """Negative log-likelihoods of ids[1:]; null where not finite."""
        own = getattr(self.runtime, "nll", None)  # a runtime's faster way to the same figures
        found = own(ids) if own else window_nll(self.runtime.logits(ids), np.asarray(ids))
        return {"nll": [float(v) if np.isfinite(v) else None for v in found]}

    def time(self, prompt: list[int], generate: int) -> dict[str, float]:
        """Seconds of a prefill from an empty context, and of a decode from an empty context."""
        self.runtime.reset()
        prefill = self.runtime.prefill(prompt)
        self.runtime.reset()
        return {"prefill": prefill, "decode": self.runtime.decode(generate)}

    def batch(self, prompt: list[int], generate: int, sequences: int) -> dict[str, Any]:
        """Seconds until all sequences have their first new token, and of the greedy steps from there; what each chose."""
        first, decode, chosen = self.runtime.batch(prompt, generate, sequences)
        return {"first": first, "decode": decode, "chosen": chosen}

    def continuation(self, ids: list[int], count: int) -> dict[str, Any]:
        """Log-likelihood of the last `count` ids (null where not finite), and whether each was the likeliest."""
        found = self.runtime.logits(ids[:-1])[-count:]
        targets = np.asarray(ids[-count:])
        nll = window_nll(np.concatenate([found, found[-1:]]), np.concatenate([[0], targets]))
        total = -float(nll.sum())
        greedy = bool((found.argmax(axis=1) == targets).all())
        return {"value": total if np.isfinite(total) else None, "greedy": greedy}

    def steps(self, ids: list[int], first: int, out: str) -> None:
        """Logits of every position as `logits` gives them, but with the cache: `first` ids at once, the others one by one."""
        self.runtime.reset()
        parts = [self.runtime.append(ids[:first]), *(self.runtime.append([token]) for token in ids[first:])]
        np.concatenate(parts).astype(np.float32).tofile(out)

    def tokens(self, text: str) -> dict[str, Any]:
        """Ids that the runtime itself makes of a text, with what it puts around it; null where it makes none."""
        own = getattr(self.runtime, "tokens", None)
        return {"ids": own(text) if own else None}

    def bos(self) -> dict[str, Any]:
        """The id that the runtime itself puts before a text, null where it puts none."""
        return {"bos": self.runtime.bos()}

    def generate(self, ids: list[int], count: int, eos: list[int], out: str | None) -> dict[str, Any]:
        """Greedy continuation; the logits of its steps go to `out` where the runtime gives them."""
        found, steps = self.runtime.generate(ids, count, eos)
        if out is not None and steps is not None:
            steps.astype(np.float32).tofile(out)
        return {"ids": found}


def main() -> None:
    """Answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(session, request.pop("do"))(**request)}
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            answer = {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
