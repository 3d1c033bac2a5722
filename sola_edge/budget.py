"""One parameter budget over all matrices and FFNs: the options with the least predicted loss for each parameter saved.

A *group* is what is chosen together (an attention matrix, a whole FFN). Its options are points (parameters, loss). With
one multiplier λ for all groups each takes the option least in loss + λ · parameters, which is a corner of its lower
convex hull; walking all hulls down by their steepest saving meets any budget in order of λ. What the last step overshoots
is given back where it helps most.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sola_edge.config import RATE_TOLERANCE


@dataclass(frozen=True)
class Options:
    """The options of one group as two arrays: parameters (n,) int64 and predicted loss (n,) float64, in any order."""

    parameters: np.ndarray
    loss: np.ndarray


def hull(parameters: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the lower convex hull, most parameters (least loss) first; along it each parameter saved costs more.

    The most expensive corner is the point of least loss (of those, the one with fewest parameters).
    """
    order = np.lexsort((loss, parameters))
    corners: list[int] = []
    for i in order:
        if corners and loss[i] >= loss[corners[-1]]:
            continue  # more parameters and no better
        while len(corners) >= 2 and _turns_up(parameters, loss, corners[-2], corners[-1], i):
            corners.pop()
        if corners and parameters[corners[-1]] == parameters[i]:
            corners.pop()
        corners.append(int(i))
    return np.array(corners[::-1])


def _turns_up(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))


def allocate(groups: Sequence[Options], budget: int) -> list[int]:
    """The option of each group such that at least `budget` parameters are saved, counted from its option
    with most parameters (the dense one). The smallest options of all where the budget cannot be met.
    """
    hulls = [hull(group.parameters, group.loss) for group in groups]
    at = [0] * len(groups)
    dense = [int(group.parameters.max()) for group in groups]
    saved = sum(d - int(g.parameters[h[0]]) for d, g, h in zip(dense, groups, hulls, strict=True))
    heap = [(_slope(groups[n], hulls[n], 0), n) for n in range(len(groups)) if len(hulls[n]) > 1]
    heapq.heapify(heap)
    while saved < budget and heap:
        _, n = heapq.heappop(heap)
        group, corners = groups[n], hulls[n]
        saved += int(group.parameters[corners[at[n]]] - group.parameters[corners[at[n] + 1]])
        at[n] += 1
        if at[n] + 1 < len(corners):
            heapq.heappush(heap, (_slope(group, corners, at[n]), n))
    chosen, slack = _give_back(groups, [int(h[i]) for h, i in zip(hulls, at, strict=True)], saved - budget)
    tolerance = round(RATE_TOLERANCE * budget)
    if slack > tolerance:  # sizes are coarse: falling short of the budget within the tolerance may be nearer
        chosen, _ = _give_back(groups, chosen, slack + tolerance)
    return chosen


def _slope(group: Options, corners: np.ndarray, at: int) -> float:
    """Loss for each parameter that the next step along the hull saves."""
    here, there = corners[at], corners[at + 1]
    return float((group.loss[there] - group.loss[here]) / (group.parameters[here] - group.parameters[there]))


def _give_back(groups: Sequence[Options], chosen: list[int], slack: int) -> tuple[list[int], int]:
    """Spend what was saved beyond the budget: always the change of one group that lowers the loss most and fits; what
    is left.
    """
    while slack > 0:
        best: tuple[float, int, int] | None = None
        for n, group in enumerate(groups):
            more = group.parameters - group.parameters[chosen[n]]
            gain = np.where(more <= slack, group.loss[chosen[n]] - group.loss, 0.0)
            i = int(gain.argmax())
            if gain[i] > 0 and (best is None or gain[i] > best[0]):
                best = (float(gain[i]), n, i)
        if best is None:
            break
        _, n, i = best
        slack -= int(groups[n].parameters[i] - groups[n].parameters[chosen[n]])
        chosen = [*chosen[:n], i, *chosen[n + 1 :]]
    return chosen, slack
