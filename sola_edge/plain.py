"""A checkpoint whose pivoted matrices are plain factors, or whole: the form that rounding to few bits hurts least.

Pivots are rows of the matrix itself, and what is rounded in them reaches every other row through B, more than once. In
plain factors whose A has orthonormal rows it reaches the outputs once from A and once from B (`factorize.orthonormal`).
"""

from collections.abc import Callable, Mapping
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


def plain(checkpoint: Checkpoint, chosen: Callable[[str, MatrixLayout], bool] | None = None) -> Checkpoint:
    """The same model, its pivoted matrices (or the `chosen` modules) made plain when they are read; float32.

    The matrices of one layer are in memory at a time.
    """
    wanted = chosen or (lambda _, layout: layout.pivot)
    remade = {module: layout for module, layout in checkpoint.layout.items() if wanted(module, layout)}
    if not remade:
        return checkpoint
    layouts = {**checkpoint.layout, **{module: plain_layout(layout) for module, layout in remade.items()}}
    depth = checkpoint.architecture.layer.count(".") + 1
    return replace(checkpoint, tensors=_Plain(checkpoint.tensors, remade, depth), layout=layouts)


class _Plain:
    """Tensors under the names of the plain layouts; `depth`: of a layer's name, in parts."""

    def __init__(self, tensors: Tensors, remade: Mapping[str, MatrixLayout], depth: int) -> None:
        self._tensors, self._remade, self._depth = tensors, remade, depth
        self._layer: tuple[str, ...] = ()
        self._kept: dict[str, dict[str, torch.Tensor]] = {}  # of that layer

    def names(self) -> list[str]:
        """Each matrix's parts stand where its first part stood."""
        found: dict[str, None] = {}
        for name in self._tensors.names():
            module, _, part = name.rpartition(".")
            layout = self._remade.get(module)
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
        return torch.float32 if self._made(*name.rpartition(".")[::2]) else self._tensors.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A matrix's parts belong together (the basis of one is that of the other), so they are made once."""
        module, _, part = name.rpartition(".")
        if not self._made(module, part):
            return self._tensors.tensor(name)
        layer = tuple(module.split(".")[: self._depth])
        if layer != self._layer:
            self._layer, self._kept = layer, {}
        if module not in self._kept:
            layout = self._remade[module]
            stored = {part: self._tensors.tensor(f"{module}.{part}") for part in layout.shapes}
            self._kept[module] = plain_parts(layout, stored)
        return self._kept[module][part]

    def _made(self, module: str, part: str) -> MatrixLayout | None:
        """The plain layout that a part is of, None for what is as it was."""
        layout = self._remade.get(module)
        made = plain_layout(layout) if layout else None
        return made if made and part in made.shapes else None
