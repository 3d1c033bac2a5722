"""The forms a matrix or an FFN can take, with the parameters that each stores and the loss that it predicts.

A matrix is whole or a product of a rank on the grid, plain or pivoted. An FFN keeps K of its neurons, p of them prime,
and each of its three matrices is whole or has its marginal part as a product. Losses come from spectra that were computed
once; sizes are MatrixLayout's own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sola_edge.architecture import FFN
from sola_edge.budget import Options, hull
from sola_edge.config import FactorPolicy, MatrixLayout, Split

SPLIT: dict[str, Split] = {"down": "in"}  # the side that prime neurons are on; "out" for all others
GATHER_PAYS = 0.03  # auto: a gather is worth it where pivots save this share of the plain factors' parameters


@dataclass(frozen=True)
class FfnForm:
    """neurons kept, how many of them are prime, and the layout of each matrix that is not left as it was."""

    kept: int
    prime: int
    layouts: Mapping[str, MatrixLayout]


def layout_of(component: str, n_out: int, n_in: int, prime: int, rank: int, policy: FactorPolicy) -> MatrixLayout:
    """The layout of a product of that rank under the policy; `gate` is pivoted without a gather (its neurons are reordered)."""
    split = SPLIT.get(component, "out")
    plain = MatrixLayout(n_out, n_in, prime, rank, split)
    rows, columns = plain.low_rank_shape
    if policy == "plain" or rank >= rows:
        return plain
    gather = component != "gate"
    pivoted = MatrixLayout(n_out, n_in, prime, rank, split, pivot=True, gather=gather)
    saving = plain.parameters - pivoted.parameters
    if saving <= 0 or (policy == "auto" and gather and saving < GATHER_PAYS * rank * (rows + columns)):
        return plain
    return pivoted


def matrix_layouts(
    component: str, n_out: int, n_in: int, prime: int, align: int, policy: FactorPolicy
) -> dict[int, MatrixLayout]:
    """By rank on the grid, all layouts that store fewer parameters than the whole matrix."""
    split = SPLIT.get(component, "out")
    rows, columns = MatrixLayout(n_out, n_in, prime, 1, split).low_rank_shape
    found = {
        rank: layout_of(component, n_out, n_in, prime, rank, policy)
        for rank in range(align, min(rows, columns) + 1, align)
    }
    return {rank: layout for rank, layout in found.items() if layout.parameters < n_out * n_in}


@dataclass(frozen=True)
class MatrixChoices:
    """Layouts of one matrix with their losses; None is the whole matrix, at a loss of 0."""

    layouts: list[MatrixLayout | None]
    options: Options


def matrix_choices(
    component: str, n_out: int, n_in: int, prime: int, align: int, policy: FactorPolicy, remaining: np.ndarray
) -> MatrixChoices:
    """remaining: (k + 1,) the cost of rank r, as factorize.remaining gives it; the predicted loss is half of it."""
    layouts: list[MatrixLayout | None] = [None]
    parameters, loss = [n_out * n_in], [0.0]
    for rank, layout in matrix_layouts(component, n_out, n_in, prime, align, policy).items():
        layouts.append(layout)
        parameters.append(layout.parameters)
        loss.append(0.5 * float(remaining[rank]))
    return MatrixChoices(layouts, Options(np.array(parameters), np.array(loss)))


@dataclass(frozen=True)
class FfnChoices:
    """Forms of one FFN and their options; the first is the dense FFN."""

    forms: list[FfnForm]
    options: Options


def ffn_choices(
    hidden: int,
    ffn: int,
    biases: int,
    align: int,
    rank_align: int,
    policy: FactorPolicy,
    dropping: np.ndarray,
    spectra: Mapping[tuple[int, int], Mapping[str, np.ndarray]],
) -> FfnChoices:
    """biases: how many of gate and up have one. dropping: (ffn + 1,) the cost of keeping k neurons. spectra: by (kept,
    prime), by component, the cost of each rank.

    Every multiple of `align` can be kept whole; low-rank forms are those of `spectra`, whose three matrices are combined
    along their hulls.
    """
    forms: list[FfnForm] = []
    parameters: list[int] = []
    loss: list[float] = []
    for kept in [ffn, *range((ffn - 1) // align * align, 0, -align)]:
        forms.append(FfnForm(kept, 0, _whole(hidden, kept) if kept < ffn else {}))
        parameters.append(kept * (3 * hidden + biases))
        loss.append(0.5 * float(dropping[kept]))
    for (kept, prime), curves in spectra.items():
        for form, size, extra in _combinations(hidden, kept, prime, rank_align, policy, curves, ffn):
            forms.append(form)
            parameters.append(size + kept * biases)
            loss.append(0.5 * float(dropping[kept]) + extra)
    return FfnChoices(forms, Options(np.array(parameters), np.array(loss)))


def ffn_shape(component: str, hidden: int, kept: int) -> tuple[int, int]:
    """(n_out, n_in) of an FFN's matrix with that many neurons."""
    return (hidden, kept) if component == "down" else (kept, hidden)


def _whole(hidden: int, kept: int) -> dict[str, MatrixLayout]:
    return {c: MatrixLayout(*ffn_shape(c, hidden, kept), 0, 0, SPLIT.get(c, "out")) for c in FFN}


def _combinations(
    hidden: int,
    kept: int,
    prime: int,
    align: int,
    policy: FactorPolicy,
    curves: Mapping[str, np.ndarray],
    ffn: int,
) -> Iterator[tuple[FfnForm, int, float]]:
    """Walk the three matrices' hulls down together, the steepest saving first: the hull of their sum."""
    choices = {
        c: matrix_choices(c, *ffn_shape(c, hidden, kept), prime, align, policy, curve) for c, curve in curves.items()
    }
    corners = {c: hull(choice.options.parameters, choice.options.loss) for c, choice in choices.items()}
    steps = sorted(_steps(choices, corners))
    at = dict.fromkeys(choices, 0)
    whole = _whole(hidden, kept) if kept < ffn else {}
    for _, component, index in steps:
        at[component] = index
        picked = {c: int(corners[c][i]) for c, i in at.items()}
        layouts = dict(whole)
        for c, i in picked.items():
            layout = choices[c].layouts[i]
            if layout is not None:
                layouts[c] = layout
        size = sum(int(choices[c].options.parameters[i]) for c, i in picked.items())
        extra = sum(float(choices[c].options.loss[i]) for c, i in picked.items())
        yield FfnForm(kept, prime, layouts), size, extra


def _steps(choices: Mapping[str, MatrixChoices], corners: Mapping[str, np.ndarray]) -> Iterator[tuple[float, str, int]]:
    for component, found in corners.items():
        options = choices[component].options
        for i in range(1, len(found)):
            here, there = found[i - 1], found[i]
            saved = options.parameters[here] - options.parameters[there]
            yield float((options.loss[there] - options.loss[here]) / saved), component, i
