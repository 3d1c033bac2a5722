"""(W, Gram, rank) → factors. Pure functions, in float64.

For inputs X with Gram matrix S = X Xᵀ, the rank-r matrix that minimises ‖(W − Ŵ) X‖_F is Ŵ = U_r U_rᵀ W with U_r the top r
eigenvectors of W S Wᵀ (method.md §3 writes the same subspace as the SVD of W L, S = L Lᵀ, and then inverts L). The inverse
is never needed: B = U_r, A = U_rᵀ W. Where W has more rows than columns, the eigenvectors come from the smaller side:
Lᵀ Wᵀ W L = V Σ² Vᵀ, U = W L V Σ⁻¹.
"""

from dataclasses import dataclass

import torch

JITTER = 1e-10  # of S's mean diagonal: keeps the Cholesky factor of a singular Gram matrix defined


@dataclass(frozen=True)
class Basis:
    """Output directions of one matrix, most energetic first.

    vectors: (n_out, k) orthonormal, k = min(n_out, n_in). energy: (k,) σ², the energy of W X along each of them.
    """

    vectors: torch.Tensor
    energy: torch.Tensor


def output_basis(weight: torch.Tensor, gram: torch.Tensor) -> Basis:
    """Eigenvectors of W S Wᵀ from the smaller side. weight (n_out, n_in), gram (n_in, n_in); float64 inside.

    Source: method.md §3; recipe.md, "with G = I the second form needs no inverse".
    """
    weight, gram = weight.double(), gram.double()
    n_out, n_in = weight.shape
    if n_out <= n_in:
        energy, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
        return Basis(vectors.flip(1), energy.flip(0).clamp_min(0))
    whitened = weight @ _cholesky(gram)
    energy, right = torch.linalg.eigh(whitened.T @ whitened)
    # The columns of W L V are orthogonal already; QR only divides by their lengths, safely where those vanish.
    vectors, _ = torch.linalg.qr(whitened @ right.flip(1))
    return Basis(vectors, energy.flip(0).clamp_min(0))


def _cholesky(gram: torch.Tensor) -> torch.Tensor:
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    jitter = JITTER
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + jitter * scale * eye)
        if not failed:
            return factor
        jitter *= 10


def factors(weight: torch.Tensor, vectors: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (n_out, rank) and A (rank, n_in) in float64 with B A = U_r U_rᵀ W; `vectors` as in `Basis`."""
    top = vectors[:, :rank].double()
    return top, top.T @ weight.double()


def retained_energy(energy: torch.Tensor) -> torch.Tensor:
    """e(r) = Σ_{i≤r} σ_i² / Σ σ_i² for r = 0 … k (method.md §4). energy (k,) → (k + 1,); all ones for a zero matrix."""
    total = energy.sum()
    if total <= 0:
        return torch.ones(len(energy) + 1, dtype=energy.dtype)
    return torch.cat([torch.zeros(1, dtype=energy.dtype), energy.cumsum(0) / total])
