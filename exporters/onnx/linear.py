"""One matrix of the checkpoint, whole or factored, as matrix products.

An activation is a tuple of *pieces*: tensors that stand side by side along the channels. A whole matrix yields one piece,
a factored FFN matrix two (prime and marginal neurons). Pieces are joined or cut only where the next matrix needs it, so
gate, up and down of one layer that are factored alike become two parallel branches that never meet before their sum.
"""

import itertools
import os
from collections.abc import Sequence
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
        if layout is None or not self._splits_input(module):
            return self.shared((module,), self.join(x, f"{module}/input"))[0]
        prime, marginal = self.cut(x, (layout.prime, layout.n_in - layout.prime), module)
        kept = self._product(f"{module}.prime", prime)
        rest = self._outer(module, layout, self._product(f"{module}.A", marginal))
        return self._add_bias(module, (self.graph.op("Add", [kept, rest], module, hidden(layout.n_out)),))

    def shared(self, modules: Sequence[str], x: ir.Value) -> list[Pieces]:
        """W x + bias of each of several matrices, in pieces; those that multiply x itself are stacked into one product.

        x ── MatMul [q; k's A; v] ── Split ─┬─ q
                                            ├─ MatMul k's B ── k
                                            └─ v
        """
        if any(map(self._splits_input, modules)):
            return [self.pieces(module, (x,)) for module in modules]
        inner = {module: self._inner_names(module) for module in modules}
        values = iter(self._stacked([name for names in inner.values() for name in names], x))
        found = []
        for module, names in inner.items():
            parts = [next(values) for _ in names]
            if self.factored(module):
                parts[-1] = self._outer(module, self.checkpoint.layout[module], parts[-1])
            found.append(self._add_bias(module, tuple(parts)))
        return found

    def packed(self, modules: Sequence[str], x: ir.Value) -> ir.Value | None:
        """W x + bias of several matrices side by side in one tensor; None where one of them is factored."""
        if any(map(self.factored, modules)):
            return None
        names = [f"{module}.weight" for module in modules]
        stack = self._stack(names)
        product = self.products(stack.name, x, stack)
        biases = [self.checkpoint.bias_name(module) for module in modules]
        if not any(biases):
            return product
        widths = [self.checkpoint.shape(name)[0] for name in names]
        load = partial(self._biases, list(zip(biases, widths, strict=True)))
        bias = self.graph.weight(f"{stack.name}.bias", (stack.n_out,), load)
        return self.graph.op("Add", [product, bias], f"{stack.name}.bias", hidden(stack.n_out))

    def factored(self, module: str) -> bool:
        """Whether the matrix is stored in factors."""
        layout = self.checkpoint.layout.get(module)
        return layout is not None and layout.rank > 0

    def _splits_input(self, module: str) -> bool:
        layout = self.checkpoint.layout.get(module)
        return layout is not None and layout.prime > 0 and layout.split == "in"

    def _biases(self, rows: Sequence[tuple[str | None, int]]) -> torch.Tensor:
        return torch.cat([self.checkpoint.tensor(name) if name else torch.zeros(width) for name, width in rows])

    def _inner_names(self, module: str) -> list[str]:
        """The tensors of a matrix, split on its outputs or not at all, that its input meets first."""
        if not self.factored(module):
            return [f"{module}.weight"]
        prime = self.checkpoint.layout[module].prime
        return [f"{module}.prime", f"{module}.A"] if prime else [f"{module}.A"]

    def _stacked(self, names: Sequence[str], x: ir.Value) -> Sequence[ir.Value]:
        if len(names) == 1:
            return [self._product(names[0], x)]
        stack = self._stack(names)
        widths = tuple(self.checkpoint.shape(name)[0] for name in names)
        return self.cut((self.products(stack.name, x, stack),), widths, stack.name)

    def _stack(self, names: Sequence[str]) -> Matrix:
        """Several tensors, one below the other, under a name such as `model.layers.3.mlp.gate_proj.A+up_proj.A`."""
        short = [name.removesuffix(".weight") for name in names]
        rows = sum(self.checkpoint.shape(name)[0] for name in names)
        tensors, n_in = tuple(names), self.checkpoint.shape(names[0])[1]
        return Matrix(stack_name(short), rows, n_in, partial(self._rows_of, tensors), tensors)

    def _rows_of(self, names: Sequence[str]) -> torch.Tensor:
        return torch.cat([self.checkpoint.tensor(name) for name in names])

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

    def _outer(self, module: str, layout: MatrixLayout, inner: ir.Value) -> ir.Value:
        """L x out of A x, of the layout's low-rank part L.

        plain:   A x ── MatMul B ── L x

        pivots:  A x ─┬──────────── Concat ── (Gather order) ── L x
                      └─ MatMul B ──┘
        """
        rows = hidden(layout.low_rank_shape[0])
        outer = self._product(f"{module}.B", inner)
        if layout.pivot:
            outer = self.graph.op("Concat", [inner, outer], f"{module}.pivot", rows, axis=-1)
        if layout.gather:
            name = f"{module}.order"
            order = self.graph.weight(name, self.checkpoint.shape(name), partial(self.checkpoint.tensor, name), INDICES)
            outer = self.graph.op("Gather", [outer, order], module, rows, axis=-1)
        return outer

    def _product(self, name: str, x: ir.Value) -> ir.Value:
        """x Wᵀ for a stored W."""
        return self.products(name.removesuffix(".weight"), x, Matrix.of(self.checkpoint, name))

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


def stack_name(names: Sequence[str]) -> str:
    """`a.b.c+d.e` of `a.b.c` and `a.b.d.e`: the parent that all share, then each one's own part."""
    parts = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([part[:-1] for part in parts]))
    return ".".join([*parts[0][:shared], "+".join(".".join(part[shared:]) for part in parts)])
