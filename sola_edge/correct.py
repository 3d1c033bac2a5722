"""Fitting a matrix to the inputs that the compressed model really gives it, in closed form, as far as new text confirms it.

    W* = W₀ + α R (Ŝ + μ I)⁻¹,   R = Σ w (y - W₀ x̂) x̂ᵀ,   Ŝ = Σ w x̂ x̂ᵀ

y = W x (+ what the residual stream lacks) is the original output, W₀ the matrix before the correction, μ relative to Ŝ's mean
diagonal. It is the least squares solution drawn back towards W₀: with 100,000 tokens and 1,536 inputs the solution itself
follows the noise of its own windows, layer after layer. α and μ are those that two halves of the windows confirm to each
other: a change D fitted on one lowers the other's error by 2 α tr(G D Rᵀ) - α² tr(G D Ŝ Dᵀ), G the metric of the outputs.
"""

from collections.abc import Sequence

import torch

from sola_edge.factorize import cholesky
from sola_edge.view import Correction, Moments

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # μ that are tried


def corrected(
    start: torch.Tensor, original: torch.Tensor, correction: Correction | None, g: torch.Tensor | None = None
) -> torch.Tensor:
    """W* (n_out, n̂) for W₀ = `start` (n_out, n̂) and W = `original` (n_out, n); `start` itself without a correction.

    g: G (n_out, n_out) of the matrix's outputs, None for the identity.
    """
    if correction is None:
        return start
    residuals = [half.residual(start, original) for half in correction.halves]
    tried = [(*_confirmed(correction.halves, residuals, ridge, g), ridge) for ridge in RIDGES]
    gain, share, ridge = max(tried)
    if gain <= 0:
        return start
    return start + share * _fit(correction.whole.s, residuals[0] + residuals[1], ridge)


def _confirmed(
    halves: Sequence[Moments], residuals: Sequence[torch.Tensor], ridge: float, g: torch.Tensor | None
) -> tuple[float, float]:
    """(what the halves' fits save of each other's error, the α for a fit to both); (0, 0) where they save nothing."""
    saved = noise = 0.0
    for one, other in ((0, 1), (1, 0)):
        change = _fit(halves[one].s, residuals[one], ridge)
        weighed = change if g is None else g @ change
        saved += float((weighed * residuals[other]).sum())
        noise += float(((weighed @ halves[other].s) * change).sum())
    if saved <= 0 or noise <= 0:
        return 0.0, 0.0
    alpha = min(saved / noise, 1.0)
    return alpha * saved, 2 * alpha / (1 + alpha)  # noise = signal (1 / α), and twice the tokens halve what exceeds it


def _fit(s: torch.Tensor, residual: torch.Tensor, ridge: float) -> torch.Tensor:
    """R (S + μ I)⁻¹."""
    mu = ridge * s.diagonal().mean()
    root = cholesky(s + mu * torch.eye(len(s), dtype=s.dtype, device=s.device))
    return torch.cholesky_solve(residual.T, root).T
