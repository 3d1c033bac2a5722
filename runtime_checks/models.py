"""What the report says of a model, read from its checkpoint: parameters, how it was made, what was done to each layer."""

from pathlib import Path

from runtime_checks.explain import explain
from runtime_checks.schema import Model
from sola_edge.checkpoint import open_checkpoint


def describe(name: str, path: Path) -> Model:
    """Raises UserError for a damaged checkpoint."""
    checkpoint = open_checkpoint(path)
    return Model(
        name=name,
        checkpoint=str(path),
        architecture=checkpoint.config.model_type,
        parameters=checkpoint.parameters(),
        provenance=_brief(checkpoint.provenance),
        explained=explain(path) if checkpoint.layout else None,
    )


def _brief(provenance: dict[str, object]) -> dict[str, object]:
    """The settings of sola.json, without its long tables (per-matrix figures, per-layer statistics, file hashes)."""
    return {key: value for key, value in provenance.items() if not isinstance(value, list) and _short(value)}


def _short(value: object) -> bool:
    return not isinstance(value, dict) or (
        len(value) <= 24 and not any(isinstance(v, dict | list) for v in value.values())
    )
