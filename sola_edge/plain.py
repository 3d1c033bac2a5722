"""A checkpoint whose pivoted matrices are plain factors, or whole: the form that rounding to few bits hurts least.

Pivots are rows of the matrix itself, and what is rounded in them reaches every other row through B, more than once. In
plain factors whose A has orthonormal rows it reaches the outputs once from A and once from B (`factorize.orthonormal`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from sola_edge.checkpoint import Checkpoint, Tensors
from sola_edge.config import MatrixLayout
from sola_edge.factorize import orthonormal
from sola_edge.layers import recompose


def plain_layout(layout: MatrixLayout) -> MatrixLayout:
    """The smallest layout of the same matrix without pivots and gather: plain factors, or whole."""
    plain = replace(layout, pivot=False, gather=False)
    if layout.rank and plain.weights >= layout.n_out * layout.n_in:
        return replace(plain, rank=0, prime=0)
    return plain


def plain_parts(layout: MatrixLayout, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of `plain_layout(layout)` out of those of a layout with pivots, float32."""
    if plain_layout(layout).rank == 0:
        return {"weight": recompose(layout, dict(parts))}
    b, a = orthonormal(with_pivots(layout, parts), parts["A"])
    found = {"A": a.float(), "B": b.float()}
    return found | ({"prime": parts["prime"].float()} if layout.prime else {})


def with_pivots(layout: MatrixLayout, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """B (rows, rank) of plain factors: the identity's rows, which are not stored, put back, in the order of the outputs."""
    stored = parts["B"].float()
    rows = torch.cat([torch.eye(layout.rank), stored]) if layout.pivot else stored
    return rows[parts["order"].long()] if layout.gather else rows


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The same model, its pivoted matrices made plain when they are read, one at a time; itself where it has none."""
    pivoted = {module: layout for module, layout in checkpoint.layout.items() if layout.pivot}
    if not pivoted:
        return checkpoint
    layouts = {**checkpoint.layout, **{module: plain_layout(layout) for module, layout in pivoted.items()}}
    return replace(checkpoint, tensors=_Plain(checkpoint.tensors, pivoted), layout=layouts)


class _Plain:
    """Tensors under the names of the plain layouts."""

    def __init__(self, tensors: Tensors, pivoted: Mapping[str, MatrixLayout]) -> None:
        self._tensors, self._pivoted = tensors, pivoted
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def names(self) -> list[str]:
        """Each matrix's parts stand where its first part stood."""
        found: dict[str, None] = {}
        for name in self._tensors.names():
            module, _, part = name.rpartition(".")
            layout = self._pivoted.get(module)
            if layout is None or part not in layout.shapes:
                found[name] = None
            else:
                found |= dict.fromkeys(f"{module}.{part}" for part in plain_layout(layout).shapes)
        return list(found)

    def shape(self, name: str) -> tuple[int, ...]:
        module, _, part = name.rpartition(".")
        made = self._made(module, part)
        return made.shapes[part] if made else self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        module, _, part = name.rpartition(".")
        return self._tensors.dtype(f"{module}.A") if self._made(module, part) else self._tensors.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The parts of one matrix are read one after the other: the last matrix is kept for that."""
        module, _, part = name.rpartition(".")
        if not self._made(module, part):
            return self._tensors.tensor(name)
        if self._last[0] != module:
            layout = self._pivoted[module]
            parts = {part: self._tensors.tensor(f"{module}.{part}") for part in layout.shapes}
            self._last = (module, plain_parts(layout, parts))
        return self._last[1][part]

    def _made(self, module: str, part: str) -> MatrixLayout | None:
        """The plain layout that a part is of, None for what is as it was."""
        layout = self._pivoted.get(module)
        made = plain_layout(layout) if layout else None
        return made if made and part in made.shapes else None
