"""One cell of a comparison: compress, measure, compare with the dense model window by window."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime_checks.checks import measure_perplexity
from runtime_checks.compare_schema import Cell, Seconds
from runtime_checks.estimates import exponential, paired_rise
from runtime_checks.memory import resident
from runtime_checks.schema import Perplexity
from runtime_checks.task_files import Task
from runtime_checks.task_schema import TaskResult
from runtime_checks.tasks import measure_checkpoint
from sola_edge.checkpoint import Checkpoint
from sola_edge.compress import prepare
from sola_edge.config import CompressionSettings
from sola_edge.errors import NotFinite, Unreachable, UserError
from sola_edge.planning import Plan
from sola_edge.texts import Text

PEAK_SWITCH = Path("/proc/self/clear_refs")  # Linux: writing 5 starts the resident peak anew


@dataclass(frozen=True)
class Job:
    """What a cell is asked, and where its checkpoint goes."""

    label: str
    rate: float
    settings: CompressionSettings
    folder: Path

    def cell(self, **values: object) -> Cell:
        """The cell with these figures."""
        about = {"label": self.label, "rate": self.rate, "settings": self.settings.as_dict()}
        return Cell.model_validate({**about, **values})


@dataclass(frozen=True)
class Ruler:
    """How every model of a comparison is measured; `ids_sha256` are the ids that must be scored."""

    text: Text
    context: int
    windows: int
    threads: int
    ids_sha256: str
    tasks: list[Task] = field(default_factory=list)

    def measure(self, folder: Path) -> tuple[Perplexity | None, list[str]]:
        """Perplexity in PyTorch in a fresh process, or why there is none. Raises UserError when the ids would be others."""
        report = measure_perplexity(
            folder,
            self.text.joined,
            text_name=self.text.name,
            context=self.context,
            windows=self.windows,
            threads=self.threads,
        )
        if report.protocols[0].ids_sha256 != self.ids_sha256:
            raise UserError(f"{folder}'s tokenizer turns the text into other ids than the model's; compare anew")
        return report.results[0].perplexity, report.results[0].reasons


def make_cell(
    job: Job, source: Checkpoint, calibration: str, ruler: Ruler, dense: Perplexity, dense_tasks: Sequence[TaskResult]
) -> Cell:
    """Compress and measure. A rate that cannot be reached is a cell that says so, and so are weights that are not finite.

    Raises UserError for all else: a full disk would spoil the other cells too.
    """
    counted = _forget_peak()
    start = time.perf_counter()
    try:
        run = prepare(source, job.settings, calibration)
        prepared = time.perf_counter()
        run.write(job.folder)
    except Unreachable as error:
        return job.cell(status="unreachable", reason=str(error))
    except NotFinite as error:
        return job.cell(status="failed", reason=str(error))
    written = time.perf_counter()
    peak = resident()["peak"] if counted else None
    plan = run.plan
    # without gradients the method's losses are shares of energy, which order matrices and are no nats
    predicts = bool(plan.predicted_loss) and run.statistics.gradient_windows > 0
    del run
    found, reasons = ruler.measure(job.folder)
    seconds = Seconds(prepare=prepared - start, write=written - prepared, measure=time.perf_counter() - written)
    made: dict[str, object] = {
        "achieved": plan.rate,
        "predicted": sum(plan.predicted_loss.values()) if predicts else None,
        "seconds": seconds,
        "peak_memory": peak,
        "perplexity": found,
    }
    if found is None or found.value is None:
        return job.cell(status="failed", reason="; ".join(reasons) or "no perplexity", **made)
    rise = paired_rise(dense, found)
    return _with_tasks(job.cell(status="measured", rise=rise, ratio=exponential(rise), **made), job, ruler, dense_tasks)


def add_tasks(
    job: Job, source: Checkpoint, calibration: str, ruler: Ruler, known: Cell, dense_tasks: Sequence[TaskResult]
) -> Cell | None:
    """A measured cell with zero-shot tasks too: its model is made anew, its other figures stay.

    None where the plan is another than that of the figures (other libraries, another processor): the cell is then to be
    made anew. Where the tasks cannot be scored the cell stays as it was, with the reason.
    """
    try:
        run = prepare(source, job.settings, calibration)
        if not _same_plan(run.plan, known):
            return None
        run.write(job.folder)
    except (Unreachable, NotFinite) as error:
        return known.model_copy(update={"reason": str(error)})
    return _with_tasks(known, job, ruler, dense_tasks)


def _same_plan(plan: Plan, known: Cell) -> bool:
    """Whether it removes and predicts what the cell says; sums may differ in their last digits."""
    predicted = sum(plan.predicted_loss.values())
    alike = known.predicted is None or math.isclose(predicted, known.predicted, rel_tol=1e-4)
    return plan.rate == known.achieved and alike


def _with_tasks(cell: Cell, job: Job, ruler: Ruler, dense_tasks: Sequence[TaskResult]) -> Cell:
    """The cell with the tasks that were asked for; where they cannot be scored it stays as it is, with the reason."""
    if not ruler.tasks:
        return cell
    try:
        found = measure_checkpoint(job.folder.name, job.folder, ruler.tasks, dense_tasks, threads=ruler.threads)
    except UserError as error:
        return cell.model_copy(update={"reason": str(error)})
    return cell.model_copy(update={"tasks": found, "reason": None})


def _forget_peak() -> bool:
    """Start this process's resident peak anew; False where the system has no such switch."""
    try:
        PEAK_SWITCH.write_text("5")
    except OSError:
        return False
    return True
