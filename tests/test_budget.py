"""The budget: hand-worked hulls, and the best choice that exhaustive search finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sola_edge.budget import Options, allocate, hull
from sola_edge.config import RATE_TOLERANCE, MatrixLayout
from sola_edge.forms import ffn_choices, matrix_choices

POINTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=6)


def options(points: list[tuple[int, int]], dense: int = 50) -> Options:
    """The points and the dense option: most parameters, no loss."""
    every = [(dense, 0), *points]
    return Options(np.array([p for p, _ in every]), np.array([float(loss) for _, loss in every]))


def test_hull_by_hand() -> None:
    group = options([(40, 1), (30, 9), (20, 4), (10, 20), (20, 6)])
    # (30, 9) lies above the line from (40, 1) to (20, 4), (20, 6) above (20, 4)
    assert [(int(group.parameters[i]), float(group.loss[i])) for i in hull(group.parameters, group.loss)] == [
        (50, 0), (40, 1), (20, 4), (10, 20)
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(POINTS)
def test_hull_is_convex_and_below_every_point(points: list[tuple[int, int]]) -> None:
    group = options(points)
    corners = hull(group.parameters, group.loss)
    x, y = group.parameters[corners], group.loss[corners]
    assert (np.diff(x) < 0).all() and (np.diff(y) > 0).all()
    slopes = np.diff(y) / -np.diff(x)
    assert (np.diff(slopes) >= -1e-12).all()
    below = np.interp(group.parameters, x[::-1], y[::-1])
    inside = group.parameters >= x.min()
    assert (below[inside] <= group.loss[inside] + 1e-9).all()


@settings(max_examples=80, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=4), st.floats(0.05, 0.9))
def test_budget_is_met_and_no_choice_of_its_size_is_much_better(
    groups: list[list[tuple[int, int]]], share: float
) -> None:
    """Never worse than the best exhaustive choice by more than the largest single loss (one step of one group)."""
    every = [options(points) for points in groups]
    most = sum(int(g.parameters.max() - g.parameters.min()) for g in every)
    budget = int(share * most)
    chosen = allocate(every, budget)
    saved = sum(50 - int(g.parameters[i]) for g, i in zip(every, chosen, strict=True))
    loss = sum(float(g.loss[i]) for g, i in zip(every, chosen, strict=True))
    assert saved >= budget - round(RATE_TOLERANCE * budget)
    best = min(
        sum(float(g.loss[i]) for g, i in zip(every, pick, strict=True))
        for pick in itertools.product(*(range(len(g.loss)) for g in every))
        if sum(50 - int(g.parameters[i]) for g, i in zip(every, pick, strict=True)) >= budget
    )
    assert loss <= best + max(float(g.loss.max()) for g in every)


def test_factors_are_only_offered_where_they_are_smaller() -> None:
    curve = np.linspace(8, 0, 9)
    found = matrix_choices("q", 8, 8, 0, 1, "plain", curve)
    assert [layout.rank for layout in found.layouts if layout] == [1, 2, 3]  # r (8 + 8) < 64
    assert found.options.loss[0] == 0
    assert found.options.loss.tolist()[1:] == [3.5, 3.0, 2.5]
    found = matrix_choices("gate", 8, 8, 0, 1, "pivoted", curve)
    assert [layout.rank for layout in found.layouts if layout] == list(range(1, 8))  # r (16 - r) < 64
    assert all(layout.pivot and not layout.gather for layout in found.layouts if layout)
    found = matrix_choices("o", 8, 8, 0, 1, "pivoted", curve)
    for layout in (layout for layout in found.layouts if layout):
        assert layout.pivot == layout.gather == (layout.rank**2 > 8)  # r² parameters saved against 8 indices
        assert layout.parameters == layout.rank * (16 - layout.rank * layout.pivot) + 8 * layout.gather


def test_ffn_options_cost_what_their_layouts_store() -> None:
    hidden, ffn = 16, 40
    dropping = np.linspace(10, 0, ffn + 1)
    curve = {c: np.linspace(3, 0, 17) for c in ("gate", "up", "down")}
    found = ffn_choices(hidden, ffn, 2, 8, 8, "auto", dropping, {(40, 0): curve, (24, 8): curve})
    assert found.forms[0].layouts == {}
    assert found.options.loss[0] == 0
    for form, parameters in zip(found.forms, found.options.parameters, strict=True):
        dense = {c: (hidden, form.kept) if c == "down" else (form.kept, hidden) for c in ("gate", "up", "down")}
        layouts = {c: form.layouts.get(c, MatrixLayout(*shape, 0, 0)) for c, shape in dense.items()}
        assert {c: (layout.n_out, layout.n_in) for c, layout in layouts.items()} == dense
        assert sum(layout.parameters for layout in layouts.values()) + 2 * form.kept == parameters
    assert {form.kept for form in found.forms} == {8, 16, 24, 32, 40}
    assert {form.prime for form in found.forms} == {0, 8}


def test_impossible_budget_takes_the_smallest() -> None:
    group = options([(10, 5), (20, 3)])
    assert group.parameters[allocate([group], 1000)[0]] == 10
    assert pytest.approx(5) == group.loss[allocate([group], 1000)[0]]
