"""Budgets are met, ranks are legal, and the greedy order is the published one."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sola_edge import allocation
from sola_edge.allocation import MatrixSpectrum, greedy_ranks, most_removable, uniform_ranks
from sola_edge.config import MatrixLayout, alignment_for
from sola_edge.errors import UserError
from sola_edge.planning import check_reachable, make_plan


def spectrum(
    module: str, component: str, n_out: int, n_in: int, *, decay: float, prime: int = 0, align: int = 8
) -> MatrixSpectrum:
    split = "in" if component == "down" else "out"
    rank = min(n_out - (prime if split == "out" else 0), n_in - (prime if split == "in" else 0))
    energy = np.exp(-decay * np.arange(rank))
    return MatrixSpectrum(
        module, component, n_out, n_in, prime, split, align, np.concatenate([[0], energy.cumsum() / energy.sum()])
    )


def model(layers: int, hidden: int = 128, ffn: int = 384, align: int = 8) -> list[MatrixSpectrum]:
    rows = []
    for i in range(layers):
        decay = 0.02 + 0.01 * i
        rows.append(spectrum(f"{i}.q", "q", hidden, hidden, decay=decay, align=align))
        for name, shape in {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}.items():
            rows.append(spectrum(f"{i}.{name}", name, *shape, decay=decay, prime=64, align=align))
    return rows


def total(rows: list[MatrixSpectrum]) -> int:
    return sum(row.dense_parameters for row in rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 8), st.floats(0.02, 0.75))
def test_budget_is_met_with_legal_ranks(layers: int, share: float) -> None:
    rows = model(layers)
    budget = int(share * total(rows))
    ranks = greedy_ranks(rows, budget)
    removed = sum(row.removed(rank) for row, rank in zip(rows, ranks, strict=True))
    assert abs(removed - budget) <= max(0.005 * budget, 8 * 512)  # half a per cent, or a step of the smallest matrix
    for row, rank in zip(rows, ranks, strict=True):
        assert rank == 0 or (rank % row.align == 0 and row.removed(rank) > 0)


def test_ranks_are_one_per_component_but_for_the_remainder() -> None:
    rows = model(8)
    ranks = greedy_ranks(rows, int(0.3 * total(rows)))
    for component in ("q", "gate", "up", "down"):
        found = {rank for row, rank in zip(rows, ranks, strict=True) if row.component == component}
        assert max(found) - min(found) <= 16


def test_the_matrix_that_loses_least_is_cut_first() -> None:
    steep = spectrum("steep", "q", 128, 128, decay=1.0)
    flat = spectrum("flat", "k", 128, 128, decay=0.001)
    ranks = greedy_ranks([steep, flat], int(0.4 * 128 * 128))
    assert ranks[0] < 64
    assert ranks[1] == 0  # its energy is spread evenly: it stays dense


def test_a_floor_that_cannot_be_kept_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a steep spectrum (q) does not go down to it before the flat ones may go below; a lower rate keeps it."""
    rows = [spectrum(name, name, 128, 128, decay=decay) for name, decay in (("q", 0.2), ("k", 0.01), ("o", 0.02))]
    kept = allocation._descend(rows, int(0.25 * total(rows)), 0.9)
    assert kept is not None and all(row.energy[rank + row.align] >= 0.9 for row, rank in zip(rows, kept, strict=True))
    budget = int(0.5 * total(rows))
    assert allocation._descend(rows, budget, 0.9) is None
    found = greedy_ranks(rows, budget)
    monkeypatch.setattr(allocation, "FLOOR", 0.0)
    assert found == greedy_ranks(rows, budget)


def test_rank_that_saves_nothing_stays_dense() -> None:
    row = spectrum("q", "q", 64, 64, decay=0.1)
    assert row.removed(32) == 0
    assert row.layout(32) is None
    assert row.removed(24) == 64 * 64 - 24 * 128


def test_hand_worked_layout() -> None:
    gate = MatrixLayout(n_out=100, n_in=40, prime=16, rank=8, split="out")
    assert gate.shapes == {"prime": (16, 40), "A": (8, 40), "B": (84, 8)}
    assert gate.parameters == 16 * 40 + 8 * 40 + 84 * 8
    down = MatrixLayout(n_out=40, n_in=100, prime=16, rank=8, split="in")
    assert down.shapes == {"prime": (40, 16), "A": (8, 84), "B": (40, 8)}
    with pytest.raises(ValueError, match="impossible"):
        MatrixLayout(4, 4, 4, 1)


@pytest.mark.parametrize(("side", "align"), [(4096, 256), (1024, 256), (576, 32), (192, 32), (64, 8)])
def test_automatic_alignment(side: int, align: int) -> None:
    assert alignment_for(side, None) == align
    assert alignment_for(side, 16) == 16


def test_unreachable_rate_is_refused_with_the_limit() -> None:
    rows = model(5)
    dense = total(rows)
    with pytest.raises(UserError, match=f"at most {most_removable(rows) / dense:.3f}"):
        check_reachable(0.99, most_removable(rows), dense, "x")
    check_reachable(0.1, most_removable(rows), dense, "x")


def test_coarse_ranks_are_refused_with_the_nearest_rate() -> None:
    rows = model(1, align=64)
    removed = sum(row.removed(rank) for row, rank in zip(rows, greedy_ranks(rows, total(rows) // 10), strict=True))
    with pytest.raises(UserError, match="smaller --align than 64"):
        make_plan({}, removed, 0.1, total(rows), 64)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 0.6))
@example(0.20048233551533023)  # no two matrices moved at once come within the tolerance
def test_ranks_remove_what_is_asked(rate: float) -> None:
    rows = model(6)
    for allocate in (greedy_ranks, uniform_ranks):
        ranks = allocate(rows, round(rate * total(rows)))
        removed = sum(row.removed(rank) for row, rank in zip(rows, ranks, strict=True))
        layouts = {row.module: layout for row, rank in zip(rows, ranks, strict=True) if (layout := row.layout(rank))}
        plan = make_plan(layouts, removed, rate, total(rows), 8)
        whole = sum(row.dense_parameters for row in rows if row.module in layouts)
        assert plan.parameters_removed == whole - sum(layout.parameters for layout in layouts.values())
        assert plan.rate == pytest.approx(rate, rel=0.005)
