"""Rank allocation of the published methods, on shapes and energies alone; SoLA's is adaptive by component (method.md §4).

Every matrix has a grid of ranks (multiples of its alignment). All start at a retained energy of 99.9 %; the step down that
loses least energy per weight of the matrix is taken, never one that loses more than a clamp (0.1 %, relaxed by 0.02 % when no
step passes) or starts below a floor of 90 %, until the budget is met. Where the floor keeps it from being met, there is none,
from the start: else matrices with a steep spectrum (q, k) would fall to the floor before the others may go below it. Then, as
the authors do, the ranks are collapsed to one per component type. What that rounds away is settled afterwards: whole
components, then single matrices, move by one grid step while that brings the parameter count nearer to the budget.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sola_edge.config import RATE_TOLERANCE, MatrixLayout, Split

START, FLOOR = 0.999, 0.90
CLAMP, CLAMP_RELAXATION = 0.001, 0.0002
MOVED_AT_ONCE = 4  # matrices, where fewer cannot meet the budget


@dataclass(frozen=True)
class MatrixSpectrum:
    """What the allocation knows of one matrix.

    n_out, n_in, prime, split: as in MatrixLayout. energy: (k + 1,) retained energy e(r) of rank r = 0 … k of the part that is
    not prime. align: ranks are its multiples. Rank 0 stands for *left dense* everywhere in this module.
    """

    module: str
    component: str
    n_out: int
    n_in: int
    prime: int
    split: Split
    align: int
    energy: np.ndarray = field(repr=False)

    @property
    def dense_parameters(self) -> int:
        return self.n_out * self.n_in

    def layout(self, rank: int) -> MatrixLayout | None:
        """The layout of a rank, None where dense storage is no larger (then nothing is gained by factoring)."""
        if rank == 0:
            return None
        layout = MatrixLayout(self.n_out, self.n_in, self.prime, rank, self.split)
        return layout if layout.parameters < self.dense_parameters else None

    def removed(self, rank: int) -> int:
        """Parameters that the rank saves, 0 where it stays dense."""
        layout = self.layout(rank)
        return self.dense_parameters - layout.parameters if layout else 0

    @property
    def grid(self) -> list[int]:
        """The ranks to choose from, ascending; the last may be the full rank."""
        return list(range(self.align, len(self.energy), self.align)) or [len(self.energy) - 1]


def greedy_ranks(spectra: Sequence[MatrixSpectrum], budget: int) -> list[int]:
    """A rank for each matrix (0: left dense) such that about `budget` parameters are removed in all."""
    ranks = _descend(spectra, budget, FLOOR) or _descend(spectra, budget, 0.0)
    assert ranks is not None  # without a floor it ends at the smallest ranks, which the caller has checked
    ranks = _collapse(spectra, ranks)
    for groups in (_components(spectra), [[i] for i in range(len(spectra))]):
        ranks = _settle(spectra, ranks, budget, groups)
    return [rank if s.removed(rank) else 0 for s, rank in zip(spectra, ranks, strict=True)]


def uniform_ranks(spectra: Sequence[MatrixSpectrum], budget: int) -> list[int]:
    """The same share of every matrix's parameters, as SVD-LLM and ASVD (without its search) have it, settled to the budget."""
    share = 1 - budget / sum(s.dense_parameters for s in spectra)
    wanted = [share * s.dense_parameters / (s.n_out + s.n_in) for s in spectra]
    ranks = [min(s.grid, key=lambda rank: abs(rank - want)) for s, want in zip(spectra, wanted, strict=True)]
    for groups in (_components(spectra), [[i] for i in range(len(spectra))]):
        ranks = _settle(spectra, ranks, budget, groups)
    return [rank if s.removed(rank) else 0 for s, rank in zip(spectra, ranks, strict=True)]


def most_removable(spectra: Sequence[MatrixSpectrum]) -> int:
    """Parameters removed when every matrix has the smallest rank of its grid."""
    return sum(s.removed(s.grid[0]) for s in spectra)


def _descend(spectra: Sequence[MatrixSpectrum], budget: int, floor: float) -> list[int] | None:
    """Ranks that remove the budget, None where a floor above 0 keeps them from it."""
    at = [_start(s) for s in spectra]
    clamp = CLAMP
    removed = sum(s.removed(s.grid[i]) for s, i in zip(spectra, at, strict=True))
    while removed < budget:
        movable = [(*step, n) for n, s in enumerate(spectra) if (step := _step(s, at[n], floor)) is not None]
        if not movable:
            if floor > 0:
                return None
            break
        allowed = [move for move in movable if move[1] <= clamp]
        if not allowed:
            clamp += CLAMP_RELAXATION
            continue
        n = min(allowed)[2]
        spectrum = spectra[n]
        removed += spectrum.removed(spectrum.grid[at[n] - 1]) - spectrum.removed(spectrum.grid[at[n]])
        at[n] -= 1
    return [s.grid[i] for s, i in zip(spectra, at, strict=True)]


def _start(spectrum: MatrixSpectrum) -> int:
    enough = [i for i, rank in enumerate(spectrum.grid) if spectrum.energy[rank] >= START]
    return enough[0] if enough else len(spectrum.grid) - 1


def _step(spectrum: MatrixSpectrum, at: int, floor: float) -> tuple[float, float] | None:
    """(energy drop per weight, energy drop) of one step down, None where none is left."""
    grid = spectrum.grid
    if at == 0 or spectrum.energy[grid[at]] < floor:
        return None
    drop = float(spectrum.energy[grid[at]] - spectrum.energy[grid[at - 1]])
    return drop / spectrum.dense_parameters, drop


def _components(spectra: Sequence[MatrixSpectrum]) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for n, spectrum in enumerate(spectra):
        groups[spectrum.component].append(n)
    return list(groups.values())


def _collapse(spectra: Sequence[MatrixSpectrum], ranks: list[int]) -> list[int]:
    """The mean rank of each component type, rounded to the grid."""
    collapsed = list(ranks)
    for group in _components(spectra):
        mean = sum(ranks[n] for n in group) / len(group)
        for n in group:
            collapsed[n] = min(spectra[n].grid, key=lambda rank: abs(rank - mean))
    return collapsed


def _settle(
    spectra: Sequence[MatrixSpectrum], ranks: list[int], budget: int, groups: Sequence[Sequence[int]]
) -> list[int]:
    """Move groups by one grid step each, always the move that comes nearest to the budget, while one comes nearer.

    Where no single matrix's move does and the budget is missed by more than half the tolerance, several move at once.
    """
    removed = sum(s.removed(rank) for s, rank in zip(spectra, ranks, strict=True))
    tolerance = RATE_TOLERANCE / 2 * budget
    most = MOVED_AT_ONCE if len(groups) == len(spectra) else 1
    while True:
        missing = budget - removed
        moves = list(_moves(spectra, ranks, groups))
        found = _nearest(moves, missing)
        for count in range(2, most + 1):
            if found is None and abs(missing) > tolerance:
                found = _nearest(_combined(moves, count), missing)
        if found is None:
            return ranks
        ranks = list(ranks)
        for n, rank in found.ranks.items():
            ranks[n] = rank
        removed += found.gain


@dataclass(frozen=True)
class _Move:
    ranks: dict[int, int]
    gain: int  # parameters removed by it; negative where it gives some back


def _moves(spectra: Sequence[MatrixSpectrum], ranks: list[int], groups: Sequence[Sequence[int]]) -> Iterator[_Move]:
    for group in groups:
        for direction in (-1, 1):
            moved = {n: _neighbour(spectra[n], ranks[n], direction) for n in group}
            gain = sum(spectra[n].removed(rank) - spectra[n].removed(ranks[n]) for n, rank in moved.items())
            if gain:
                yield _Move(moved, gain)


def _nearest(moves: Iterable[_Move], missing: int) -> _Move | None:
    """The move that comes nearest to what is missing, None where none comes nearer than staying."""
    best = min(moves, key=lambda move: abs(missing - move.gain), default=None)
    return best if best is not None and abs(missing - best.gain) < abs(missing) else None


def _combined(moves: Sequence[_Move], count: int) -> list[_Move]:
    """Moves of `count` different matrices at once, one of each gain: finer than any single move."""
    by_gain: dict[int, list[_Move]] = defaultdict(list)
    for move in moves:
        if len(by_gain[move.gain]) < count:  # so many that another matrix is left for each further move
            by_gain[move.gain].append(move)
    single = [move for group in by_gain.values() for move in group]
    found = single
    for _ in range(count - 1):
        joined: dict[int, _Move] = {}
        for one in found:
            for other in single:
                if not one.ranks.keys() & other.ranks.keys():
                    joined.setdefault(one.gain + other.gain, _Move(one.ranks | other.ranks, one.gain + other.gain))
        found = list(joined.values())
    return found


def _neighbour(spectrum: MatrixSpectrum, rank: int, direction: int) -> int:
    """The next rank of the grid that changes the parameter count: steps between ranks that stay dense count as one."""
    grid = spectrum.grid
    at = grid.index(rank)
    while 0 <= at + direction < len(grid):
        at += direction
        if spectrum.removed(grid[at]) != spectrum.removed(rank):
            break
    return grid[at]
