"""Statistics and settings → Plan: prime neurons and ranks, with the rate achieved.

The compression rate is read here and nowhere after: everything that follows sees layouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sola_edge.allocation import MatrixSpectrum, most_removable
from sola_edge.config import RATE_TOLERANCE, CompressionSettings, MatrixLayout, alignment_for, rate_of
from sola_edge.errors import UserError
from sola_edge.methods import method_named


@dataclass(frozen=True)
class Plan:
    """layouts: of every matrix to factor, by module name. rate: achieved, exactly. `asked`: what was wanted.

    retained_energy: of each factored matrix's low-rank part.
    """

    layouts: dict[str, MatrixLayout]
    retained_energy: dict[str, float]
    asked: float
    rate: float
    parameters_dense: int
    parameters_removed: int


def prime_count(ffn: int, hidden: int, settings: CompressionSettings) -> int:
    """How many of a layer's FFN neurons are prime: the asked share, rounded to the alignment, at least one multiple of it.

    Raises UserError when that leaves no marginal neuron.
    """
    align = alignment_for(min(ffn, hidden), settings.align)
    if align >= ffn:
        raise UserError(f"align {align} is out of range: this model's FFN has {ffn} neurons; give 8 or 32")
    return min(max(round(settings.prime_share * ffn / align), 1) * align, ffn - align)


def neuron_order(norms: torch.Tensor, prime: int) -> torch.Tensor:
    """A permutation of the FFN's neurons, prime ones (largest mean |h_j|) first; each part keeps its original order.

    norms (ffn,) → (ffn,) int64. Source: method.md §2.
    """
    top = norms.argsort(descending=True, stable=True)
    return torch.cat([top[:prime].sort().values, top[prime:].sort().values])


def make_plan(spectra: Sequence[MatrixSpectrum], settings: CompressionSettings, parameters_dense: int) -> Plan:
    """Spend the budget. Raises UserError when the rate cannot be reached, or not within 0.5 % of it."""
    budget = round(settings.rate * parameters_dense)
    limit = most_removable(spectra)
    if budget > limit:
        raise UserError(
            f"rate {settings.rate:g} cannot be reached: {settings.method} can remove at most "
            f"{rate_of(limit, parameters_dense):.3f} of this model's parameters; ask for less"
        )
    ranks = method_named(settings.method).allocate(spectra, budget)
    layouts = {}
    energy = {}
    for spectrum, rank in zip(spectra, ranks, strict=True):
        layout = spectrum.layout(rank)
        if layout is not None:
            layouts[spectrum.module] = layout
            energy[spectrum.module] = float(spectrum.energy[rank])
    removed = sum(s.removed(rank) for s, rank in zip(spectra, ranks, strict=True))
    rate = rate_of(removed, parameters_dense)
    if abs(rate - settings.rate) > RATE_TOLERANCE * settings.rate:
        raise UserError(
            f"rate {settings.rate:g} cannot be met within 0.5 % with ranks this coarse (nearest: {rate:.4f}); "
            f"give a smaller --align than {max(s.align for s in spectra)}"
        )
    return Plan(layouts, energy, settings.rate, rate, parameters_dense, removed)
