"""Methods × rates of compression of one model, measured against the dense model in the same run.

Everything is checked before anything is computed. The result is written after every cell, so that an interrupted
comparison goes on where it was.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_checks.compare_cell import Job, Ruler, add_tasks, make_cell
from runtime_checks.compare_labels import folder_name
from runtime_checks.compare_schema import (
    COMPARISON,
    Cell,
    Comparison,
    read_comparison,
    write_comparison,
)
from runtime_checks.machine import checked_threads, run_record
from runtime_checks.protocol import make_protocol
from runtime_checks.schema import Perplexity
from runtime_checks.study import Common, begun, check_place, checked_settings, study_protocol
from runtime_checks.study_schema import StudyProtocol
from runtime_checks.task_files import read_tasks
from runtime_checks.task_schema import TaskFile
from runtime_checks.tasks import check_tasks, describe, measure_checkpoint
from sola_edge.checkpoint import PROVENANCE, Checkpoint, copy_checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_folder_target, replace_file
from sola_edge.progress import console
from sola_edge.texts import DEFAULT_SCORING, load_text

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Scoring:
    """The text that perplexity is measured on, in non-overlapping windows of `context` tokens, and zero-shot task files."""

    text: str = DEFAULT_SCORING
    context: int = 2048
    windows: int = 40
    threads: int | None = None
    tasks: tuple[Path, ...] = ()
    questions: int | None = None  # of each task, at most


def compare(
    model: str | Path,
    out: Path,
    labels: Sequence[str],
    rates: Sequence[float],
    common: Common,
    scoring: Scoring,
    *,
    keep: bool = False,
) -> Comparison:
    """Fill the folder `out` with compare.json, compare.md and compare.png; keep: also the checkpoints.

    labels: METHOD[:OPTION…], see compare_labels.py. Raises UserError for bad input before anything is computed, and for what
    goes wrong later with the machine (a full disk), when what was measured is kept.
    """
    out = Path(out)
    check_place(out, COMPARISON)
    source = open_checkpoint(model)
    jobs = _jobs(source, out, labels, rates, common)
    protocol, ruler = _protocol(Path(model).resolve().name, source, common, scoring)
    run = _Run(source, out, common, ruler, keep)
    run.begin(begun(out / COMPARISON, read_comparison, protocol, "comparison", "give another folder"), protocol, jobs)
    try:
        run.all(jobs)
    finally:
        with suppress(OSError):  # not empty, or never made
            (out / CHECKPOINTS).rmdir()
    _write_readable(run.found, out)
    return run.found


def _jobs(source: Checkpoint, out: Path, labels: Sequence[str], rates: Sequence[float], common: Common) -> list[Job]:
    """Every cell that is asked for, checked. Raises UserError for the first that cannot be."""
    if not labels or not rates:
        raise UserError("nothing to compare: give at least one method and one rate")
    found = []
    for label in labels:
        for rate in rates:
            settings = checked_settings(source, label, rate, common)
            folder = out / CHECKPOINTS / folder_name(label, rate)
            check_folder_target(folder, PROVENANCE)
            found.append(Job(label, rate, settings, folder))
    return found


def _protocol(name: str, source: Checkpoint, common: Common, scoring: Scoring) -> tuple[StudyProtocol, Ruler]:
    """What all cells share. Raises UserError for texts that are missing or too short."""
    tokenizer = source.tokenizer()
    text = load_text(scoring.text)
    scored = make_protocol(text.joined, tokenizer, scoring.context, scoring.windows, text.name)
    protocol = study_protocol(name, source, common, scored, tokenizer)
    threads = checked_threads(scoring.threads)
    if scoring.questions is not None and not scoring.tasks:
        raise UserError("a limit of questions says nothing without a task: name a task file too")
    tasks = read_tasks(scoring.tasks, scoring.questions) if scoring.tasks else []
    check_tasks(source, tasks)
    return protocol, Ruler(text, scoring.context, scoring.windows, threads, scored.ids_sha256, tasks)


def _asked(files: Sequence[TaskFile]) -> set[tuple[str, str, int]]:
    """What was asked, wherever the files are and in whichever order."""
    return {(file.name, file.sha256, file.questions) for file in files}


def _ordered(cells: Sequence[Cell], jobs: Sequence[Job]) -> list[Cell]:
    """The cells by label, those asked for first, and by rate."""
    labels = list(dict.fromkeys([*(job.label for job in jobs), *(cell.label for cell in cells)]))
    return sorted(cells, key=lambda cell: (labels.index(cell.label), cell.rate))


class _Run:
    """The comparison as it grows; on disk after every step."""

    def __init__(self, source: Checkpoint, out: Path, common: Common, ruler: Ruler, keep: bool) -> None:
        self.source, self.out, self.common, self.ruler, self.keep = source, out, common, ruler, keep
        self.found: Comparison

    def begin(self, known: Comparison | None, protocol: StudyProtocol, jobs: Sequence[Job]) -> None:
        """What is known goes on. Raises UserError where its tasks are others than those asked for."""
        files = describe(self.ruler.tasks)
        if known and files and known.task_files and _asked(known.task_files) != _asked(files):
            raise UserError(f"{self.out} holds a comparison on other tasks or questions; give another folder")
        self.found = Comparison(
            **(self._record if known is None else {name: getattr(known, name) for name in self._record}),
            protocol=protocol,
            dense=known.dense if known else None,
            cells=_ordered(known.cells if known else [], jobs),
            task_files=files or (known.task_files if known else []),
            dense_tasks=known.dense_tasks if known else [],
        )
        write_comparison(self.found, self.out / COMPARISON)

    @property
    def _record(self) -> dict[str, Any]:
        return run_record(self.ruler.threads)

    def _add(self, **figures: Any) -> None:
        self.found = self.found.model_copy(update={**figures, **self._record})
        write_comparison(self.found, self.out / COMPARISON)

    def all(self, jobs: Sequence[Job]) -> None:
        """The dense model and every cell that is not done."""
        if self.found.dense is None or (self.ruler.tasks and not self.found.dense_tasks):
            self._dense()
        for number, job in enumerate(jobs, 1):
            if self._done(job):
                continue
            console.print(f"{number} of {len(jobs)}: {job.label} at rate {job.rate:g}", markup=False)
            try:
                cell = self._cell(job)
            finally:
                if not self.keep:
                    shutil.rmtree(job.folder, ignore_errors=True)
            others = [c for c in self.found.cells if (c.label, c.rate) != (job.label, job.rate)]
            self._add(cells=_ordered([*others, cell], jobs))

    def _cell(self, job: Job) -> Cell:
        assert self.found.dense is not None
        known, about = self._known(job), (self.source, self.common.calibration, self.ruler)
        grown = add_tasks(job, *about, known, self.found.dense_tasks) if known else None
        return grown or make_cell(job, *about, self.found.dense, self.found.dense_tasks)

    def _known(self, job: Job) -> Cell | None:
        """What was measured of the job. Cells without a figure are tried again: that takes little, the cause may be gone."""
        cell = self.found.cell(job.label, job.rate)
        return cell if cell and cell.status == "measured" and cell.settings == job.settings.as_dict() else None

    def _done(self, job: Job) -> bool:
        cell = self._known(job)
        return cell is not None and (bool(cell.tasks) or not self.ruler.tasks)

    def _dense(self) -> None:
        """The dense model's figures; a .gguf file goes through a folder, for PyTorch. Raises UserError when it has none."""
        console.print("the dense model", markup=False)
        folder = self.source.path
        copy = self.out / CHECKPOINTS / "dense"
        try:
            if not folder.is_dir():
                copy_checkpoint(self.source, copy)
                folder = copy
            if self.found.dense is None:
                self._add(dense=self._measured(folder))
            if self.ruler.tasks:
                found = measure_checkpoint("dense", folder, self.ruler.tasks, threads=self.ruler.threads)
                self._add(dense_tasks=found)
        finally:
            if not self.keep:
                shutil.rmtree(copy, ignore_errors=True)

    def _measured(self, folder: Path) -> Perplexity:
        found, reasons = self.ruler.measure(folder)
        if found is None or found.value is None:
            raise UserError(f"the dense model has no perplexity to compare with: {'; '.join(reasons)}")
        return found


def _write_readable(found: Comparison, out: Path) -> None:
    from runtime_checks.compare_plot import write_plot
    from runtime_checks.compare_table import markdown

    with replace_file(out / "compare.md") as partial:
        partial.write_text(markdown(found), encoding="utf-8")
    write_plot(found, out / "compare.png")
