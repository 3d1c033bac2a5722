"""(W, statistics, rank) → factors. Pure functions, in float64.

One metric for all: a change ΔW of a matrix costs tr(G ΔW S ΔWᵀ), S = E[x xᵀ] of its inputs, G of the loss gradients at
its outputs (half of it is the rise of the mean NLL in nats that a second-order expansion with the Fisher information
predicts), or G = I without gradients. Whichever side of W is smaller is decomposed:

    n_in ≤ n_out:  S = L Lᵀ,  Lᵀ Wᵀ G W L = V Σ² Vᵀ,   Ŵ = (W L V_r)(V_rᵀ L⁻¹)
    else:          G = L Lᵀ,  Lᵀ W S Wᵀ L = U Σ² Uᵀ,   Ŵ = (L⁻ᵀ U_r)(U_rᵀ Lᵀ W)

Both give the Ŵ of rank r that costs least, Σ_{i>r} σ_i². With G = I it is the whitened SVD of SoLA and SVD-LLM (method.md
§3), and the second form has no inverse.
"""

from dataclasses import dataclass

import torch

from sola_edge.errors import NotFinite

JITTER = 1e-10  # of the mean diagonal: keeps the Cholesky factor of a singular Gram matrix defined
DAMPING = 1e-3  # of G's mean diagonal: directions without any gradient still cost something
SWAP_GAIN = 1.05  # pivots are exchanged while that makes the pivot block's volume grow by this factor
MAX_SWAPS = 200


@dataclass(frozen=True)
class Metric:
    """The cost of a matrix's change: S (n_in, n_in), G (n_out, n_out) or None for the identity. float64."""

    s: torch.Tensor
    g: torch.Tensor | None = None


def damped(g: torch.Tensor) -> torch.Tensor:
    """G plus `DAMPING` of its mean diagonal on the diagonal, float64."""
    found = g.double().clone()
    found.diagonal().add_(DAMPING * found.diagonal().mean())
    return found


def shrunk(g: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """G drawn towards its diagonal by as much of its off-diagonal part as is expected to be noise.

    squares (tokens,): ‖g‖² of the gradients that G is the mean of. The share is Σ Var(G_ij) / Σ_{i≠j} G_ij² (Schäfer &
    Strimmer 2005), with Σ Var(G_ij) = (E‖g‖⁴ - ‖G‖²) / n, which a few tokens with huge gradients make large. That sum is
    over all i, j; the diagonal's part of it, which would need E g_i⁴, is left in: it is small where many channels take part.
    """
    g, squares = g.double(), squares.double()
    diagonal = g.diagonal().clone()
    noise = (squares.square().mean() - g.square().sum()) / len(squares)
    signal = (g.square().sum() - diagonal.square().sum()).clamp_min(torch.finfo(g.dtype).tiny)
    found = g * (1 - (noise / signal).clamp(0, 1))
    found.diagonal().copy_(diagonal)
    return found


def cholesky(gram: torch.Tensor) -> torch.Tensor:
    """Lower factor L of S + ε I = L Lᵀ with the least ε of 1e-10, 1e-9, … mean diagonals that makes it definite.

    Raises NotFinite.
    """
    if not gram.isfinite().all():
        raise NotFinite("activations or weights are not finite: the checkpoint is damaged or overflows in its own type")
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    jitter = JITTER
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(jitter * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor
        jitter *= 10


def spectrum(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """σ² in descending order, (min(n_out, n_in),): what each further rank saves of tr(G W S Wᵀ)."""
    return torch.linalg.eigvalsh(_small_side(weight.double(), metric)[0]).flip(0).clamp_min(0)


def factors(weight: torch.Tensor, metric: Metric, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (n_out, rank), A (rank, n_in), float64: the product of that rank that costs least."""
    weight = weight.double()
    square, root, inner = _small_side(weight, metric)
    vectors = torch.linalg.eigh(square)[1].flip(1)[:, :rank]
    if inner and root is not None:
        b = weight @ (root @ vectors)
        return b, torch.linalg.solve_triangular(root.T, vectors, upper=True).T
    if root is None:
        return vectors, vectors.T @ weight
    return torch.linalg.solve_triangular(root.T, vectors, upper=True), (root @ vectors).T @ weight


def orthonormal(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product B A with orthonormal rows of A, by descending size of what they carry; float64.

    Any R gives the same product as (B R⁻¹)(R A), but not the same when both are rounded. An error E in A becomes B E, one F
    in B becomes F A: with orthonormal rows either is, in the Frobenius norm, about the error of rounding the product itself.
    As the metric makes them, the rows of A are whitened: channels that are large in x have the smallest entries, and lose
    their digits.
    """
    q, r = torch.linalg.qr(a.double().T)
    carried = b.double() @ r.T
    rotation = torch.linalg.eigh(carried.T @ carried)[1].flip(1)
    return carried @ rotation, (q @ rotation).T


def _small_side(weight: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The symmetric matrix whose eigenvalues are σ², the Cholesky factor it was made with, whether that is of S."""
    n_out, n_in = weight.shape
    if n_in < n_out or (n_in == n_out and metric.g is not None):
        root = cholesky(metric.s)
        right = weight @ root
        return right.T @ (right if metric.g is None else metric.g @ right), root, True
    if metric.g is None:
        return weight @ metric.s @ weight.T, None, False
    root = cholesky(metric.g)
    left = root.T @ weight
    return left @ metric.s @ left.T, root, False


def cost(change: torch.Tensor, metric: Metric) -> float:
    """tr(G ΔW S ΔWᵀ)."""
    right = change.double() @ metric.s
    left = change.double() if metric.g is None else metric.g @ change.double()
    return float((left * right).sum())


def retained_energy(energy: torch.Tensor) -> torch.Tensor:
    """e(r) = Σ_{i≤r} σ_i² / Σ σ_i² for r = 0 … k (method.md §4). energy (k,) → (k + 1,); all ones for a zero matrix."""
    total = energy.sum()
    if total <= 0:
        return torch.ones(len(energy) + 1, dtype=energy.dtype)
    return torch.cat([torch.zeros(1, dtype=energy.dtype), energy.cumsum(0) / total])


def remaining(energy: torch.Tensor) -> torch.Tensor:
    """Σ_{i>r} σ_i² for r = 0 … k. energy (k,) → (k + 1,)."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=energy.dtype)])


@dataclass(frozen=True)
class Pivoted:
    """A product L = B A of rank r in pivoted form: L[order] = concat(A, B A), A = r rows of L. B (rows - r, r)."""

    a: torch.Tensor
    b: torch.Tensor
    order: torch.Tensor  # (rows,) int64: the pivots first, the other rows after them, each in their own order


def pivoted(b: torch.Tensor, a: torch.Tensor) -> Pivoted:
    """The factors with r of L's own rows as A (PIFA, ICML 2025): lossless, r² fewer parameters.

    Rows are chosen by LU with partial pivoting, then exchanged while the block's volume grows (maxvol: Goreinov et al.
    2010), which bounds the entries of the new B and so what rounding it costs.
    """
    rank = b.shape[1]
    basis = torch.linalg.qr(b).Q
    permutation, lower, _ = torch.linalg.lu(basis)
    chosen = permutation.argmax(0)  # row i of the permuted basis was row chosen[i]
    solved = torch.linalg.solve_triangular(lower[:rank].T, lower[rank:].T, upper=True).T
    pivots, others = chosen[:rank].clone(), chosen[rank:].clone()
    for _ in range(MAX_SWAPS if len(others) else 0):
        largest = int(solved.abs().argmax())
        i, j = divmod(largest, rank)
        value = solved[i, j].clone()
        if value.abs() <= SWAP_GAIN:
            break
        row = solved[i].clone()
        row[j] -= 1
        column = solved[:, j].clone()
        column[i] += 1
        solved -= torch.outer(column, row) / value
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
    pivots, others = pivots.sort().values, others.sort().values
    square = b[pivots]
    new_b = torch.linalg.solve(square.T, b[others].T).T
    return Pivoted(square @ a, new_b, torch.cat([pivots, others]))
