"""A frontier's data: what `frontier.json` holds. Version 1; validated whenever it is written or read.

Units: bytes, tokens per second, nats, seconds. A figure that was not measured is null.
"""

import statistics
from pathlib import Path
from typing import Literal

from runtime_checks.frozen import Frozen
from runtime_checks.json_file import read_model, write_model
from runtime_checks.schema import Memory, Perplexity, RunRecord, Throughput
from runtime_checks.study_schema import Estimate, Status, StudyProtocol
from sola_edge.errors import UserError

FRONTIER = "frontier.json"
DENSE = "dense"
Speeds = Literal["prefill", "decode"]


class Setting(Frozen):
    """What a cell is of, and its key. label: `dense` at rate 0, else METHOD[:OPTION…]; type: of GGUF, or an ONNX precision."""

    label: str
    rate: float
    type: str
    runtime: str

    @property
    def dense(self) -> bool:
        """Whether it is the dense model, rounded and nothing else."""
        return self.label == DENSE

    @property
    def model(self) -> str:
        """The label and the rate."""
        return self.label if self.dense else f"{self.label} {self.rate:g}"

    def __str__(self) -> str:
        return f"{self.model} {self.type} in {self.runtime}"


class Artefact(Frozen):
    """The exported file or folder, tokenizer included. precision: the tensor type of most weights, as the file has it.

    stored_otherwise: tensors that are of another type than asked, as their rows are no whole blocks. expanded: matrices that
    are larger than in the checkpoint.
    """

    bytes: int
    precision: str
    sha256: dict[str, str]
    stored_otherwise: int
    expanded: int


class CellSeconds(Frozen):
    """What the cell took: writing the file, scoring, memory and speed."""

    export: float
    perplexity: float
    speed: float


class FrontierCell(Frozen):
    """One model in one type in one runtime.

    compression: all that the compression was asked, null for the dense model; with the setting and the protocol it is what
    the cell is known by. achieved: the rate. ratio: perplexity ÷ the reference's, rise: of the mean NLL; their standard errors
    are of the paired difference by window. throughput and baseline were measured in turn, in one run: the baseline is the
    dense model in the runtime's own reference type. memory is that of memory_context tokens; growth: bytes that every further
    one should take where a prompt fills the context (memory_model.py).
    """

    setting: Setting
    compression: dict[str, int | float | str | None] | None
    status: Status
    reason: str | None = None
    achieved: float | None = None
    parameters: int | None = None
    artefact: Artefact | None = None
    perplexity: Perplexity | None = None
    ratio: Estimate | None = None
    rise: Estimate | None = None
    memory: Memory | None = None
    memory_context: int | None = None
    growth: int | None = None
    throughput: Throughput | None = None
    baseline: Throughput | None = None
    version: str = ""
    seconds: CellSeconds | None = None

    def speed_ratio(self, which: Speeds) -> float | None:
        """Tokens per second ÷ the baseline's of the same run."""
        if self.throughput is None or self.baseline is None:
            return None
        return float(getattr(self.throughput, which).median / getattr(self.baseline, which).median)


class Frontier(RunRecord):
    """Models × types × runtimes of one model. reference: what perplexities are divided by.

    created and so on are of the run that last added a figure.
    """

    schema_version: Literal[1] = 1
    protocol: StudyProtocol
    reference: Setting
    cells: list[FrontierCell]

    @property
    def passed(self) -> bool:
        """Whether every reachable cell could be measured."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The cells that could not be measured, and why."""
        return [f"{cell.setting}: {cell.reason}" for cell in self.cells if cell.status == "failed"]

    @property
    def measured(self) -> list[FrontierCell]:
        """The cells that have all figures."""
        return [cell for cell in self.cells if cell.status == "measured"]

    def cell(self, setting: Setting) -> FrontierCell | None:
        """The cell of a setting, where there is one."""
        return next((cell for cell in self.cells if cell.setting == setting), None)

    def speed(self, cell: FrontierCell, which: Speeds) -> float | None:
        """Tokens per second as if all cells had been measured at one time.

        The ratio to the baseline of the cell's own run × the median of that runtime's baselines over all runs: a machine that
        was slower for an hour makes no setting slower.
        """
        ratio = cell.speed_ratio(which)
        if ratio is None:
            return None
        runtime = [c.baseline for c in self.cells if c.setting.runtime == cell.setting.runtime and c.baseline]
        return ratio * statistics.median(getattr(found, which).median for found in runtime)


def write_frontier(frontier: Frontier, path: Path) -> None:
    """Write the data as JSON. Raises UserError if the place is not writable."""
    write_model(frontier, path)


def read_frontier(path: Path) -> Frontier:
    """Read a frontier.json. Raises UserError when it is missing or none."""
    missing = f"no such frontier: {path}; make one with sola-edge check frontier"
    found = read_model(
        Frontier, path, missing=missing, wanted="frontier of schema version 1", remedy="measure anew, with --fresh"
    )
    if found.cells and found.cell(found.reference) is None:
        raise UserError(f"{path} has no cell of its reference, {found.reference}; measure anew, with --fresh")
    return found
