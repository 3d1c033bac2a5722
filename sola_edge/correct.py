"""Fitting a matrix to the inputs that the compressed model really gives it, in closed form, as far as other text confirms it.

    W* = W₀ + α R (Ŝ + μ I)⁻¹,   R = Σ w (y - W₀ x̂) x̂ᵀ,   Ŝ = Σ w x̂ x̂ᵀ

y = W x (+ what the residual stream lacks) is the original output, W₀ the matrix before the correction, μ relative to Ŝ's mean
diagonal. It is the least squares solution drawn back towards W₀: with 100,000 tokens and 1,536 inputs the solution itself
follows the noise of its own windows, layer after layer. α and μ are those that two halves of the windows confirm to each
other: a change D fitted on one lowers the other's error by 2 α tr(G D Rᵀ) - α² tr(G D Ŝ Dᵀ), G the metric of the outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sola_edge.factorize import cholesky
from sola_edge.view import Correction

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # μ that are tried
ROUNDING = 1e-6  # of the output's energy: what a correction saves of less is rounding, as where x̂ is x


@dataclass(frozen=True)
class Problem:
    """W₀ = start (n_out, n̂), W = original (n_out, n), g = G (n_out, n_out) of the outputs or None for the identity."""

    start: torch.Tensor
    original: torch.Tensor
    g: torch.Tensor | None = None

    def weighed(self, matrix: torch.Tensor) -> torch.Tensor:
        """G matrix."""
        return matrix if self.g is None else self.g @ matrix


def corrected(problems: Sequence[Problem], correction: Correction | None) -> list[torch.Tensor]:
    """W* of matrices that share their inputs, (n_out, n̂) each; their W₀ without a correction or where none is confirmed."""
    found = [problem.start for problem in problems]
    if correction is None:
        return found
    residuals = [[half.residual(p.start, p.original) for half in correction.halves] for p in problems]
    chosen = _chosen(problems, residuals, correction)
    s = correction.s
    for ridge in RIDGES:
        those = [n for n, (_, _, own) in enumerate(chosen) if own == ridge]
        root = _root(s, ridge) if those else s
        for n in those:
            found[n] = found[n] + chosen[n][1] * _fit(root, residuals[n][0] + residuals[n][1])
    return found


def _chosen(
    problems: Sequence[Problem], residuals: Sequence[Sequence[torch.Tensor]], correction: Correction
) -> list[tuple[float, float, float]]:
    """(gain, α, μ) of each problem; μ is 0 where nothing is confirmed."""
    halves, s = correction.halves, correction.s
    least = [ROUNDING * float((p.weighed(p.start) @ s * p.start).sum().abs()) for p in problems]
    best = [(gain, 0.0, 0.0) for gain in least]
    weighed = [[p.weighed(residual) for residual in own] for p, own in zip(problems, residuals, strict=True)]
    for ridge in RIDGES:
        saved, noise = [0.0] * len(problems), [0.0] * len(problems)
        for one, other in ((0, 1), (1, 0)):
            root = _root(halves[one].s, ridge)
            for n, problem in enumerate(problems):
                change = _fit(root, residuals[n][one])
                saved[n] += float((change * weighed[n][other]).sum())
                noise[n] += float(((problem.weighed(change) @ halves[other].s) * change).sum())
        for n in range(len(problems)):
            best[n] = max(best[n], (*_confirmed(saved[n], noise[n]), ridge))
    return best


def _confirmed(saved: float, noise: float) -> tuple[float, float]:
    """(what the halves' fits save of each other's error, the α for a fit to both); (0, 0) where they save nothing."""
    if saved <= 0 or noise <= 0:
        return 0.0, 0.0
    alpha = min(saved / noise, 1.0)
    doubled = 2 * alpha / (1 + alpha)  # twice the tokens halve what noise exceeds saved by
    return alpha * (2 * saved - alpha * noise), doubled


def _root(s: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of S + μ I."""
    ridged = s.clone()
    ridged.diagonal().add_(ridge * s.diagonal().mean())
    return cholesky(ridged)


def _fit(root: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """R (S + μ I)⁻¹."""
    return torch.cholesky_solve(residual.T, root).T
