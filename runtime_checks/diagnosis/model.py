"""Which model a file was made of, as compression notes it: a compressed model beside a dense one is no export to compare."""

import math
from typing import Any

from runtime_checks.artefacts import Artefact
from runtime_checks.diagnosis.declared import marker
from runtime_checks.schema import Finding
from sola_edge.checkpoint import open_checkpoint
from sola_edge.gguf_source import field, open_gguf

EXACT = 1e-6  # of a rate that is stored as a float32


def compare_models(artefact: Artefact, reference: Artefact) -> list[Finding]:
    """A finding where they are compressed otherwise: it explains why nothing else fits."""
    (method, rate), (other, wanted) = _compression(artefact), _compression(reference)
    if method == other and math.isclose(rate, wanted, rel_tol=EXACT):
        return []
    detail = f"it is {_described(method, rate)}, the reference {_described(other, wanted)}"
    remedy = "two models are compared with --compression-cost"
    return [Finding(what="model", where=artefact.path.name, detail=f"{detail}; {remedy}", fails=False)]


def _compression(artefact: Artefact) -> tuple[str, float]:
    """(method, rate), "" for a dense model."""
    if artefact.kind == "gguf":
        reader = open_gguf(artefact.path)
        told: dict[str, Any] = {key: field(reader, f"sola.{key}") for key in ("method", "rate")}
    elif artefact.kind == "onnx":
        told = marker(artefact.path) or {}
    else:
        told = open_checkpoint(artefact.path).provenance
    return str(told.get("method") or ""), float(told.get("rate") or 0.0)


def _described(method: str, rate: float) -> str:
    return f"compressed by {rate:.4g} ({method})" if method else "dense"
