"""Hybrid layers in PyTorch: the reference that every export is judged by.

    split "out" (gate, up, q, k, o):            split "in" (down):

        x ──┬── P ──────────┐                       x[:p] ── P ───────┐
            │               ├─ concat ── y                            ├─ add ── y
            └── A ── B ─────┘                       x[p:] ── A ── B ──┘

A hybrid FFN is the architecture's own FFN with such layers in place of its three matrices: prime neurons come first in
all of them, so down's split matches gate's and up's (method.md §6).
"""

import torch
from torch import nn
from torch.nn import functional as F

from sola_edge.config import MatrixLayout


class HybridLinear(nn.Module):
    """y = W x + bias with W stored as `layout` says; parameters `prime` (absent when 0), `A`, `B`, `bias` (or None)."""

    prime: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, layout: MatrixLayout, bias: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.n_in, layout.n_out
        for name, shape in layout.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(layout.n_out, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n_in) → (…, n_out)."""
        prime = self.layout.prime
        if prime == 0:
            y = F.linear(F.linear(x, self.A), self.B)
        elif self.layout.split == "out":
            y = torch.cat([F.linear(x, self.prime), F.linear(F.linear(x, self.A), self.B)], dim=-1)
        else:
            y = F.linear(x[..., :prime], self.prime) + F.linear(F.linear(x[..., prime:], self.A), self.B)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return str(self.layout)


def replace_linears(model: nn.Module, layouts: dict[str, MatrixLayout]) -> None:
    """Put an empty HybridLinear in the place of each named nn.Linear (shapes as the layout says)."""
    for module, layout in layouts.items():
        parent_name, _, name = module.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = getattr(parent, name)
        hybrid = HybridLinear(layout, bias=old.bias is not None, dtype=old.weight.dtype)
        setattr(parent, name, hybrid)
