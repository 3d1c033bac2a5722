"""Formulas on hand-worked numbers, and the invariants of the decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sola_edge.factorize import factors, output_basis, retained_energy

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def random_problem(n_out: int, n_in: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    x = torch.randn(n_in, tokens, generator=generator, dtype=torch.float64)
    return weight, x


def test_hand_worked() -> None:
    # Identity weight: W S Wᵀ = S = diag(9, 4, 1), so the directions are the axes and the energies S's diagonal.
    weight, gram = torch.eye(3), torch.diag(torch.tensor([4.0, 9.0, 1.0]))
    basis = output_basis(weight, gram)
    assert basis.energy.tolist() == pytest.approx([9, 4, 1])
    assert basis.vectors.abs().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert retained_energy(basis.energy).tolist() == pytest.approx([0, 9 / 14, 13 / 14, 1])
    b, a = factors(weight, basis.vectors, 1)
    assert (b @ a).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_zero_matrix_retains_everything() -> None:
    assert retained_energy(torch.zeros(3)).tolist() == [1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 20), st.integers(0, 1000))
def test_full_rank_is_exact(shape: tuple[int, int], tokens: int, seed: int) -> None:
    """Also where the Gram matrix is singular (fewer tokens than inputs)."""
    weight, x = random_problem(*shape, tokens, seed)
    basis = output_basis(weight, x @ x.T)
    b, a = factors(weight, basis.vectors, min(shape))
    assert b.shape == (shape[0], min(shape))
    assert torch.allclose(b @ a, weight, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 1000), st.data())
def test_error_is_the_energy_dropped_and_the_least_possible(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    """‖(W − B A) X‖² = Σ_{i>r} σ_i², the Eckart-Young optimum for W X, whichever side is smaller."""
    weight, x = random_problem(*shape, 30, seed)
    rank = data.draw(st.integers(1, min(shape)))
    basis = output_basis(weight, x @ x.T)
    b, a = factors(weight, basis.vectors, rank)
    error = ((weight - b @ a) @ x).square().sum()
    optimum = torch.linalg.svdvals(weight @ x)[rank:].square().sum()
    assert error == pytest.approx(float(optimum), rel=1e-6, abs=1e-6)
    assert float(basis.energy[rank:].sum()) == pytest.approx(float(optimum), rel=1e-6, abs=1e-6)


def test_equals_the_published_formula() -> None:
    """The authors' B = U Σ^½, A = Σ^½ Vᵀ L⁻¹ of the SVD of W L give the same product, without our needing L⁻¹."""
    weight, x = random_problem(10, 6, 50, 1)
    gram = x @ x.T
    lower = torch.linalg.cholesky(gram)
    u, s, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
    published = (u[:, :3] * s[:3]) @ vt[:3] @ torch.linalg.inv(lower)
    b, a = factors(weight, output_basis(weight, gram).vectors, 3)
    assert torch.allclose(b @ a, published, atol=1e-9)
