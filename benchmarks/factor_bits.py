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


@contextmanager
def rounded(parts: list[tuple[str, torch.Tensor]], type_name: str) -> Iterator[None]:
    """These parameters as they come back from the type, while the context lasts; rows that are no whole blocks stay."""
    before = [part.clone() for _, part in parts]
    matrix = type_row(type_name).matrix
    try:
        for name, part in parts:
            if fits(part.shape, matrix):
                values = dequantize(encode(part.numpy(), matrix, name), matrix)
                part.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        yield
    finally:
        for (_, part), values in zip(parts, before, strict=True):
            part.copy_(values)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """(n, vocab) of a window."""
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    found: np.ndarray = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0].numpy()
    return found


@torch.no_grad()
def measure(checkpoint: Path, text: str, context: int, windows: int, types: list[str]) -> list[dict[str, Any]]:
    """A row for every kind and type, and for all kinds together."""
    source = open_checkpoint(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **loading_options(source.config)).eval()
    loaded = load_text(text)
    ids = list(make_protocol(loaded.joined, source.tokenizer(), context, windows, loaded.name).ids)
    reference = [logits(model, window) for window in ids]
    kinds = parts_of(model)
    kinds["all"] = [part for parts in kinds.values() for part in parts]
    asked = [(kind, type_name) for type_name in types for kind in kinds]
    return [_row(model, kind, kinds[kind], type_name, ids, reference) for kind, type_name in track(asked, "rounding")]


def _row(
    model: Any,
    kind: str,
    parts: list[tuple[str, torch.Tensor]],
    type_name: str,
    ids: list[np.ndarray],
    reference: list[np.ndarray],
) -> dict[str, Any]:
    matrix = type_row(type_name).matrix
    fitting = [part for _, part in parts if fits(part.shape, matrix)]
    size = sum(stored_bytes(part.shape, matrix) for part in fitting)
    saved = sum(part.numel() * HALF for part in fitting) - size
    with rounded(parts, type_name):
        kl = [float(compare_window(r, logits(model, w), w).kl.mean()) for r, w in zip(reference, ids, strict=True)]
    mean = float(np.mean(kl))
    return {
        "type": type_name,
        "kind": kind,
        "parameters": sum(part.numel() for _, part in parts),
        "left": len(parts) - len(fitting),
        "bytes": size,
        "kl": mean,
        "standard_error": float(np.std(kl, ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else None,
        "kl_per_saved_mb": mean / (saved / 1e6) if saved else None,
    }


HEADS = ("Type", "Kind", "Parameters", "Bytes", "KL, nats", "KL / MB saved", "Left")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = f" ± {row['standard_error']:.5f}" if row["standard_error"] is not None else ""
    each = f"{row['kl_per_saved_mb']:.2e}" if row["kl_per_saved_mb"] is not None else "–"
    sizes = (f"{row['parameters'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:.2f} MB")
    return (row["type"], row["kind"], *sizes, f"{row['kl']:.5f}{error}", each, str(row["left"]))


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
