"""Gram matrices summed up over tokens."""

import torch

GRAM_BLOCK = 512  # channels: only blocks on and above the diagonal are multiplied


class Gram:
    """Σ x xᵀ over tokens, the products in float32, the sum in float64, only the upper half multiplied."""

    def __init__(self) -> None:
        self._total = torch.empty(0)

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n)."""
        n = x.shape[1]
        if not len(self._total):
            self._total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        for row in range(0, n, GRAM_BLOCK):
            rows = slice(row, row + GRAM_BLOCK)
            self._total[rows, row:] += x[:, rows].T @ x[:, row:]

    def total(self) -> torch.Tensor:
        """Σ x xᵀ, (n, n) float64, symmetric; the sum itself, not a copy."""
        for row in range(0, len(self._total), GRAM_BLOCK):
            rows, below = slice(row, row + GRAM_BLOCK), slice(row + GRAM_BLOCK, None)
            square = self._total[rows, rows]
            square.copy_(square.triu() + square.triu(1).T)
            self._total[below, rows] = self._total[rows, below].T
        return self._total

    def mean(self, tokens: int) -> torch.Tensor:
        """(n, n) float32 on the CPU, symmetric."""
        total = self.total()
        found = torch.empty(total.shape, dtype=torch.float32)
        for row in range(0, len(total), GRAM_BLOCK):
            rows = slice(row, row + GRAM_BLOCK)
            found[rows] = (total[rows] / tokens).float()
        return found
