"""Stored tensors beside what the exporter makes of the checkpoint's: encoded alike they are equal, decoded they tell how."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime_checks.diagnosis.difference import Matrix, difference, limits_of
from runtime_checks.schema import Finding

Encoded = tuple[npt.NDArray[np.generic], ...]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file and how the checkpoint's values become it; one is in memory at a time.

    kind: its type. shapes: the file's and the exporter's. values: the checkpoint's, before they are rounded. encode: as the
    exporter rounds them, None where only another tool does. remade: made of other factors, of which another machine may take
    others with the same product: a difference explains a failure, but is none.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    stored: Callable[[], Encoded]
    values: Callable[[], Matrix]
    encode: Callable[[Matrix], Encoded] | None
    decode: Callable[[Encoded], Matrix]
    remade: bool = False


def compare_weights(tensors: Iterable[Stored]) -> list[Finding]:
    """What differs."""
    findings = []
    for tensor in tensors:
        detail = _difference(tensor)
        if detail is not None:
            findings.append(Finding(what="weight", where=tensor.name, detail=detail, fails=not tensor.remade))
    return findings


def _difference(tensor: Stored) -> str | None:
    has, wanted = tensor.shapes
    if has != wanted:
        return f"has shape {has}, the checkpoint's {wanted}"
    stored, expected = tensor.stored(), tensor.values()
    if tensor.encode is not None:
        encoded = tensor.encode(expected)
        if all(map(np.array_equal, stored, encoded)):
            return None
        expected = tensor.decode(encoded)
    return difference(tensor.decode(stored), expected, limits_of(tensor.kind, tensor.encode is not None))


def names_differ(found: Iterable[str], expected: Iterable[str], what: str) -> list[Finding]:
    """What one of them has and the other has not: it explains a failure, but an older exporter's file may compute the same."""
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    told = {"is missing": missing, "is not of the checkpoint's export": more}
    return [explanation(f"{what} {{}}", names, detail) for detail, names in told.items() if names]


def explanation(where: str, names: list[str], detail: str) -> Finding:
    """One finding that fails nothing by itself, of one or more places that have the same."""
    rest = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return Finding(what="graph", where=where.format(names[0]) + rest, detail=detail, fails=False)
