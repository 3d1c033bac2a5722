"""A comparison's data: what `compare.json` holds. Version 1; validated whenever it is written or read.

Units: nats for losses, bytes, seconds. A figure that was not measured or is not predicted is null.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from runtime_checks.frozen import Frozen
from runtime_checks.json_file import read_model, write_model
from runtime_checks.schema import Perplexity, RunRecord
from runtime_checks.study_schema import Estimate, Status, StudyProtocol
from runtime_checks.task_schema import TaskFile, TaskResult

COMPARISON = "compare.json"


class Seconds(Frozen):
    """prepare: statistics, analysis and plan, which later cells find in the cache; write: the layers; measure: perplexity."""

    prepare: float
    write: float
    measure: float


class Cell(Frozen):
    """One method at one rate. `settings` are all that the compression was asked, and the key by which a cell is done.

    ratio: perplexity / the dense model's. rise: of the mean NLL, measured; ratio = exp(rise). Both standard errors are of
    the paired difference by window. predicted: the plan's own rise, on the calibration text and before the correction.
    peak_memory: resident, of the process while it compressed. tasks: zero-shot, paired with the dense model's. reason: why
    there is no figure.
    """

    label: str
    rate: float
    settings: dict[str, int | float | str | None]
    status: Status
    reason: str | None = None
    achieved: float | None = None
    perplexity: Perplexity | None = None
    ratio: Estimate | None = None
    rise: Estimate | None = None
    predicted: float | None = None
    seconds: Seconds | None = None
    peak_memory: int | None = None
    tasks: list[TaskResult] = Field(default_factory=list)


class Comparison(RunRecord):
    """Methods × rates against the dense model, by label and rate in the order they were asked.

    created and so on are of the run that last added a figure.
    """

    schema_version: Literal[1] = 1
    protocol: StudyProtocol
    dense: Perplexity | None  # null until it is measured
    task_files: list[TaskFile] = Field(default_factory=list)
    dense_tasks: list[TaskResult] = Field(default_factory=list)
    cells: list[Cell]

    @property
    def passed(self) -> bool:
        """Whether every reachable cell could be measured, in all that was asked."""
        return all(
            cell.status == "unreachable" or (cell.status == "measured" and not cell.reason) for cell in self.cells
        )

    @property
    def labels(self) -> list[str]:
        """Rows."""
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def rates(self) -> list[float]:
        """Columns."""
        return sorted({cell.rate for cell in self.cells})

    def cell(self, label: str, rate: float) -> Cell | None:
        """The cell of a row and a column, where there is one."""
        return next((c for c in self.cells if (c.label, c.rate) == (label, rate)), None)

    @property
    def predictions(self) -> list[tuple[Cell, float, Estimate]]:
        """(cell, predicted rise, measured rise) of every measured cell whose method predicts."""
        return [(c, c.predicted, c.rise) for c in self.cells if c.predicted is not None and c.rise is not None]


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the data as JSON. Raises UserError if the place is not writable."""
    write_model(comparison, path)


def read_comparison(path: Path) -> Comparison:
    """Read a compare.json. Raises UserError when it is missing or none."""
    missing = f"no such comparison: {path}; make one with sola-edge compare"
    return read_model(Comparison, path, missing=missing, wanted="comparison of schema version 1", remedy="compare anew")
