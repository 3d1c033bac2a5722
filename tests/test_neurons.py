"""Optimal brain surgeon on hand-worked numbers and against the naive form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sola_edge.factorize import Metric, cost
from sola_edge.neurons import neuron_order, prime_split, refit, ridged


def problem(hidden: int, ffn: int, seed: int) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, g = normal(ffn, 4 * ffn), normal(hidden, 2 * hidden)
    return normal(hidden, ffn), Metric(h @ h.T / h.shape[1], g @ g.T / g.shape[1])


def test_hand_worked() -> None:
    """Two neurons that always fire alike: dropping one costs nothing, the other's column takes both."""
    s = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    down = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64)
    found = neuron_order(down, Metric(s, torch.eye(1, dtype=torch.float64)))
    assert int(found.order[0]) in (0, 1)  # the pair carries (1 + 2)² = 9, the third neuron 1² · 4
    assert found.loss.tolist() == pytest.approx([13, 4, 0, 0], abs=1e-4)
    assert refit(down, s, found.order[:1]).item() == pytest.approx(3, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(2, 80), st.integers(0, 1000))
def test_the_loss_is_what_the_refitted_matrix_costs(hidden: int, ffn: int, seed: int) -> None:
    down, metric = problem(hidden, ffn, seed)
    found = neuron_order(down, metric)
    assert sorted(found.order.tolist()) == list(range(ffn))
    assert found.loss[ffn] == 0
    assert (found.loss.diff() <= 1e-9).all()
    exact = Metric(ridged(metric.s), metric.g)
    total = cost(down, exact)
    for kept in {1, ffn // 2, ffn - 1}:
        change = -down.clone()
        change[:, found.order[:kept]] += refit(down, metric.s, found.order[:kept])
        assert float(found.loss[kept]) == pytest.approx(cost(change, exact), rel=1e-5, abs=1e-9 * total)


def test_each_removal_is_the_cheapest_after_refitting() -> None:
    down, metric = problem(5, 40, 3)
    found = neuron_order(down, metric)
    exact = Metric(ridged(metric.s), metric.g)
    kept = list(range(40))
    for removed in found.order.flip(0)[:20].tolist():
        costs = {}
        for j in kept:
            rest = torch.tensor([k for k in kept if k != j])
            change = -down.clone()
            change[:, rest] += refit(down, metric.s, rest)
            costs[j] = cost(change, exact)
        assert costs[removed] == pytest.approx(min(costs.values()), rel=1e-9)
        kept.remove(removed)


def test_prime_columns_take_up_what_they_can() -> None:
    """The Schur complement is the cost of a marginal change after the best answer of the prime columns."""
    down, metric = problem(4, 12, 1)
    split = prime_split(metric.s, 5)
    change = torch.randn(4, 7, dtype=torch.float64)
    answer = -change @ split.transfer
    whole = torch.cat([answer, change], dim=1)
    s = ridged(metric.s)
    assert cost(whole, Metric(s, metric.g)) == pytest.approx(cost(change, Metric(split.marginal, metric.g)))
    for other in (answer * 1.01, answer + 0.01):
        assert cost(torch.cat([other, change], dim=1), Metric(s, metric.g)) > cost(whole, Metric(s, metric.g))
    assert down.shape == (4, 12)
