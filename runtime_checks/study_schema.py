"""What every study (methods × rates, the frontier) has in its data: estimates, and the protocol that its cells share."""

from typing import Any, Literal

from runtime_checks.frozen import Frozen
from runtime_checks.schema import ProtocolRecord

Status = Literal["measured", "unreachable", "failed"]


class Estimate(Frozen):
    """A value and its standard error, null where a single window says nothing of it."""

    value: float
    standard_error: float | None


class CalibrationRecord(Frozen):
    """What was calibrated on."""

    text: str
    sha256: str
    windows: int
    window: int
    tokens: int


class StudyProtocol(Frozen):
    """What all cells share. Figures under different protocols are not compared: a study goes on only under its own."""

    model: str
    weights_sha256: dict[str, str]
    scoring: ProtocolRecord
    calibration: CalibrationRecord
    options: dict[str, int | str | None]
    versions: dict[str, str]

    def difference(self, other: "StudyProtocol") -> str | None:
        """The first thing in which another protocol differs, in words."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        for name in {**mine, **theirs}:
            if name != "model" and mine.get(name) != theirs.get(name):
                return f"{name} {mine.get(name)} there, {theirs.get(name)} now"
        return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {prefix + key: value}
    return found
