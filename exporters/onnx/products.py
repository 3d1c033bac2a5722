"""x Wᵀ of one stored matrix: with W in the graph's own type, or in blocks of small integers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import onnx_ir as ir
import torch

from exporters.onnx.blocks import Blocks, Quantized, quantized
from exporters.onnx.gptq import calibrated
from exporters.onnx.grams import Grams
from exporters.onnx.graph import BYTES, MICROSOFT, GraphBuilder, check_finite, hidden
from sola_edge.checkpoint import Checkpoint


@dataclass(frozen=True)
class Matrix:
    """W (n_out, n_in): the tensors whose rows stand one below the other in it, and how it is read."""

    name: str
    n_out: int
    n_in: int
    load: Callable[[], torch.Tensor]
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> "Matrix":
        """A tensor of a checkpoint."""
        n_out, n_in = checkpoint.shape(name)
        return cls(name, n_out, n_in, partial(checkpoint.tensor, name), (name,))


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
        weight = self.graph.weight(matrix.name, shape, matrix.load, transposed=True)
        return self.graph.op("MatMul", [x, weight], module, hidden(matrix.n_out))


class BlockProducts:
    """MatMulNBits; W's blocks are stored as `W.values`, `W.scales` and, unless symmetric, `W.zeros`.

    grams: of the matrices' inputs, for gptq's rounding; None rounds to the nearest levels.
    """

    def __init__(self, graph: GraphBuilder, blocks: Blocks, grams: Grams | None = None) -> None:
        self.graph = graph
        self.blocks = blocks
        self.grams = grams
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
            self._last = (matrix.name, self._rounded(matrix))
        return self._last[1].part(part)

    def _rounded(self, matrix: Matrix) -> Quantized:
        """Tensors in one stack have the same input."""
        weight = matrix.load()
        check_finite(weight, matrix.name)  # else a NaN would become a number
        if self.grams is None:
            return quantized(weight, self.blocks)
        return calibrated(weight, self.blocks, self.grams.of(matrix.tensors[0]))
