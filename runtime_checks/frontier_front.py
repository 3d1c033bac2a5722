"""Which settings of a frontier are worth having, and where plain quantization wins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from runtime_checks.estimates import exponential, paired_rise
from runtime_checks.frontier_schema import Frontier, FrontierCell
from runtime_checks.study_schema import Estimate

T = TypeVar("T")
SURE = 2.0  # standard errors from which on a difference is called one


def pareto(points: Sequence[T], costs: Callable[[T], tuple[float, ...]]) -> list[T]:
    """Those that no other point beats: as good in every cost (less is better) and better in one. Equal ones stay."""
    each = [costs(point) for point in points]
    return [point for point, own in zip(points, each, strict=True) if not any(_beats(other, own) for other in each)]


def _beats(other: tuple[float, ...], own: tuple[float, ...]) -> bool:
    return other != own and all(a <= b for a, b in zip(other, own, strict=True))


def ratio(cell: FrontierCell) -> float:
    """Perplexity ÷ the reference's of a measured cell."""
    assert cell.ratio is not None
    return cell.ratio.value


def size(cell: FrontierCell) -> int:
    """Bytes of a measured cell's file."""
    assert cell.artefact is not None
    return cell.artefact.bytes


def front_of_bytes(found: Frontier) -> list[FrontierCell]:
    """Pareto set of bytes and perplexity, smallest first, over all runtimes."""
    return sorted(pareto(found.measured, lambda cell: (size(cell), ratio(cell))), key=size)


def front_of_decode(found: Frontier) -> list[FrontierCell]:
    """Pareto set of decode speed and perplexity, fastest first, over all runtimes."""

    def slowness(cell: FrontierCell) -> float:
        return -(found.speed(cell, "decode") or 0.0)

    return sorted(pareto(found.measured, lambda cell: (slowness(cell), ratio(cell))), key=slowness)


@dataclass(frozen=True)
class Beaten:
    """A compressed cell, and a dense one of the same runtime that is no larger and no worse. ratio: perplexity of the first ÷
    the second's, paired by window.
    """

    cell: FrontierCell
    by: FrontierCell
    ratio: Estimate

    @property
    def sure(self) -> bool:
        """Whether the difference is more than its error explains."""
        error = self.ratio.standard_error
        return error is not None and self.ratio.value - 1 > SURE * error


def beaten(found: Frontier, cell: FrontierCell) -> Beaten | None:
    """The best dense cell that beats a compressed one in bytes and perplexity, if any."""
    if cell.setting.dense:
        return None
    rivals = [
        other
        for other in found.measured
        if other.setting.dense and other.setting.runtime == cell.setting.runtime and size(other) <= size(cell)
    ]
    best = min(rivals, key=ratio, default=None)
    if best is None or ratio(best) > ratio(cell):
        return None
    assert best.perplexity is not None and cell.perplexity is not None
    return Beaten(cell, best, exponential(paired_rise(best.perplexity, cell.perplexity)))


def verdict(found: Frontier) -> list[str]:
    """What the figures say about compression beside plain quantization, in sentences."""
    compressed = [cell for cell in found.measured if not cell.setting.dense]
    front = front_of_bytes(found)
    kept = [str(cell.setting) for cell in front if not cell.setting.dense]
    dense = sum(cell.setting.dense for cell in front)
    lines = [f"On the front of bytes and perplexity: {dense} dense and {len(kept)} compressed settings."]
    if kept:
        lines.append(f"Compressed ones on it: {'; '.join(kept)}.")
    if not any(cell.setting.dense and cell.throughput != cell.baseline for cell in found.measured):
        return [
            *lines,
            "No dense file but the baselines was measured, so nothing is said of plain quantization: add rate 0.",
        ]
    lost = [lose for cell in compressed if (lose := beaten(found, cell))]
    if compressed:
        lines.append(
            f"Plain quantization wins against {len(lost)} of {len(compressed)} compressed settings (a dense file of the same "
            f"runtime is no larger and no worse), against {sum(lose.sure for lose in lost)} of them by more than {SURE:g} "
            "standard errors of the paired difference."
        )
    return lines
