"""What a method sees: the model's shapes, and one layer's weights and statistics at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from sola_edge.architecture import matrix_shape
from sola_edge.calibration import INPUT_OF, LayerStatistics, Statistics
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import CompressionSettings, MatrixLayout, alignment_for
from sola_edge.errors import UserError
from sola_edge.factorize import Metric, damped, shrunk
from sola_edge.planning import Plan

Analysis = dict[str, torch.Tensor]  # what a method notes of one layer, kept on disk until it plans


@dataclass(frozen=True)
class ModelView:
    """Shapes, names and settings, no weights."""

    checkpoint: Checkpoint
    settings: CompressionSettings

    @property
    def hidden(self) -> int:
        return self.checkpoint.config.hidden_size

    @property
    def ffn(self) -> int:
        return self.checkpoint.config.intermediate_size

    @property
    def layers(self) -> int:
        return self.checkpoint.layers

    def module(self, layer: int, component: str) -> str:
        """Full module name."""
        return self.checkpoint.architecture.module(layer, component)

    def shape(self, component: str) -> tuple[int, int]:
        """(n_out, n_in) of a component in the dense model."""
        return matrix_shape(self.checkpoint.config, component)

    def has_bias(self, component: str) -> bool:
        """Whether the component has a bias in the dense model (all layers are alike)."""
        return self.checkpoint.bias_name(self.module(0, component)) is not None

    def parameters(self, component: str) -> int:
        """Parameters of a component in the dense model, its bias included."""
        n_out, n_in = self.shape(component)
        return n_out * (n_in + self.has_bias(component))

    def stored(self, component: str, layout: MatrixLayout) -> int:
        """Parameters of a component under a layout, its bias included."""
        return layout.weights + layout.n_out * (layout.bias or self.has_bias(component))

    def check_align(self) -> None:
        """Raises UserError where no number of neurons but all of them is a multiple of the alignment."""
        if self.neuron_align >= self.ffn:
            raise UserError(
                f"align {self.neuron_align} is out of range: this model's FFN has {self.ffn} neurons; give 8 or 32"
            )

    @property
    def neuron_parameters(self) -> int:
        """Parameters that a whole FFN neuron has."""
        return 3 * self.hidden + self.has_bias("gate") + self.has_bias("up")

    def removed(self, layouts: Mapping[str, MatrixLayout]) -> int:
        """Parameters that these layouts, by module name, save."""
        saved = 0
        for module, layout in layouts.items():
            component = self.checkpoint.architecture.component_of(module)
            if component is None:
                raise ValueError(f"{module} is no component of a layer")
            saved += self.parameters(component) - self.stored(component, layout)
        return saved

    def align(self, component: str) -> int:
        """What the component's ranks are multiples of."""
        return alignment_for(min(self.shape(component)), self.settings.align)

    @property
    def neuron_align(self) -> int:
        """What numbers of kept and prime neurons are multiples of."""
        return alignment_for(min(self.ffn, self.hidden), self.settings.align)


@dataclass(frozen=True)
class LayerView:
    """One decoder layer's weights and statistics, in float64 on the settings' device, read when asked for."""

    model: ModelView
    number: int
    statistics: Statistics

    @cached_property
    def _found(self) -> LayerStatistics:
        return self.statistics.layer(self.number)

    def module(self, component: str) -> str:
        """Full module name."""
        return self.model.module(self.number, component)

    def weight(self, component: str) -> torch.Tensor:
        """W (n_out, n_in)."""
        return self._placed(self.model.checkpoint.tensor(f"{self.module(component)}.weight"))

    def bias(self, component: str) -> torch.Tensor | None:
        """The component's bias (n_out,), None where it has none."""
        name = self.model.checkpoint.bias_name(self.module(component))
        return None if name is None else self._placed(self.model.checkpoint.tensor(name))

    def s(self, component: str) -> torch.Tensor:
        """S = E[x xᵀ] of the component's inputs."""
        return self._placed(self._found.inputs[INPUT_OF[component]])

    def g(self, component: str) -> torch.Tensor | None:
        """Shrunk and damped G of the gradients at the component's outputs, None where the statistics have none."""
        found = self._found.outputs.get(component)
        if found is None:
            return None
        return damped(shrunk(self._placed(found), self._placed(self._found.weights[component])))

    def metric(self, component: str) -> Metric:
        """S and G of a component."""
        return Metric(self.s(component), self.g(component))

    @property
    def norms(self) -> torch.Tensor:
        """Mean |h_j| of each FFN neuron, (ffn,)."""
        return self._placed(self._found.norms)

    @property
    def means(self) -> torch.Tensor:
        """Mean h_j of each FFN neuron, (ffn,)."""
        return self._placed(self._found.means)

    def token_weights(self, component: str) -> torch.Tensor | None:
        """‖g‖² of each calibration token at the component's outputs, (tokens,), None without gradients."""
        return self._found.weights.get(component)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.settings.device).double()


@dataclass(frozen=True)
class Moments:
    """What the compressed model's own inputs x̂ of a stage say in some windows (sequential.py); w weighs tokens. float64.

    Sums over those windows divided by the number of all tokens, so that moments of parts add up. s: Σ w x̂ x̂ᵀ (n̂, n̂).
    cross: Σ w x x̂ᵀ (n, n̂), x the original inputs. drift: Σ w d x̂ᵀ (hidden, n̂), d what the residual stream lacks of the
    original's; None where the outputs do not join it directly.
    """

    s: torch.Tensor
    cross: torch.Tensor
    drift: torch.Tensor | None

    def residual(self, start: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Σ w (W x + d - W₀ x̂) x̂ᵀ, (n_out, n̂): what W₀ = `start` leaves of the outputs that W = `original` gave."""
        found = original @ self.cross - start @ self.s
        return found if self.drift is None else found + self.drift


@dataclass(frozen=True)
class Correction:
    """Moments of two halves of the windows, so that what is fitted on one can be judged on the other."""

    halves: tuple[Moments, Moments]

    @property
    def s(self) -> torch.Tensor:
        """Σ w x̂ x̂ᵀ over all windows."""
        return self.halves[0].s + self.halves[1].s


class Rewriter(Protocol):
    """Makes one layer's new tensors, in the order of calibration.STAGES."""

    def stage(self, name: str, correction: Correction | None) -> dict[str, torch.Tensor]:
        """Tensors of the stage's modules by full name, in float64; all weights of the stage, changed or not."""
        ...


class Method(Protocol):
    """One way to compress: analyse each layer, plan over all, rewrite each layer."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    def check(self, model: ModelView) -> None:
        """Refuse what the method cannot do, before any minute of computing. Raises UserError."""
        ...

    @property
    def published(self) -> bool:
        """Whether it is as published: without structures, forms of factors, gradients or a correction to choose."""
        ...

    def gradient_windows(self, settings: CompressionSettings) -> int | None:
        """How many calibration windows the method wants gradients of; None: all."""
        ...

    def analysis_key(self, settings: CompressionSettings) -> dict[str, object]:
        """The settings that `analyse` depends on."""
        ...

    def analyse(self, view: LayerView) -> Analysis: ...

    def plan(self, model: ModelView, analyses: list[Analysis]) -> Plan: ...

    def rewriter(self, view: LayerView, layouts: Mapping[str, MatrixLayout], analysis: Analysis) -> Rewriter: ...
