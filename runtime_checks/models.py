"""What the report says of a model, read from its checkpoint: parameters, how it was made, ranks by layer."""

from pathlib import Path

from runtime_checks.schema import Model, Ranks
from sola_edge.architecture import COMPONENTS, FFN
from sola_edge.checkpoint import Checkpoint, open_checkpoint


def describe(name: str, path: Path) -> Model:
    """Raises UserError for a damaged checkpoint."""
    checkpoint = open_checkpoint(path)
    return Model(
        name=name,
        checkpoint=str(path),
        architecture=checkpoint.config.model_type,
        parameters=checkpoint.parameters(),
        provenance=_brief(checkpoint.provenance),
        ranks=_ranks(checkpoint) if checkpoint.layout else [],
    )


def _brief(provenance: dict[str, object]) -> dict[str, object]:
    """The settings of sola.json, without its long tables (per-matrix figures, per-layer statistics, file hashes)."""
    return {key: value for key, value in provenance.items() if not isinstance(value, list) and _short(value)}


def _short(value: object) -> bool:
    return not isinstance(value, dict) or (
        len(value) <= 24 and not any(isinstance(v, dict | list) for v in value.values())
    )


def _ranks(checkpoint: Checkpoint) -> list[Ranks]:
    return [_layer(checkpoint, layer) for layer in range(checkpoint.layers)]


def _layer(checkpoint: Checkpoint, layer: int) -> Ranks:
    modules = {c: checkpoint.architecture.module(layer, c) for c in COMPONENTS}
    layouts = {c: checkpoint.layout.get(module) for c, module in modules.items()}
    primes = {found.prime for c in FFN if (found := layouts[c]) is not None}
    full = {}
    for component, module in modules.items():
        found = layouts[component]
        shape = (found.n_out, found.n_in) if found else checkpoint.shape(f"{module}.weight")
        full[component] = min(shape)
    ranks = {c: found.rank or None if found else None for c, found in layouts.items()}
    return Ranks(layer=layer, prime=max(primes) if primes else None, ranks=ranks, full=full)
