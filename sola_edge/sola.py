"""The method `sola`: every neuron and matrix takes the form that pays, by the loss that it predicts.

Attention matrices are whole or low-rank; each FFN keeps some neurons (the others are folded into the kept down columns),
a share of them prime, and its matrices are whole or low-rank. `narrow` drops neurons and does nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from sola_edge.architecture import ATTENTION, FFN
from sola_edge.budget import Options, allocate
from sola_edge.calibration import STAGES
from sola_edge.config import CompressionSettings, FactorPolicy, MatrixLayout
from sola_edge.correct import Problem, corrected
from sola_edge.factorize import Metric, factors, orthonormal, pivoted, remaining, spectrum
from sola_edge.forms import FfnChoices, MatrixChoices, ffn_choices, matrix_choices
from sola_edge.neurons import neuron_order, prime_split, refit
from sola_edge.planning import Plan, check_reachable, make_plan
from sola_edge.view import Analysis, Correction, LayerView, ModelView

# (share of the neurons kept, share of those prime) where low-rank forms are examined; whole ones are at every multiple
EXAMINED = ((1.0, 0.0), (1.0, 0.5), (0.8, 0.0), (0.8, 0.5), (0.6, 0.0), (0.4, 0.0), (0.25, 0.0))


@dataclass(frozen=True)
class Sola:
    """The row of `sola` in methods.METHODS."""

    name: str = "sola"
    summary: str = "two-sided metric, dropped neurons, one budget, sequential correction"
    published: bool = False

    def check(self, model: ModelView) -> None:
        """Raises UserError for an alignment as large as the FFN."""
        model.check_align()

    def gradient_windows(self, settings: CompressionSettings) -> int | None:
        return settings.gradient_windows

    def analysis_key(self, settings: CompressionSettings) -> dict[str, object]:
        return {"align": settings.align}

    def analyse(self, view: LayerView) -> Analysis:
        """Spectra of the attention matrices, the order of the neurons and what dropping them costs, spectra of the
        FFN's forms.
        """
        found: Analysis = {}
        down = view.weight("down")
        metric = view.metric("down")
        ordered = neuron_order(down, metric)
        share = _relative(down, metric)
        found["order"], found["dropping"] = ordered.order, ordered.loss * share
        for component in ATTENTION:
            weight, metric = view.weight(component), view.metric(component)
            found[f"remaining.{component}"] = remaining(spectrum(weight, metric).cpu()) * _relative(weight, metric)
        for kept, prime in _examined(view.model):
            for component, curve in _ffn_curves(view, ordered.order, kept, prime).items():
                found[f"remaining.{component}.{kept}.{prime}"] = curve
        return found

    def plan(self, model: ModelView, analyses: list[Analysis]) -> Plan:
        """Spend the budget over all layers. Raises UserError when the rate cannot be met."""
        choices = [
            (layer, name, choice)
            for layer, analysis in enumerate(analyses)
            for name, choice in _layer_choices(model, layer, analysis).items()
        ]
        groups = [choice.options for _, _, choice in choices]
        parameters = model.checkpoint.parameters()
        asked = model.settings.rate
        check_reachable(asked, sum(_removable(group) for group in groups), parameters, self.name)
        picked = allocate(groups, round(asked * parameters))
        layouts: dict[str, MatrixLayout] = {}
        predicted = {}
        for (layer, name, choice), i in zip(choices, picked, strict=True):
            predicted[name] = float(choice.options.loss[i])
            layouts |= _chosen(model, layer, name, choice, i)
        removed = model.removed(layouts)
        return make_plan(layouts, removed, asked, parameters, model.neuron_align, predicted_loss=predicted)

    def rewriter(self, view: LayerView, layouts: Mapping[str, MatrixLayout], analysis: Analysis) -> "SolaRewriter":
        return SolaRewriter(view, layouts, analysis["order"])


def _relative(weight: torch.Tensor, metric: Metric) -> float:
    """Without gradients losses of different matrices are no loss at all: they are made shares of the output's energy."""
    if metric.g is not None:
        return 1.0
    return 1.0 / max(float(((weight @ metric.s) * weight).sum()), torch.finfo(torch.float64).tiny)


def _examined(model: ModelView) -> list[tuple[int, int]]:
    """(kept, prime) of the FFN forms whose low-rank parts are examined, on the neuron grid."""
    align, ffn = model.neuron_align, model.ffn
    found = set()
    for share, prime in EXAMINED:
        kept = ffn if share == 1 else max(round(share * ffn / align), 1) * align
        found.add((kept, round(prime * kept / align) * align))
    return sorted((kept, prime) for kept, prime in found if prime < kept <= ffn)


def _ffn_curves(view: LayerView, order: torch.Tensor, kept: int, prime: int) -> Analysis:
    """By component, the cost of each rank of the marginal part when `kept` neurons stay and `prime` of them are dense."""
    found: Analysis = {}
    rows = order[prime:kept].to(view.model.settings.device)
    for component in ("gate", "up"):
        weight, g = view.weight(component)[rows], view.g(component)
        metric = Metric(view.s(component), None if g is None else g[rows][:, rows])
        found[component] = remaining(spectrum(weight, metric).cpu()) * _relative(weight, metric)
    down, s = view.weight("down"), view.s("down")
    keep = order[:kept].to(down.device)
    split = prime_split(s[keep][:, keep], prime)
    metric = Metric(split.marginal, view.g("down"))
    weight = refit(down, s, keep)[:, prime:]
    found["down"] = remaining(spectrum(weight, metric).cpu()) * _relative(down, Metric(s, metric.g))
    return found


def _layer_choices(model: ModelView, layer: int, analysis: Analysis) -> dict[str, MatrixChoices | FfnChoices]:
    policy = cast(FactorPolicy, model.settings.factors)
    found: dict[str, MatrixChoices | FfnChoices] = {}
    curves = analysis if model.settings.structure == "hybrid" else {}
    for component in ATTENTION if curves else ():
        shape, remaining_cost = model.shape(component), curves[f"remaining.{component}"].numpy()
        choices = matrix_choices(component, *shape, 0, model.align(component), policy, remaining_cost)
        found[model.module(layer, component)] = choices
    spectra: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for name, curve in curves.items():
        if name.count(".") == 3:
            _, component, kept, prime = name.split(".")
            spectra.setdefault((int(kept), int(prime)), {})[component] = curve.numpy()
    biases = model.has_bias("gate") + model.has_bias("up")
    found[_ffn_name(model, layer)] = ffn_choices(
        model.hidden,
        model.ffn,
        biases,
        model.neuron_align,
        model.align("gate"),
        policy,
        analysis["dropping"].numpy(),
        spectra,
    )
    return found


def _ffn_name(model: ModelView, layer: int) -> str:
    return model.module(layer, "down").rpartition(".")[0]


def _removable(options: Options) -> int:
    return int(options.parameters.max() - options.parameters.min())


def _chosen(
    model: ModelView, layer: int, name: str, choice: MatrixChoices | FfnChoices, index: int
) -> dict[str, MatrixLayout]:
    if isinstance(choice, MatrixChoices):
        layout = choice.layouts[index]
        return {} if layout is None else {name: layout}
    return {model.module(layer, c): layout for c, layout in choice.forms[index].layouts.items()}


class SolaRewriter:
    """Makes one layer's tensors stage by stage, on the original inputs or corrected for the compressed model's."""

    def __init__(self, view: LayerView, layouts: Mapping[str, MatrixLayout], order: torch.Tensor) -> None:
        self._view = view
        self._layouts = {c: layouts.get(view.module(c)) for c in (*ATTENTION, *FFN)}
        changed = {c: layout for c in FFN if (layout := self._layouts[c])}
        self.prime = max((layout.prime for layout in changed.values()), default=0)
        widths = [layout.n_in if c == "down" else layout.n_out for c, layout in changed.items()]
        self.order = (order[: widths[0]] if widths else torch.arange(view.model.ffn)).to(view.model.settings.device)

    def stage(self, name: str, correction: Correction | None) -> dict[str, torch.Tensor]:
        """See view.Rewriter. The FFN's final order of neurons is settled in stage `ffn`."""
        found: dict[str, torch.Tensor] = {}
        if name == "ffn":
            self._settle_order()
        problems = [self._problem(component, correction is not None) for component in STAGES[name]]
        for component, source in zip(STAGES[name], corrected(problems, correction), strict=True):
            parts = self._parts(component, source, correction)
            found |= {f"{self._view.module(component)}.{part}": tensor for part, tensor in parts.items()}
            bias = self._view.bias(component)
            if bias is not None:
                found[f"{self._view.module(component)}.bias"] = (
                    bias[self.order] if component in ("gate", "up") else bias
                )
        return found

    def _settle_order(self) -> None:
        """Where gate is pivoted, which it is without a gather, its pivots come first among the marginal neurons."""
        layout = self._layouts["gate"]
        if layout is None or not layout.pivot:
            return
        weight, metric = self._marginal("gate", self._problem("gate").start)
        found = pivoted(*factors(weight, metric, layout.rank))
        marginal = self.order[self.prime :]
        self.order = torch.cat([self.order[: self.prime], marginal[found.order]])

    def _problem(self, component: str, weighed: bool = False) -> Problem:
        """The matrix to store, before truncation (kept neurons in order, refitted), and what it stands for."""
        view = self._view
        weight, g = view.weight(component), view.g(component) if weighed else None
        if component == "down":
            whole = len(self.order) == view.model.ffn
            return Problem(weight[:, self.order] if whole else refit(weight, view.s(component), self.order), weight, g)
        if component in FFN:
            weight, g = weight[self.order], None if g is None else g[self.order][:, self.order]
        return Problem(weight, weight, g)

    def _marginal(
        self, component: str, source: torch.Tensor, correction: Correction | None = None
    ) -> tuple[torch.Tensor, Metric]:
        """The part of a matrix that a product replaces, and its metric."""
        view, prime = self._view, self.prime
        g, s = view.g(component), self._inputs(component, correction)
        if component in ATTENTION:
            return source, Metric(s, g)
        if component != "down":
            rows = self.order[prime:]
            return source[prime:], Metric(s, None if g is None else g[rows][:, rows])
        return source[:, prime:], Metric(prime_split(s, prime).marginal, g)

    def _inputs(self, component: str, correction: Correction | None) -> torch.Tensor:
        """S of the component's inputs in their final order; with a correction of x̂ and x alike, which steadies it."""
        s = self._view.s(component)
        if component == "down":
            s = s[self.order][:, self.order]
        return s if correction is None else (s + correction.s) / 2

    def _parts(self, component: str, source: torch.Tensor, correction: Correction | None) -> dict[str, torch.Tensor]:
        layout = self._layouts[component]
        if layout is None or layout.rank == 0:
            return {"weight": source}
        weight, metric = self._marginal(component, source, correction)
        b, a = factors(weight, metric, layout.rank)
        parts = _stored(layout, b, a)
        if layout.prime:
            parts["prime"] = source[: self.prime] if layout.split == "out" else source[:, : self.prime]
        if layout.prime and component == "down":
            # what the product leaves out is taken up by the prime columns as far as they can
            transfer = prime_split(self._inputs("down", correction), self.prime).transfer
            parts["prime"] = parts["prime"] + (weight - b @ a) @ transfer
        return parts


def _stored(layout: MatrixLayout, b: torch.Tensor, a: torch.Tensor) -> dict[str, torch.Tensor]:
    if not layout.pivot:
        b, a = orthonormal(b, a)
        return {"A": a, "B": b}
    if not layout.gather:  # the rows are in pivot order already: the first `rank` are well-conditioned
        square = b[: layout.rank]
        return {"A": square @ a, "B": torch.linalg.solve(square.T, b[layout.rank :].T).T}
    found = pivoted(b, a)
    place = found.order.argsort()  # L = concat(A x, B A x)[place]
    return {"A": found.a, "B": found.b, "order": place.int()}
