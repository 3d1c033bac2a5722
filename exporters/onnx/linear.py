"""One matrix of the checkpoint, whole or factored, as matrix products.

An activation is a tuple of *pieces*: tensors that stand side by side along the channels. A whole matrix yields one piece,
a factored FFN matrix two (prime and marginal neurons). Pieces are joined or cut only where the next matrix needs it, so
gate, up and down of one layer that are factored alike become two parallel branches that never meet before their sum.
"""

import itertools
from functools import partial

import onnx_ir as ir
import torch

from exporters.onnx.graph import INDICES, GraphBuilder, hidden, width
from exporters.onnx.products import Matrix, Products
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import MatrixLayout

Pieces = tuple[ir.Value, ...]


class Linears:
    """Makes the nodes of a checkpoint's matrices in one graph."""

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, products: Products) -> None:
        self.graph = graph
        self.checkpoint = checkpoint
        self.products = products

    def __call__(self, module: str, x: Pieces) -> ir.Value:
        """W x + bias as one tensor."""
        return self.join(self.pieces(module, x), module)

    def pieces(self, module: str, x: Pieces) -> Pieces:
        """W x + bias, in the pieces in which the matrix is stored.

        whole:        x ── MatMul weight ── y

        split "out":  x ─┬─ MatMul prime ───────────── y[:p]
                         └─ low rank ───────────────── y[p:]

        split "in":   x[:p] ── MatMul prime ──────────┐
                      x[p:] ── low rank ───────────── Add ── y
        """
        layout = self.checkpoint.layout.get(module)
        if layout is None or layout.rank == 0:
            products: Pieces = (self._matmul(f"{module}.weight", self.join(x, module)),)
        elif not layout.prime:
            products = (self._low_rank(module, layout, self.join(x, module)),)
        elif layout.split == "out":
            whole = self.join(x, module)
            products = (self._matmul(f"{module}.prime", whole), self._low_rank(module, layout, whole))
        else:
            prime, marginal = self.cut(x, (layout.prime, layout.n_in - layout.prime), module)
            kept, rest = self._matmul(f"{module}.prime", prime), self._low_rank(module, layout, marginal)
            products = (self.graph.op("Add", [kept, rest], module, hidden(layout.n_out)),)
        return self._add_bias(module, products)

    def join(self, x: Pieces, module: str) -> ir.Value:
        """The pieces as one tensor, on the way into or out of a module."""
        if len(x) == 1:
            return x[0]
        return self.graph.op("Concat", list(x), module, hidden(sum(map(width, x))), axis=-1)

    def cut(self, x: Pieces, widths: tuple[int, ...], module: str) -> Pieces:
        """The same channels in pieces of these widths."""
        if tuple(map(width, x)) == widths:
            return x
        outputs = [(f"{module}/Split/output_{i}", self.graph.precision.onnx, hidden(n)) for i, n in enumerate(widths)]
        sizes = self.graph.constant(widths)
        return tuple(self.graph.op_outputs("Split", [self.join(x, module), sizes], module, outputs, axis=-1))

    def _low_rank(self, module: str, layout: MatrixLayout, x: ir.Value) -> ir.Value:
        """L x, of the layout's low-rank part L.

        plain:   x ── MatMul A ── MatMul B ── L x

        pivots:  x ── MatMul A ─┬──────────── Concat ── (Gather order) ── L x
                                └─ MatMul B ──┘
        """
        rows = hidden(layout.low_rank_shape[0])
        inner = self._matmul(f"{module}.A", x)
        outer = self._matmul(f"{module}.B", inner)
        if layout.pivot:
            outer = self.graph.op("Concat", [inner, outer], f"{module}.pivot", rows, axis=-1)
        if layout.gather:
            name = f"{module}.order"
            order = self.graph.weight(name, self.checkpoint.shape(name), partial(self.checkpoint.tensor, name), INDICES)
            outer = self.graph.op("Gather", [outer, order], module, rows, axis=-1)
        return outer

    def _matmul(self, name: str, x: ir.Value) -> ir.Value:
        """x Wᵀ for a stored W."""
        return self.products(name.removesuffix(".weight"), x, self._stored(name))

    def _stored(self, name: str) -> Matrix:
        n_out, n_in = self.checkpoint.shape(name)
        return Matrix(name, n_out, n_in, partial(self.checkpoint.tensor, name))

    def _add_bias(self, module: str, products: Pieces) -> Pieces:
        """Each piece plus its share of the bias, which is stored cut the same way."""
        name = self.checkpoint.bias_name(module)
        if name is None:
            return products
        ends = list(itertools.accumulate(map(width, products)))
        biased = []
        for i, (product, end) in enumerate(zip(products, ends, strict=True)):
            part = name if len(products) == 1 else f"{name}.{('prime', 'marginal')[i]}"
            load = partial(self._rows, name, end - width(product), end)
            bias = self.graph.weight(part, (width(product),), load)
            biased.append(self.graph.op("Add", [product, bias], part, hidden(width(product))))
        return tuple(biased)

    def _rows(self, name: str, start: int, end: int) -> torch.Tensor:
        return self.checkpoint.tensor(name)[start:end]
