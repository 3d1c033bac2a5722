"""The published method and the baselines it is compared with, under the same budget, alignment and streaming.

`MatrixMethod` factors matrices one by one: sola-paper, svd, asvd, svd-llm are rows of its table. `Flap` drops neurons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sola_edge.allocation import MatrixSpectrum, greedy_ranks, most_removable, uniform_ranks
from sola_edge.architecture import COMPONENTS, FFN
from sola_edge.calibration import STAGES
from sola_edge.config import CompressionSettings, MatrixLayout
from sola_edge.errors import UserError
from sola_edge.factorize import Metric, factors, orthonormal, retained_energy, spectrum
from sola_edge.forms import SPLIT, ffn_shape
from sola_edge.planning import Plan, check_reachable, make_plan
from sola_edge.view import Analysis, Correction, LayerView, ModelView

DENSE_O_BELOW = 0.3  # method.md §5: o_proj is left dense below a rate of 30 %
ASVD_ALPHA = 0.5  # Yuan et al. 2023: exponent of the input channels' scale


@dataclass(frozen=True)
class MatrixMethod:
    """Factors matrices by a metric of their inputs; shares of neurons may be prime.

    components(rate), layers(count): what is touched. metric(S): the S that errors are weighed by. allocate(spectra,
    budget): ranks. prime: whether `prime_share` of each layer's neurons stay dense.
    """

    name: str
    summary: str
    components: Callable[[float], tuple[str, ...]]
    layers: Callable[[int], range]
    metric: Callable[[torch.Tensor], torch.Tensor]
    allocate: Callable[[Sequence[MatrixSpectrum], int], list[int]]
    prime: bool = False
    published: bool = True

    def check(self, model: ModelView) -> None:
        """Raises UserError for a structure or a model that the method has nothing for."""
        _as_published(self.name, model)
        if not self.layers(model.layers):
            raise UserError(
                f"{self.name} leaves the first and last two layers dense, and this model has {model.layers}"
            )
        prime_count(model)

    def gradient_windows(self, settings: CompressionSettings) -> int:
        return 0

    def analysis_key(self, settings: CompressionSettings) -> dict[str, object]:
        found: dict[str, object] = {"components": self.components(settings.rate)}
        return found | ({"align": settings.align, "prime_share": settings.prime_share} if self.prime else {})

    def analyse(self, view: LayerView) -> Analysis:
        """Energies of each matrix's part that is not prime, and the order of the neurons."""
        if view.number not in self.layers(view.model.layers):
            return {}
        order, prime = self._order(view)
        found: Analysis = {"order": order.cpu()}
        for component in self.components(view.model.settings.rate):
            weight, metric = self._marginal(view, component, order, prime)
            found[f"energy.{component}"] = spectrum(weight, metric).cpu()
        if self.prime:
            carried = view.norms.sort(descending=True).values
            found["share"] = (carried[:prime].sum() / carried.sum()).cpu().reshape(1)
        return found

    def _order(self, view: LayerView) -> tuple[torch.Tensor, int]:
        if not self.prime:
            return torch.arange(view.model.ffn, device=view.norms.device), 0
        prime = prime_count(view.model)
        return prime_order(view.norms, prime), prime

    def _marginal(
        self, view: LayerView, component: str, order: torch.Tensor, prime: int
    ) -> tuple[torch.Tensor, Metric]:
        weight, s = view.weight(component), view.s(component)
        if component == "down":
            s = s[order][:, order][prime:, prime:]
            weight = weight[:, order][:, prime:]
        elif component in FFN:
            weight = weight[order][prime:]
        return weight, Metric(self.metric(s))

    def plan(self, model: ModelView, analyses: list[Analysis]) -> Plan:
        """Ranks of all matrices. Raises UserError when the rate cannot be met."""
        spectra = [
            self._spectrum(model, layer, component, analysis[f"energy.{component}"])
            for layer, analysis in enumerate(analyses)
            if analysis
            for component in self.components(model.settings.rate)
        ]
        asked, parameters = model.settings.rate, model.checkpoint.parameters()
        check_reachable(asked, most_removable(spectra), parameters, self.name)
        ranks = self.allocate(spectra, round(asked * parameters))
        chosen = {s.module: (s, rank) for s, rank in zip(spectra, ranks, strict=True) if s.layout(rank) is not None}
        layouts = {module: layout for module, (s, rank) in chosen.items() if (layout := s.layout(rank)) is not None}
        removed = model.removed(layouts)
        energy = {module: float(s.energy[rank]) for module, (s, rank) in chosen.items()}
        align = max(s.align for s in spectra)
        return make_plan(layouts, removed, asked, parameters, align, retained_energy=energy)

    def _spectrum(self, model: ModelView, layer: int, component: str, energy: torch.Tensor) -> MatrixSpectrum:
        n_out, n_in = model.shape(component)
        prime = prime_count(model) if self.prime and component in FFN else 0
        split = SPLIT.get(component, "out")
        retained = retained_energy(energy).numpy()
        module = model.module(layer, component)
        return MatrixSpectrum(module, component, n_out, n_in, prime, split, model.align(component), retained)

    def rewriter(self, view: LayerView, layouts: Mapping[str, MatrixLayout], analysis: Analysis) -> "MatrixRewriter":
        changed = any(view.module(c) in layouts for c in FFN)
        return MatrixRewriter(self, view, layouts, analysis["order"] if changed else torch.arange(view.model.ffn))


@dataclass(frozen=True)
class MatrixRewriter:
    """Neurons in the method's order, matrices factored where the plan says so."""

    method: MatrixMethod
    view: LayerView
    layouts: Mapping[str, MatrixLayout]
    order: torch.Tensor

    def stage(self, name: str, correction: Correction | None) -> dict[str, torch.Tensor]:
        """See view.Rewriter; published methods are not corrected."""
        found: dict[str, torch.Tensor] = {}
        order = self.order.to(self.view.model.settings.device)
        for component in STAGES[name]:
            module = self.view.module(component)
            layout = self.layouts.get(module)
            whole = self._ordered(self.view.weight(component), component, order)
            if layout is None:
                found[f"{module}.weight"] = whole
            else:
                weight, metric = self.method._marginal(self.view, component, order, layout.prime)
                found[f"{module}.B"], found[f"{module}.A"] = orthonormal(*factors(weight, metric, layout.rank))
                if layout.prime:
                    kept = whole[: layout.prime] if layout.split == "out" else whole[:, : layout.prime]
                    found[f"{module}.prime"] = kept
            bias = self.view.bias(component)
            if bias is not None:
                found[f"{module}.bias"] = bias[order] if component in ("gate", "up") else bias
        return found

    @staticmethod
    def _ordered(weight: torch.Tensor, component: str, order: torch.Tensor) -> torch.Tensor:
        if component == "down":
            return weight[:, order]
        return weight[order] if component in FFN else weight


def prime_count(model: ModelView) -> int:
    """How many of a layer's FFN neurons are prime: the asked share, rounded to the alignment, at least one multiple of it.

    Raises UserError when that leaves no marginal neuron.
    """
    align, ffn = model.neuron_align, model.ffn
    model.check_align()
    return min(max(round(model.settings.prime_share * ffn / align), 1) * align, ffn - align)


def prime_order(norms: torch.Tensor, prime: int) -> torch.Tensor:
    """A permutation of the FFN's neurons, prime ones (largest mean |h_j|) first; each part keeps its original order.

    norms (ffn,) → (ffn,) int64. Source: method.md §2.
    """
    top = norms.argsort(descending=True, stable=True)
    return torch.cat([top[:prime].sort().values, top[prime:].sort().values])


def _as_published(name: str, model: ModelView) -> None:
    """Refuse what these methods do not have, rather than leave it out in silence. Raises UserError."""
    settings = model.settings
    if settings.structure != "hybrid":
        raise UserError(f"structure {settings.structure!r} is not available with {name}; use hybrid, or sola")
    if settings.factors == "pivoted":
        raise UserError(f"factors 'pivoted' are not available with {name}; leave them out, or use sola")
    if settings.correction_windows:
        raise UserError(f"a correction is not available with {name}; leave correction windows out, or use sola")


@dataclass(frozen=True)
class Flap:
    """FLAP (An et al., AAAI 2024) on FFN neurons: fluctuation metric, standardized per layer, one threshold, bias
    compensation.
    """

    name: str = "flap"
    summary: str = "FLAP on FFN neurons: drops those that fluctuate least, compensates by a bias"
    published: bool = True

    def check(self, model: ModelView) -> None:
        """Raises UserError for a structure without biases or an alignment as large as the FFN."""
        _as_published(self.name, model)
        model.check_align()

    def gradient_windows(self, settings: CompressionSettings) -> int:
        return 0

    def analysis_key(self, settings: CompressionSettings) -> dict[str, object]:
        return {}

    def analyse(self, view: LayerView) -> Analysis:
        """Score of each neuron: variance of h_j times ‖w_j‖², standardized over the layer."""
        variance = (view.s("down").diagonal() - view.means.square()).clamp_min(0)
        score = variance * view.weight("down").square().sum(0)
        standardized = (score - score.mean()) / score.std().clamp_min(torch.finfo(torch.float64).tiny)
        return {"score": standardized.cpu(), "order": standardized.argsort(descending=True, stable=True).cpu()}

    def plan(self, model: ModelView, analyses: list[Analysis]) -> Plan:
        """One threshold for all layers; counts per layer are rounded to the alignment and settled to the budget."""
        asked, parameters = model.settings.rate, model.checkpoint.parameters()
        align, ffn, hidden = model.neuron_align, model.ffn, model.hidden

        def saved(count: int) -> int:
            bias = 0 if model.has_bias("down") or count == ffn else hidden
            return (ffn - count) * model.neuron_parameters - bias

        check_reachable(asked, len(analyses) * saved(align), parameters, self.name)
        kept = flap_counts([a["score"] for a in analyses], align, round(asked * parameters), saved)
        layouts: dict[str, MatrixLayout] = {}
        for layer, count in enumerate(kept):
            if count < ffn:
                for c in FFN:
                    shape = ffn_shape(c, hidden, count)
                    layouts[model.module(layer, c)] = MatrixLayout(
                        *shape, 0, 0, SPLIT.get(c, "out"), bias=c == "down" and not model.has_bias(c)
                    )
        return make_plan(layouts, model.removed(layouts), asked, parameters, align)

    def rewriter(self, view: LayerView, layouts: Mapping[str, MatrixLayout], analysis: Analysis) -> "FlapRewriter":
        layout = layouts.get(view.module("gate"))
        order = analysis["order"] if layout else torch.arange(view.model.ffn)
        return FlapRewriter(view, order, layout.n_out if layout else view.model.ffn)


def flap_counts(scores: Sequence[torch.Tensor], align: int, budget: int, saved: Callable[[int], int]) -> list[int]:
    """Neurons that each layer keeps: those above one threshold, on the grid, of all thresholds the one nearest to the budget.

    Single layers then move by one multiple while that comes nearer. saved(count): parameters that a layer saves which keeps so
    many.
    """
    every = torch.cat(list(scores)).sort().values
    best, nearest = [len(s) for s in scores], budget
    low, high = 0, len(every) - 1
    while low <= high:
        middle = (low + high) // 2
        counts = [_on_grid(int((s > every[middle]).sum()), align, len(s)) for s in scores]
        missing = budget - sum(saved(count) for count in counts)
        if abs(missing) < nearest:
            best, nearest = counts, abs(missing)
        low, high = (middle + 1, high) if missing > 0 else (low, middle - 1)
    while True:
        moves = [
            [*best[:n], count + step, *best[n + 1 :]]
            for n, count in enumerate(best)
            for step in (-align, align)
            if align <= count + step <= len(scores[n])
        ]
        found = min(moves, key=lambda counts: abs(budget - sum(map(saved, counts))), default=best)
        if abs(budget - sum(map(saved, found))) >= nearest:
            return best
        best, nearest = found, abs(budget - sum(map(saved, found)))


def _on_grid(count: int, align: int, ffn: int) -> int:
    return min(max(round(count / align), 1) * align, ffn)


@dataclass(frozen=True)
class FlapRewriter:
    """Kept neurons in their order; what the dropped ones give on average becomes down's bias."""

    view: LayerView
    order: torch.Tensor
    kept: int

    def stage(self, name: str, correction: Correction | None) -> dict[str, torch.Tensor]:
        """See view.Rewriter; published methods are not corrected."""
        found: dict[str, torch.Tensor] = {}
        order = self.order.to(self.view.model.settings.device)
        keep, drop = order[: self.kept].sort().values, order[self.kept :]
        for component in STAGES[name]:
            module, weight, bias = self.view.module(component), self.view.weight(component), self.view.bias(component)
            if component == "down" and len(drop):
                gone = weight[:, drop] @ self.view.means[drop]
                bias = gone if bias is None else bias + gone
                weight = weight[:, keep]
            elif component in ("gate", "up"):
                weight = weight[keep]
                bias = None if bias is None else bias[keep]
            found[f"{module}.weight"] = weight
            if bias is not None:
                found[f"{module}.bias"] = bias
        return found


def published_components(rate: float) -> tuple[str, ...]:
    """v_proj is always left dense, o_proj below 30 % (method.md §5)."""
    return ("q", "k", "gate", "up", "down") if rate < DENSE_O_BELOW else ("q", "k", "o", "gate", "up", "down")


def all_components(_rate: float) -> tuple[str, ...]:
    """Every matrix of a layer."""
    return COMPONENTS


def inner_layers(layers: int) -> range:
    """All but the first and last two (method.md §5)."""
    return range(2, layers - 2)


def identity(s: torch.Tensor) -> torch.Tensor:
    """Plain SVD: every input direction counts alike."""
    return torch.eye(len(s), dtype=s.dtype, device=s.device)


def channel_scales(s: torch.Tensor) -> torch.Tensor:
    """ASVD: W is scaled by each input channel's size to the power α before its SVD; here the size is the root mean square."""
    return torch.diag(s.diagonal().clamp_min(torch.finfo(s.dtype).tiny) ** ASVD_ALPHA)


def whitening(s: torch.Tensor) -> torch.Tensor:
    """SVD-LLM and SoLA: the inputs' own Gram matrix."""
    return s


BASELINES = (
    MatrixMethod(
        "sola-paper", "SoLA as published (AAAI 2025)", published_components, inner_layers, whitening, greedy_ranks, True
    ),
    MatrixMethod("svd", "plain SVD, one share of each matrix", all_components, range, identity, uniform_ranks),
    MatrixMethod("asvd", "ASVD: inputs scaled by channel", all_components, range, channel_scales, uniform_ranks),
    MatrixMethod("svd-llm", "SVD-LLM: inputs whitened", all_components, range, whitening, uniform_ranks),
    Flap(),
)
