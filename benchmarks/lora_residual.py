"""What an unmodified llama.cpp could do with factors: a base of few bits, and a LoRA adapter that holds them.

    python benchmarks/lora_residual.py MODEL --text notes.txt --ranks 16,32,64 --types q4_0

Stock llama.cpp adds an adapter's B·A to a whole matrix, so nothing is left out of the base: it is read in full, in few bits,
and the adapter (F16) besides. Two ways of sharing the work, both by singular values of the layers' matrices: `factors` takes
B·A from W and rounds the rest, `error` rounds W and takes B·A from what rounding lost. Beside them are plain types. In PyTorch
fp32 with weights as they come back from the types; bytes are those of the layers' matrices and of the adapter.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from factor_bits import HALF, Ruler, as_stored, parts_of, shown
from rich.console import Console

from exporters.gguf.types import stored_bytes, type_row
from runtime_checks.grids import print_grid
from sola_edge.progress import track
from sola_edge.texts import DEFAULT_SCORING

PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def adapter(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """B·A of that rank, nearest in the Frobenius norm (Eckart and Young), with both in F16: (m, n)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    b, a = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    return b.half().float() @ a.half().float()


def factors_first(weight: torch.Tensor, rank: int, type_name: str, name: str) -> torch.Tensor:
    """B·A of W, the rest rounded."""
    taken = adapter(weight, rank)
    return taken + as_stored(weight - taken, type_name, name)


def error_first(weight: torch.Tensor, rank: int, type_name: str, name: str) -> torch.Tensor:
    """W rounded, B·A of what that lost."""
    base = as_stored(weight, type_name, name)
    return base + adapter(weight - base, rank)


WAYS: dict[str, Callable[[torch.Tensor, int, str, str], torch.Tensor]] = {
    "factors": factors_first,
    "error": error_first,
}


def settings(types: list[str], ranks: list[int]) -> Iterator[tuple[str, str, int]]:
    """(way, type, rank): plain types first."""
    yield from (("plain", type_name, 0) for type_name in PLAIN)
    yield from ((way, type_name, rank) for type_name in types for rank in ranks for way in WAYS)


@torch.no_grad()
def measure(
    model_path: Path, text: str, context: int, windows: int, types: list[str], ranks: list[int]
) -> list[dict[str, Any]]:
    """A row for every setting."""
    ruler = Ruler(model_path, text, context, windows)
    matrices = [(name, part, part.clone()) for parts in parts_of(ruler.model).values() for name, part in parts]
    rows = []
    for way, type_name, rank in track(list(settings(types, ranks)), "bases and adapters"):
        size = 0
        for name, part, weight in matrices:
            made = WAYS[way](weight, rank, type_name, name) if rank else as_stored(weight, type_name, name)
            part.copy_(made)
            size += stored_bytes(weight.shape, type_row(type_name).matrix) + HALF * rank * sum(weight.shape)
        rows.append({"way": way, "type": type_name, "rank": rank, "bytes": size, **ruler.divergence()})
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["way"], row["type"], str(row["rank"]), f"{row['bytes'] / 1e6:.1f} MB", shown(row))


def main() -> None:
    """Measure and print, the smallest first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a dense checkpoint folder")
    parser.add_argument("--text", default=DEFAULT_SCORING)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--types", default="q4_0")
    parser.add_argument("--ranks", default="16,32,64")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    ranks = [int(rank) for rank in asked.ranks.split(",")]
    rows = measure(asked.model, asked.text, asked.context, asked.windows, asked.types.split(","), ranks)
    rows.sort(key=lambda row: row["bytes"])
    if asked.json:
        print(json.dumps(rows))
    else:
        print_grid(Console(), ("Way", "Type", "Rank", "Bytes", "KL, nats"), map(_cells, rows))


if __name__ == "__main__":
    main()
