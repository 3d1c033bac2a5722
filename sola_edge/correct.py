"""Fitting a matrix to the inputs that the compressed model really gives it, in closed form.

    W* = (α T + (1 - α) W₀ Ŝ + μ W₀)(Ŝ + μ I)⁻¹,   T = E[w y x̂ᵀ],   Ŝ = E[w x̂ x̂ᵀ]

y = W x (+ what the residual stream lacks) is the original output, W₀ the matrix before the correction, μ relative to Ŝ's
mean diagonal. With T = W E[w x x̂ᵀ] no output needs to be kept. Source: recipe of the project's experiments
(docs/log.md).
"""

import torch

from sola_edge.view import Correction

MIXING = 0.5  # α: all of the correction overfits, none leaves the error of earlier layers
RIDGE = 1e-2  # μ


def corrected(start: torch.Tensor, original: torch.Tensor, correction: Correction | None) -> torch.Tensor:
    """W* (n_out, n̂) for W₀ = `start` (n_out, n̂) and W = `original` (n_out, n); `start` itself without a correction."""
    if correction is None:
        return start
    s = correction.s
    target = original @ correction.cross
    if correction.drift is not None:
        target = target + correction.drift
    mu = RIDGE * s.diagonal().mean()
    right = MIXING * target + (1 - MIXING) * start @ s + mu * start
    root = torch.linalg.cholesky(s + mu * torch.eye(len(s), dtype=s.dtype, device=s.device))
    return torch.cholesky_solve(right.T, root).T
