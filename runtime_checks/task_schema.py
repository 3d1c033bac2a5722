"""Zero-shot results as data. Validated whenever they are written or read."""

from typing import Literal

from runtime_checks.frozen import Frozen
from runtime_checks.schema import Model, RunRecord
from runtime_checks.task_files import Kind, Metric


class Share(Frozen):
    """A share of the questions, as a fraction."""

    value: float
    standard_error: float


class Difference(Frozen):
    """Accuracy minus that of the checkpoint `baseline` on the same questions, fractions; the error is the paired one."""

    baseline: str
    value: float
    standard_error: float


class TaskFile(Frozen):
    """A task: which questions were asked and how they were judged."""

    name: str
    file: str
    sha256: str  # of the file
    in_file: int  # questions in the file, of which the first `questions` were asked
    questions: int
    choices: int  # of the questions asked, all together
    kind: Kind  # answer: the choices follow the question; fill: the rest of the question follows each choice
    metric: Metric  # what `accuracy` is


class TaskResult(Frozen):
    """One checkpoint on one task."""

    model: str
    task: str
    n: int
    metric: Metric
    accuracy: Share
    acc: Share
    acc_norm: Share | None  # null where every choice is judged by the same words
    difference: Difference | None  # null for the first checkpoint
    chosen: list[int]  # by the metric: one index per question, so that any two results can be paired
    tokens: int  # that the decoder was run on: shared beginnings once, padding included
    positions: int  # that the output head was run on
    seconds: float


class TaskReport(RunRecord):
    """Every checkpoint on every task, checkpoint by checkpoint."""

    schema_version: Literal[1] = 1
    packages: dict[str, str]
    tasks: list[TaskFile]
    models: list[Model]
    results: list[TaskResult]

    def result(self, model: str, task: str) -> TaskResult:
        """The cell of a row and a column."""
        return next(r for r in self.results if (r.model, r.task) == (model, task))
