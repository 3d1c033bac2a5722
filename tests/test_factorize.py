"""Formulas on hand-worked numbers, and the invariants of the decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sola_edge.factorize import (
    Metric,
    cost,
    damped,
    factors,
    orthonormal,
    pivoted,
    remaining,
    retained_energy,
    shrunk,
    spectrum,
)

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def random_problem(
    n_out: int, n_in: int, tokens: int, seed: int, gradients: bool = True
) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, g = normal(n_in, tokens), normal(n_out, 2 * n_out)
    return normal(n_out, n_in), Metric(x @ x.T, damped(g @ g.T) if gradients else None)


def test_hand_worked() -> None:
    # Identity weight: W S Wᵀ = S = diag(4, 9, 1), so the directions are the axes and the energies S's diagonal.
    weight, metric = torch.eye(3), Metric(torch.diag(torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64)))
    energy = spectrum(weight, metric)
    assert energy.tolist() == pytest.approx([9, 4, 1])
    assert retained_energy(energy).tolist() == pytest.approx([0, 9 / 14, 13 / 14, 1])
    assert remaining(energy).tolist() == pytest.approx([14, 5, 1, 0])
    b, a = factors(weight, metric, 1)
    assert (b @ a).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_gradients_change_what_matters() -> None:
    # S = I, W = I: the direction with the largest gradient is kept, though all inputs are alike.
    g = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))
    metric = Metric(torch.eye(3, dtype=torch.float64), g)
    assert spectrum(torch.eye(3), metric).tolist() == pytest.approx([5, 3, 1])
    b, a = factors(torch.eye(3), metric, 1)
    assert (b @ a).flatten().tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0], abs=1e-8)
    assert cost(torch.eye(3), metric) == pytest.approx(9)


def test_zero_matrix_retains_everything() -> None:
    assert retained_energy(torch.zeros(3)).tolist() == [1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_full_rank_is_exact(shape: tuple[int, int], tokens: int, gradients: bool, seed: int) -> None:
    """Also where the Gram matrix is singular (fewer tokens than inputs)."""
    weight, metric = random_problem(*shape, tokens, seed, gradients)
    b, a = factors(weight, metric, min(shape))
    assert b.shape == (shape[0], min(shape))
    assert cost(weight - b @ a, metric) <= 1e-6 * max(cost(weight, metric), 1e-9)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans(), st.integers(0, 1000), st.data())
def test_cost_is_the_energy_dropped_and_the_least_possible(
    shape: tuple[int, int], gradients: bool, seed: int, data: st.DataObject
) -> None:
    """tr(G ΔW S ΔWᵀ) = Σ_{i>r} σ_i², the Eckart-Young optimum for G^½ W S^½, whichever side is smaller."""
    weight, metric = random_problem(*shape, 30, seed, gradients)
    rank = data.draw(st.integers(1, min(shape)))
    b, a = factors(weight, metric, rank)
    left = torch.eye(shape[0], dtype=torch.float64) if metric.g is None else torch.linalg.cholesky(metric.g).T
    optimum = float(torch.linalg.svdvals(left @ weight @ torch.linalg.cholesky(metric.s))[rank:].square().sum())
    total = cost(weight, metric)
    assert cost(weight - b @ a, metric) == pytest.approx(optimum, rel=1e-5, abs=1e-8 * total)
    assert float(remaining(spectrum(weight, metric))[rank]) == pytest.approx(optimum, rel=1e-5, abs=1e-8 * total)


def test_equals_the_published_formula() -> None:
    """The authors' B = U Σ^½, A = Σ^½ Vᵀ L⁻¹ of the SVD of W L give the same product, without our needing L⁻¹."""
    for shape in ((10, 6), (6, 10)):
        weight, metric = random_problem(*shape, 50, 1, gradients=False)
        lower = torch.linalg.cholesky(metric.s)
        u, s, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
        published = (u[:, :3] * s[:3]) @ vt[:3] @ torch.linalg.inv(lower)
        b, a = factors(weight, metric, 3)
        assert torch.allclose(b @ a, published, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.integers(0, 1000), st.data())
def test_pivots_lose_nothing_and_stay_small(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    found = pivoted(b, a)
    assert sorted(found.order.tolist()) == list(range(rows))
    assert found.a.numel() + found.b.numel() == rank * (rows + columns - rank)
    product = torch.cat([found.a, found.b @ found.a])
    assert torch.allclose(product, (b @ a)[found.order], atol=1e-8)
    assert not found.b.numel() or found.b.abs().max() <= 1.05 + 1e-9


def test_shrinking_by_hand() -> None:
    """Two tokens (3, 3) and (1, -1): G = [[5, 4], [4, 5]], E‖g‖⁴ = 164, ‖G‖² = 82, so noise of 41 in 32: all of it."""
    g = torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    assert shrunk(g, torch.tensor([18.0, 2.0])).tolist() == [[5, 0], [0, 5]]
    many = shrunk(g, torch.tensor([18.0, 2.0]).repeat(500))  # 82 / 1000 of 32
    share = 0.082 / 32
    assert many.flatten().tolist() == pytest.approx([5, 4 * (1 - share), 4 * (1 - share), 5])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 30), st.integers(0, 1000))
def test_shrinking_keeps_the_diagonal_and_definiteness(size: int, tokens: int, seed: int) -> None:
    g = torch.randn(size, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = shrunk(g @ g.T / tokens, g.square().sum(0))
    torch.testing.assert_close(found.diagonal(), (g @ g.T / tokens).diagonal())
    assert torch.linalg.eigvalsh(found).min() > -1e-9


def test_shrinking_comes_nearer_to_the_truth() -> None:
    """To the second moment that gradients with heavy tails are drawn from."""
    generator = torch.Generator().manual_seed(0)
    root = torch.eye(20, dtype=torch.float64) + 0.05 * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    plain = better = 0.0
    for _ in range(20):
        size = torch.rand(40, generator=generator, dtype=torch.float64).reciprocal().sqrt().clamp_max(10)
        g = root @ torch.randn(20, 40, generator=generator, dtype=torch.float64) * size
        truth = root @ root.T * size.square().mean()
        plain += float((g @ g.T / 40 - truth).square().sum())
        better += float((shrunk(g @ g.T / 40, g.square().sum(0)) - truth).square().sum())
    assert better < 0.7 * plain


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50), st.data())
@settings(max_examples=40, deadline=None)
def test_an_orthonormal_basis_changes_no_product(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    random = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, generator=random, dtype=torch.float64)
    a = torch.randn(rank, columns, generator=random, dtype=torch.float64)
    new_b, new_a = orthonormal(b, a)
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-9 * float((b @ a).abs().max()))
    assert torch.allclose(new_a @ new_a.T, torch.eye(rank, dtype=torch.float64), atol=1e-9)
    carried = new_b.square().sum(0)
    assert (carried.diff() <= 1e-9 * carried.max()).all()


def test_an_orthonormal_basis_loses_least_to_rounding() -> None:
    """Less than whitened and than pivoted factors, and about twice what rounding the product itself would lose.

    Channels of the input differ by a factor of 100, in random order; blocks of 32 are rounded to 8 bits.
    """
    random = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, 2, 64, dtype=torch.float64)[torch.randperm(64, generator=random)]
    x = torch.randn(4096, 64, generator=random, dtype=torch.float64) * sizes
    metric = Metric(x.T @ x / len(x))
    b, a = factors(torch.randn(96, 64, generator=random), metric, 32)  # S is on the smaller side: A is whitened

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        blocks = matrix.reshape(len(matrix), -1, 32)
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step).round() * step).reshape(matrix.shape)

    def lost(b: torch.Tensor, a: torch.Tensor) -> float:
        return cost(rounded(b) @ rounded(a) - b @ a, metric)

    found = pivoted(b, a)
    pivots = torch.cat([torch.eye(32, dtype=torch.float64), found.b])
    least = lost(*orthonormal(b, a))
    assert least < 0.8 * lost(b, a)
    assert least < 0.5 * lost(pivots, found.a)
    assert least < 3 * cost(rounded(b @ a) - b @ a, metric)
