"""Hybrid layers in PyTorch: the reference that every export is judged by.

    split "out" (gate, up, q, k, v, o):         split "in" (down):

        x ──┬── P ──────────┐                       x[:p] ── P ───────┐
            │               ├─ concat ── y                            ├─ add ── y
            └── A ── B ─────┘                       x[p:] ── A ── B ──┘

    with pivots, A ── B becomes:   ── A ──┬────────┐
                                          │        ├─ concat ── (gather)
                                          └── B ───┘

A hybrid FFN is the architecture's own FFN with such layers in place of its three matrices: prime neurons come first in
all of them, so down's split matches gate's and up's (method.md §6).
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from sola_edge.config import MatrixLayout


class HybridLinear(nn.Module):
    """y = W x + bias with W stored as `layout` says (rank > 0); parameters `prime`, `A`, `B`, `bias` (or None), buffer
    `order`.
    """

    prime: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    order: torch.Tensor

    def __init__(
        self,
        layout: MatrixLayout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.n_in, layout.n_out
        for name, shape in layout.shapes.items():
            if name == "order":
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
            else:
                empty = torch.empty(shape, dtype=dtype, device=device)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        shift = torch.empty(layout.n_out, dtype=dtype, device=device) if bias else None
        self.bias = None if shift is None else nn.Parameter(shift, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n_in) → (…, n_out)."""
        prime = self.layout.prime
        if prime == 0:
            y = self._low_rank(x)
        elif self.layout.split == "out":
            y = torch.cat([F.linear(x, self.prime), self._low_rank(x)], dim=-1)
        else:
            y = F.linear(x[..., :prime], self.prime) + self._low_rank(x[..., prime:])
        return y if self.bias is None else y + self.bias

    def _low_rank(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, self.A)
        outer = F.linear(inner, self.B)
        if self.layout.pivot:
            outer = torch.cat([inner, outer], dim=-1)
        return outer.index_select(-1, self.order) if self.layout.gather else outer

    def extra_repr(self) -> str:
        return str(self.layout)


def replace_linears(model: nn.Module, layouts: dict[str, MatrixLayout]) -> None:
    """Put an empty HybridLinear, or an nn.Linear of another size (rank 0), in the place of each named nn.Linear.

    It is where that one is: on `meta` while transformers loads, so that no weight is in memory before it is read.
    """
    for module, layout in layouts.items():
        parent_name, _, name = module.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = getattr(parent, name)
        setattr(parent, name, empty_linear(layout, old.bias is not None, old.weight.dtype, old.weight.device))


def empty_linear(
    layout: MatrixLayout, dense_bias: bool, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """The module that computes a matrix stored so; `dense_bias`: whether the dense model's matrix has a bias."""
    bias = dense_bias or layout.bias
    if layout.rank == 0:
        place = device or torch.empty(0).device  # that of the context, as for factors
        made = nn.utils.skip_init(nn.Linear, layout.n_in, layout.n_out, bias=bias, dtype=dtype, device=place)
        return made.requires_grad_(False)
    return HybridLinear(layout, bias, dtype, device)


def recompose(layout: MatrixLayout, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense W (n_out, n_in), float32, that stored parts (by the names of `MatrixLayout.shapes`) stand for."""
    if layout.rank == 0:
        return parts["weight"].float()
    a, b = parts["A"].float(), parts["B"].float()
    product = b @ a
    if layout.pivot:
        product = torch.cat([a, product])
    if layout.gather:
        product = product[parts["order"].long()]
    if not layout.prime:
        return product
    return torch.cat([parts["prime"].float(), product], dim=0 if layout.split == "out" else 1)


class FusedLinear(nn.Module):
    """A fused matrix as one module for each of its components, rows one below the other: y = concat(child(x), …)."""

    def __init__(self, linear: nn.Linear, rows: Mapping[str, int]) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias is not None
        for name, count in rows.items():
            child = nn.Linear(linear.in_features, count, bias=bias, device=weight.device, dtype=weight.dtype)
            self.add_module(name, child.requires_grad_(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n_in) → (…, sum of the children's n_out)."""
        return torch.cat([child(x) for child in self.children()], dim=-1)


def unfuse_linears(root: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> None:
    """Put an empty FusedLinear in the place of each named nn.Linear; `fused`: rows of each component by module name."""
    for module, rows in fused.items():
        parent_name, _, name = module.rpartition(".")
        parent = root.get_submodule(parent_name)
        setattr(parent, name, FusedLinear(getattr(parent, name), rows))
