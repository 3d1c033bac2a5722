"""What was done to every layer of a compressed checkpoint, from its layouts and its sola.json."""

import statistics
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from runtime_checks.explain_schema import PREMISE, Explanation, Form, LayerFound, Matrix, NormShare, Unit
from sola_edge.architecture import ATTENTION, COMPONENTS, FFN, matrix_shape
from sola_edge.checkpoint import PROVENANCE, Checkpoint, open_checkpoint
from sola_edge.config import MatrixLayout, rate_of
from sola_edge.errors import UserError


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
