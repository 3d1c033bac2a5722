"""Accuracies by lm-evaluation-harness, as data. Version 1; validated when they are written or read. Shares are fractions."""

from typing import Literal

from runtime_checks.frozen import Frozen
from runtime_checks.schema import Kind, RunRecord, Skipped
from runtime_checks.task_schema import Difference, Share


class AskedTask(Frozen):
    """A task. source: the file of its questions, or lm-evaluation-harness; version: the harness's, of a task of its own.

    sha256: of the file, or of the questions that the harness has.
    """

    name: str
    source: str
    sha256: str
    version: str
    questions: int  # that were asked


class AccuracyResult(Frozen):
    """An artefact in a runtime on one task.

    metrics: all that the harness tells of the task; metric: the one whose `values` by question are kept, and paired with those
    of the first artefact (difference: null for that one). measured: when (UTC, ISO 8601), where an earlier run's was used.
    """

    artefact: str
    kind: Kind
    precision: str
    runtime: str
    version: str
    task: str
    n: int
    metric: str
    metrics: dict[str, Share]
    values: list[float]
    difference: Difference | None
    seconds: float
    measured: str | None = None


class AccuracyReport(RunRecord):
    """Every artefact on every task. reasons: what failed."""

    schema_version: Literal[1] = 1
    packages: dict[str, str]
    tasks: list[AskedTask]
    results: list[AccuracyResult]
    skipped: list[Skipped]
    reasons: list[str]

    @property
    def passed(self) -> bool:
        """Whether everything could be measured."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The reasons, as other studies call them."""
        return self.reasons
