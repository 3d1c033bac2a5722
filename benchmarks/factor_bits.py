"""Which parts of a compressed model deserve more bits: each kind of part is rounded alone, the others stay as they are.

    python benchmarks/factor_bits.py CHECKPOINT --text notes.txt --types q8_0,q5_0,q4_0

A checkpoint with plain factors (`compress --factors plain`), in PyTorch fp32. Kinds: whole matrices, prime rows or columns, A
(what an input meets first), B. What is told of a kind in a type: the bytes that it takes, the mean KL divergence from the
checkpoint as it is ± its standard error over windows, and that divergence for each megabyte that the rounding saves against
F16: kinds whose figure is larger deserve the bits of those whose figure is smaller.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from rich.console import Console
from transformers import AutoModelForCausalLM

import sola_edge  # noqa: F401  (teaches transformers to load a compressed checkpoint)
from exporters.gguf.types import encode, fits, stored_bytes, type_row
from runtime_checks.grids import print_grid
from runtime_checks.metrics import compare_window
from runtime_checks.protocol import make_protocol
from runtime_checks.runtimes.torch_ import loading_options
from sola_edge.architecture import architecture_of
from sola_edge.checkpoint import open_checkpoint
from sola_edge.progress import track
from sola_edge.texts import DEFAULT_SCORING, load_text

ENDS = {"whole": ".weight", "prime": ".prime", "A": ".A", "B": ".B"}
HALF = 2  # bytes


def parts_of(model: Any) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Parameters of the layers' matrices by kind; vocabulary and norms are none."""
    row = architecture_of(model.config)
    ends = (row.embedding, row.head)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(ends)]
    found = {kind: [(n, p) for n, p in matrices if n.endswith(end)] for kind, end in ENDS.items()}
    return {kind: parts for kind, parts in found.items() if parts}


def as_stored(weight: torch.Tensor, type_name: str, name: str) -> torch.Tensor:
    """A matrix as it comes back from the type."""
    matrix = type_row(type_name).matrix
    return torch.from_numpy(np.ascontiguousarray(dequantize(encode(weight.numpy(), matrix, name), matrix)))


@contextmanager
def rounded(parts: list[tuple[str, torch.Tensor]], type_name: str) -> Iterator[None]:
    """These parameters as they come back from the type, while the context lasts; rows that are no whole blocks stay."""
    before = [part.clone() for _, part in parts]
    try:
        for name, part in parts:
            if fits(part.shape, type_row(type_name).matrix):
                part.copy_(as_stored(part, type_name, name))
        yield
    finally:
        for (_, part), values in zip(parts, before, strict=True):
            part.copy_(values)


class Ruler:
    """A model in PyTorch fp32, whose parameters may change, and what it said of some windows before they did."""

    def __init__(self, checkpoint: Path, text: str, context: int, windows: int) -> None:
        source, loaded = open_checkpoint(checkpoint), load_text(text)
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, **loading_options(source.config)).eval()
        self.ids = list(make_protocol(loaded.joined, source.tokenizer(), context, windows, loaded.name).ids)
        self.reference = [self._logits(window) for window in self.ids]

    def _logits(self, ids: np.ndarray) -> np.ndarray:
        """(n, vocab) of a window."""
        tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
        seen = torch.ones_like(tokens)
        found: np.ndarray = self.model(tokens, attention_mask=seen, use_cache=False).logits[0].numpy()
        return found

    def divergence(self) -> dict[str, Any]:
        """Mean KL divergence of the model as it is now, nats, and its standard error over windows (one: null)."""
        pairs = zip(self.reference, self.ids, strict=True)
        kl = [float(compare_window(logits, self._logits(ids), ids).kl.mean()) for logits, ids in pairs]
        error = float(np.std(kl, ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else None
        return {"kl": float(np.mean(kl)), "standard_error": error}


@torch.no_grad()
def measure(checkpoint: Path, text: str, context: int, windows: int, types: list[str]) -> list[dict[str, Any]]:
    """A row for every kind and type, and for all kinds together."""
    ruler = Ruler(checkpoint, text, context, windows)
    kinds = parts_of(ruler.model)
    kinds["all"] = [part for parts in kinds.values() for part in parts]
    asked = [(kind, type_name) for type_name in types for kind in kinds]
    return [_row(ruler, kind, kinds[kind], type_name) for kind, type_name in track(asked, "rounding")]


def _row(ruler: Ruler, kind: str, parts: list[tuple[str, torch.Tensor]], type_name: str) -> dict[str, Any]:
    matrix = type_row(type_name).matrix
    fitting = [part for _, part in parts if fits(part.shape, matrix)]
    size = sum(stored_bytes(part.shape, matrix) for part in fitting)
    saved = sum(part.numel() * HALF for part in fitting) - size
    with rounded(parts, type_name):
        found = ruler.divergence()
    return {
        "type": type_name,
        "kind": kind,
        "parameters": sum(part.numel() for _, part in parts),
        "left": len(parts) - len(fitting),
        "bytes": size,
        **found,
        "kl_per_saved_mb": found["kl"] / (saved / 1e6) if saved else None,
    }


HEADS = ("Type", "Kind", "Parameters", "Bytes", "KL, nats", "KL / MB saved", "Left")


def shown(row: dict[str, Any]) -> str:
    """The divergence ± its standard error."""
    error = f" ± {row['standard_error']:.5f}" if row["standard_error"] is not None else ""
    return f"{row['kl']:.5f}{error}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    each = f"{row['kl_per_saved_mb']:.2e}" if row["kl_per_saved_mb"] is not None else "–"
    sizes = (f"{row['parameters'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:.2f} MB")
    return (row["type"], row["kind"], *sizes, shown(row), each, str(row["left"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", default=DEFAULT_SCORING)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--types", default="q8_0,q5_0,q4_0")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = measure(asked.checkpoint, asked.text, asked.context, asked.windows, asked.types.split(","))
    if asked.json:
        print(json.dumps(rows))
    else:
        print_grid(Console(), HEADS, map(_cells, rows))


if __name__ == "__main__":
    main()
