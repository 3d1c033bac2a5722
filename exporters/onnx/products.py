"""x Wᵀ of one stored matrix: with W in the graph's own type, or in blocks of small integers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import onnx_ir as ir
import torch

from exporters.onnx.blocks import Blocks, quantized
from exporters.onnx.graph import BYTES, MICROSOFT, GraphBuilder, hidden
from sola_edge.checkpoint import Checkpoint


@dataclass(frozen=True)
class Matrix:
    """W (n_out, n_in) by the name of its tensor; `load` reads it."""

    name: str
    n_out: int
    n_in: int
    load: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> "Matrix":
        """A tensor of a checkpoint."""
        n_out, n_in = checkpoint.shape(name)
        return cls(name, n_out, n_in, partial(checkpoint.tensor, name))


class Products(Protocol):
    """Makes the nodes of x Wᵀ, named by a module."""

    def __call__(self, module: str, x: ir.Value, matrix: Matrix) -> ir.Value: ...


class WholeProducts:
    """MatMul; the initializer is Wᵀ (n_in, n_out), as MatMul wants it."""

    def __init__(self, graph: GraphBuilder) -> None:
        self.graph = graph

    def __call__(self, module: str, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x Wᵀ."""
        shape = (matrix.n_in, matrix.n_out)
        weight = self.graph.weight(matrix.name, shape, lambda: matrix.load().T)
        return self.graph.op("MatMul", [x, weight], module, hidden(matrix.n_out))


class BlockProducts:
    """MatMulNBits; W's blocks are stored as `W.values`, `W.scales` and, unless symmetric, `W.zeros`."""

    def __init__(self, graph: GraphBuilder, blocks: Blocks) -> None:
        self.graph = graph
        self.blocks = blocks
        self._last: tuple[str, Any] = ("", None)

    def __call__(self, module: str, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x Wᵀ."""
        return self.graph.op(
            "MatMulNBits",
            [x, *self.stored(matrix).values()],
            module,
            hidden(matrix.n_out),
            domain=MICROSOFT,
            K=matrix.n_in,
            N=matrix.n_out,
            bits=self.blocks.bits,
            block_size=self.blocks.size,
            accuracy_level=self.blocks.accuracy_level,
        )

    def stored(self, matrix: Matrix) -> dict[str, ir.Value]:
        """Initializers `values`, `scales` and, unless symmetric, `zeros`."""
        return {
            part: self.graph.weight(
                f"{matrix.name}.{part}", shape, partial(self._part, matrix, part), None if part == "scales" else BYTES
            )
            for part, shape in self.blocks.shapes(matrix.n_out, matrix.n_in).items()
        }

    def _part(self, matrix: Matrix, part: str) -> torch.Tensor:
        """The parts of a matrix are written one after the other: the last matrix that was quantized is kept for that."""
        if self._last[0] != matrix.name:
            self._last = (matrix.name, quantized(matrix.load(), self.blocks))
        return self._last[1].part(part)
