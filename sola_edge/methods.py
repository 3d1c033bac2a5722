"""One row per compression method: which matrices of which layers it factors, and how it spends the parameter budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sola_edge.allocation import MatrixSpectrum, greedy_ranks
from sola_edge.errors import UserError

DENSE_O_BELOW = 0.3  # method.md §5: o_proj is left dense below a rate of 30 %


@dataclass(frozen=True)
class Method:
    """components(rate): the matrices to factor; layers(count): the layers to touch; allocate(spectra, budget): ranks."""

    name: str
    summary: str
    components: Callable[[float], tuple[str, ...]]
    layers: Callable[[int], range]
    allocate: Callable[[Sequence[MatrixSpectrum], int], list[int]]


def _published_components(rate: float) -> tuple[str, ...]:
    """v_proj is always left dense, o_proj below 30 % (method.md §5)."""
    return ("q", "k", "gate", "up", "down") if rate < DENSE_O_BELOW else ("q", "k", "o", "gate", "up", "down")


def _all_but_first_and_last_two(layers: int) -> range:
    return range(2, layers - 2)


METHODS = {
    row.name: row
    for row in (
        Method(
            "sola-paper",
            "SoLA as published (AAAI 2025)",
            _published_components,
            _all_but_first_and_last_two,
            greedy_ranks,
        ),
    )
}


def method_named(name: str) -> Method:
    """The row of that name. Raises UserError when there is none."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; choose one of: {', '.join(METHODS)}")
    return METHODS[name]
