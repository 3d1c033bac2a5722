"""What was done to every layer of a compressed checkpoint, from its layouts and its sola.json.

Units: parameters; predicted losses in nats per token of the calibration text where the method took gradients, else shares
of the matrix's output energy (`unit`). What sola.json does not tell (another method, an older file) is null.
"""

import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from runtime_checks.schema import Frozen
from sola_edge.architecture import ATTENTION, COMPONENTS, FFN, matrix_shape
from sola_edge.checkpoint import PROVENANCE, Checkpoint, open_checkpoint
from sola_edge.config import MatrixLayout, rate_of
from sola_edge.errors import UserError

Form = Literal["whole", "plain", "pivoted"]
Unit = Literal["nats", "share of the output's energy"]
PREMISE = (0.15, 0.95)  # SoLA (AAAI 2025): this share of the neurons carries this share of the norm


class Matrix(Frozen):
    """One matrix as it is stored. rank: null of a whole one. parameters: with its bias; the dense one's likewise.

    predicted: rise of the loss that the plan gives to it alone (attention). retained: energy that its factors keep.
    """

    form: Form
    rank: int | None
    prime: int
    n_out: int
    n_in: int
    parameters: int
    parameters_dense: int
    predicted: float | None
    retained: float | None

    @property
    def share(self) -> float:
        """Of the dense matrix's parameters, what is left."""
        return self.parameters / self.parameters_dense

    @property
    def text(self) -> str:
        """The form in words."""
        return self.form if self.rank is None else f"{self.form} {self.rank}"


class LayerFound(Frozen):
    """One decoder layer. predicted_attention: of its four matrices; predicted_ffn: of its three and the dropped neurons."""

    layer: int
    neurons: int
    neurons_dense: int
    prime: int
    matrices: dict[str, Matrix]  # by component
    predicted_attention: float | None
    predicted_ffn: float | None
    norms: list[float] | None  # the share of the summed mean |h| that the largest `norm_neurons` carry

    @property
    def share(self) -> float:
        """Of the dense layer's matrices, the parameters that are left."""
        matrices = self.matrices.values()
        return sum(m.parameters for m in matrices) / sum(m.parameters_dense for m in matrices)


class NormShare(Frozen):
    """The share of the norm that the largest `neurons` (a share) of a layer's neurons carry, over the layers."""

    neurons: float
    minimum: float
    median: float
    maximum: float


class Explanation(Frozen):
    """A compressed checkpoint."""

    checkpoint: str
    architecture: str
    method: str | None
    settings: dict[str, int | float | str | None]
    calibration: str | None
    parameters: int
    parameters_dense: int
    rate: float
    predicted: float | None
    unit: Unit | None
    norm_neurons: list[float] | None
    norm_share: NormShare | None
    layers: list[LayerFound]

    @property
    def neurons(self) -> tuple[int, int]:
        """Kept and dense neurons of all layers."""
        return sum(row.neurons for row in self.layers), sum(row.neurons_dense for row in self.layers)


class _Plan(BaseModel):
    predicted_loss: dict[str, float] = Field(default_factory=dict)
    retained_energy: dict[str, float] = Field(default_factory=dict)


class _Curve(BaseModel):
    neurons: list[float]
    norm: list[list[float]]


class _Record(BaseModel):
    """What of sola.json is read here."""

    method: str | None = None
    settings: dict[str, int | float | str | None] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    calibration_nll: float | None = None
    norm_curve: _Curve | None = None
    plan: _Plan = Field(default_factory=_Plan)


def explain(path: str | Path) -> Explanation:
    """Read a compressed checkpoint's layouts and plan. Raises UserError for a dense or damaged one."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.layout:
        raise UserError(f"{path} is a dense model: there is nothing to explain; give what sola-edge compress wrote")
    record = _record(checkpoint)
    layers = [_layer(checkpoint, record, number) for number in range(checkpoint.layers)]
    matrices = [matrix for row in layers for matrix in row.matrices.values()]
    removed = sum(m.parameters_dense - m.parameters for m in matrices)
    parameters = checkpoint.parameters()
    predicted, curve = record.plan.predicted_loss, record.norm_curve
    unit: Unit = "share of the output's energy" if record.calibration_nll is None else "nats"
    return Explanation(
        checkpoint=str(path),
        architecture=checkpoint.config.model_type,
        method=record.method,
        settings=record.settings,
        calibration=_calibration(record.calibration),
        parameters=parameters,
        parameters_dense=parameters + removed,
        rate=rate_of(removed, parameters + removed),
        predicted=sum(predicted.values()) if predicted else None,
        unit=unit if predicted else None,
        norm_neurons=curve.neurons if curve else None,
        norm_share=_norm_share(curve) if curve else None,
        layers=layers,
    )


def _record(checkpoint: Checkpoint) -> _Record:
    path = checkpoint.path / PROVENANCE
    try:
        record = _Record.model_validate(checkpoint.provenance)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged ({where}: {first['msg']}); compress the model again") from error
    curve = record.norm_curve
    if curve and (len(curve.norm) != checkpoint.layers or any(len(row) != len(curve.neurons) for row in curve.norm)):
        raise UserError(f"{path} is damaged (norm_curve is not one curve per layer); compress the model again")
    return record


def _layer(checkpoint: Checkpoint, record: _Record, number: int) -> LayerFound:
    row, predicted = checkpoint.architecture, record.plan.predicted_loss
    modules = {component: row.module(number, component) for component in COMPONENTS}
    matrices = {component: _matrix(checkpoint, record, component, module) for component, module in modules.items()}
    attention = [matrices[c].predicted for c in ATTENTION if matrices[c].predicted is not None]
    return LayerFound(
        layer=number,
        neurons=matrices["gate"].n_out,
        neurons_dense=checkpoint.config.intermediate_size,
        prime=max(matrices[c].prime for c in FFN),
        matrices=matrices,
        predicted_attention=sum(v for v in attention if v is not None) if attention else None,
        predicted_ffn=predicted.get(modules["down"].rpartition(".")[0]),  # the plan names an FFN as the module it is
        norms=record.norm_curve.norm[number] if record.norm_curve else None,
    )


def _matrix(checkpoint: Checkpoint, record: _Record, component: str, module: str) -> Matrix:
    n_out, n_in = matrix_shape(checkpoint.config, component)
    biased = component in checkpoint.architecture.biased(checkpoint.config)
    layout = checkpoint.layout.get(module) or MatrixLayout(n_out, n_in, 0, 0)
    bias = checkpoint.bias_name(module)
    return Matrix(
        form=_form(layout),
        rank=layout.rank or None,
        prime=layout.prime,
        n_out=layout.n_out,
        n_in=layout.n_in,
        parameters=layout.weights + (layout.n_out if bias else 0),
        parameters_dense=n_out * (n_in + biased),
        predicted=record.plan.predicted_loss.get(module),
        retained=record.plan.retained_energy.get(module),
    )


def _form(layout: MatrixLayout) -> Form:
    if layout.rank == 0:
        return "whole"
    return "pivoted" if layout.pivot else "plain"


def _calibration(record: dict[str, Any]) -> str | None:
    """In words, where it is told."""
    if not {"text", "tokens"} <= set(record):
        return None
    return f"{record['text']}, {record['tokens']} tokens"


def _norm_share(curve: _Curve) -> NormShare | None:
    """At the share of neurons that SoLA's premise is about, where the curve has it."""
    if PREMISE[0] not in curve.neurons:
        return None
    at = curve.neurons.index(PREMISE[0])
    carried = [row[at] for row in curve.norm]
    return NormShare(neurons=PREMISE[0], minimum=min(carried), median=statistics.median(carried), maximum=max(carried))
