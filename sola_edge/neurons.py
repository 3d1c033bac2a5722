"""Dropping and sorting the neurons of an FFN: optimal brain surgeon in closed form. Pure functions, in float64.

Zeroing column w_j of down costs w_jᵀ G w_j / [S⁻¹]_jj when the other columns take over what it contributed (Hassibi &
Stork 1993, with the metric of factorize.py); half of that is the predicted rise of the loss. After each removal S⁻¹ and
Wᵀ G W are updated, so the next choice sees the refitted columns.
"""

from dataclasses import dataclass

import torch

from sola_edge.factorize import Metric, cholesky

BLOCK = 64  # removals between two updates of the whole matrices: exact, but a matrix product instead of many outer ones
RIDGE = 1e-6  # of each neuron's own S_jj: keeps the inverse defined where neurons never fire or tokens are few


@dataclass(frozen=True)
class NeuronOrder:
    """order: (ffn,) int64, the neuron that is dropped last first. loss: (ffn + 1,) cost of keeping order[:k], k = 0 … ffn."""

    order: torch.Tensor
    loss: torch.Tensor


def ridged(s: torch.Tensor) -> torch.Tensor:
    """S with `RIDGE` of its own diagonal (and a trace of the mean) added to it, float64."""
    found = s.double().clone()
    diagonal = found.diagonal()
    diagonal.add_(RIDGE * diagonal + RIDGE**2 * diagonal.mean())
    return found


def neuron_order(down: torch.Tensor, metric: Metric) -> NeuronOrder:
    """The order in which neurons are dropped, and what that costs. down (hidden, ffn), metric of down."""
    down = down.double()
    ffn = down.shape[1]
    inverse = torch.cholesky_inverse(cholesky(ridged(metric.s)))
    products = down.T @ (down if metric.g is None else metric.g @ down)
    left = torch.arange(ffn)
    removed: list[int] = []
    costs: list[float] = []
    while len(left):
        found, paid = _remove_block(inverse, products, min(BLOCK, len(left)))
        removed += left[found].tolist()
        costs += paid
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[found] = False
        left, at = left[stays], stays.nonzero().flatten().to(down.device)
        inverse = inverse[at[:, None], at]
        products = products[at[:, None], at]
    order = torch.tensor(removed[::-1])
    loss = torch.cat([torch.tensor(costs, dtype=torch.float64).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return NeuronOrder(order, loss)


def _remove_block(inverse: torch.Tensor, products: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Remove `count` neurons; `inverse` (S⁻¹) and `products` (M = Wᵀ G W) are brought up to date at the end, in place.

    With a = S⁻¹_:j / S⁻¹_jj and m = M_:j, removing j makes S⁻¹ ← S⁻¹ - a aᵀ S⁻¹_jj and M ← M - a mᵀ - m aᵀ + M_jj a aᵀ.
    """
    ffn = len(inverse)
    ratios, columns = inverse.new_zeros(count, ffn), inverse.new_zeros(count, ffn)  # one row for each removal
    pivots, own = inverse.new_zeros(count), inverse.new_zeros(count)
    inverse_diagonal, product_diagonal = inverse.diagonal().clone(), products.diagonal().clone()
    gone = torch.zeros(ffn, dtype=torch.bool, device=inverse.device)
    removed, costs = [], []
    for step in range(count):
        scores = (product_diagonal / inverse_diagonal).masked_fill_(gone, torch.inf)
        j = int(scores.argmin())
        removed.append(j)
        costs.append(max(float(scores[j]), 0.0))
        a, c = ratios[:step], columns[:step]
        at_j = a[:, j]
        column = inverse[j] - (pivots[:step] * at_j) @ a
        product = products[j] + (own[:step] * at_j - c[:, j]) @ a - at_j @ c
        pivots[step], own[step] = column[j], product[j]
        ratio = column / column[j]
        ratios[step], columns[step] = ratio, product
        inverse_diagonal -= ratio.square() * column[j]
        product_diagonal += ratio * (ratio * product[j] - 2 * product)
        gone[j] = True
    inverse.addmm_((ratios * pivots[:, None]).T, ratios, alpha=-1)
    half = 0.5 * own[:, None] * ratios - columns
    products.addmm_(ratios.T, half).addmm_(half.T, ratios)
    return removed, costs


def refit(down: torch.Tensor, s: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept columns of down after they took over what the others contributed: W_K + W_D S_DK S_KK⁻¹. (hidden, kept)."""
    down = down.double()
    dropped = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    dropped[kept] = False
    gone = dropped.nonzero().flatten()
    if not len(gone):
        return down[:, kept]
    s = ridged(s)
    root = cholesky(s[kept][:, kept])
    return down[:, kept] + torch.cholesky_solve((down[:, gone] @ s[gone][:, kept]).T, root).T


@dataclass(frozen=True)
class PrimeSplit:
    """S of the marginal inputs given the prime ones, and how the prime columns take up a marginal change.

    marginal: S_mm - S_mp S_pp⁻¹ S_pm. transfer: S_mp S_pp⁻¹, (marginal, prime).
    """

    marginal: torch.Tensor
    transfer: torch.Tensor


def prime_split(s: torch.Tensor, prime: int) -> PrimeSplit:
    """Split the Gram matrix of down's inputs after its first `prime`."""
    s = ridged(s)
    if not prime:
        return PrimeSplit(s, s.new_zeros(len(s), 0))
    root = cholesky(s[:prime, :prime])
    transfer = torch.cholesky_solve(s[:prime, prime:], root).T
    return PrimeSplit(s[prime:, prime:] - transfer @ s[:prime, prime:], transfer)
