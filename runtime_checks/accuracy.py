"""check accuracy: zero-shot accuracy by lm-evaluation-harness, of checkpoints and of exported files in their own runtimes.

Checkpoints run in the harness's own back end for transformers, in fp32; ONNX folders and GGUF files in a child process of
each runtime, behind an adapter of ours (harness.py). Tasks are the harness's own, by name (it fetches their data), or files of
questions (task_files.py), which need no network. No BOS is put before a text.

The first artefact is what the others are compared with, question by question: the standard error of a difference is paired.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime_checks.accuracy_schema import AccuracyReport, AccuracyResult, AskedTask
from runtime_checks.checks import named_subjects
from runtime_checks.harness import (
    Evaluated,
    RuntimeModel,
    asked_of,
    evaluate,
    file_task,
    named_task,
    transformers_model,
)
from runtime_checks.kept import Kept
from runtime_checks.machine import checked_threads, packages, run_record
from runtime_checks.process import CheckError
from runtime_checks.runtimes.devices import CPU
from runtime_checks.schema import Skipped
from runtime_checks.subject import Subject
from runtime_checks.task_files import read_tasks
from runtime_checks.task_schema import Difference, Share
from runtime_checks.tasks import loaded, pytorch_threads
from sola_edge.checkpoint import load_tokenizer, open_checkpoint
from sola_edge.errors import UserError

MEAN = "acc_norm"  # where a task has it: as ARC, PIQA and HellaSwag are told


@dataclass(frozen=True)
class _Asked:
    """A task of the harness, and what the report says of it."""

    task: Any
    described: AskedTask


def measure_accuracy(
    artefacts: Sequence[Path],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    tokenizer_from: Path | None = None,
    device: str = CPU,
    kept: Kept | None = None,
) -> AccuracyReport:
    """Every artefact in every runtime that takes it on `device` (of `runtimes`, where given) on every task.

    tasks: files of questions (a path that ends in .jsonl) or the harness's names. limit: questions of each, at most. kept:
    where results of earlier runs are, to be used again. Raises UserError for bad input, before anything is computed; a
    runtime that fails is a reason in the report.
    """
    threads = checked_threads(threads)
    skipped: list[Skipped] = []
    subjects = named_subjects(artefacts, runtimes, skipped, device)
    asked = _tasks(tasks, limit)
    tokenizers = {s.artefact.path: load_tokenizer(tokenizer_from or s.artefact.path) for s in subjects}
    record = run_record(threads)
    run = _Run(asked, limit, threads, tokenizers, tokenizer_from, kept, record["created"])
    results = [result for subject in subjects for result in run.measure(subject)]
    first = {r.task: r for r in results if (r.artefact, r.runtime) == _key(subjects[0])}
    return AccuracyReport(
        **record,
        packages=packages("lm-eval"),
        tasks=[one.described for one in asked],
        results=[_paired(first.get(result.task), result) for result in results],
        skipped=skipped,
        reasons=[reason for subject in subjects for reason in subject.reasons],
    )


def _key(subject: Subject) -> tuple[str, str]:
    return str(subject.artefact.path), subject.row.label


def _tasks(names: Sequence[str], limit: int | None) -> list[_Asked]:
    """Raises UserError for a file that is none, a name that the harness does not know, and data that it cannot fetch."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is out of range: give at least 1 question")
    if not names:
        raise UserError("no task was named: give files of questions (.jsonl) or names of lm-evaluation-harness")
    files = [Path(name) for name in names if name.endswith(".jsonl")]
    read = {str(task.path): task for task in (read_tasks(files, limit) if files else [])}
    found = []
    for name in names:
        if name.endswith(".jsonl"):
            task = read[str(Path(name))]
            made, source, sha256 = file_task(task), str(task.path), task.sha256
        else:
            made, source, sha256 = named_task(name), "lm-evaluation-harness", None
        found.append(_Asked(made, asked_of(made, source, sha256, limit)))
    named = [one.described.name for one in found]
    if len(set(named)) < len(named):
        raise UserError(
            f"two tasks are called alike ({', '.join(named)}): give each once, files under names of their own"
        )
    return found


@dataclass(frozen=True)
class _Run:
    """What is asked of every subject."""

    asked: list[_Asked]
    limit: int | None
    threads: int
    tokenizers: dict[Path, Any]
    tokenizer_from: Path | None
    kept: Kept | None
    created: str

    def measure(self, subject: Subject) -> list[AccuracyResult]:
        """Its results in the order of the tasks, without differences; what failed is among the subject's reasons."""
        found = {one.described.name: self._find(subject, one) for one in self.asked}
        missing = [one for one in self.asked if found[one.described.name] is None]
        try:
            for one, result in self._ask(subject, missing):
                found[one.described.name] = result
                if self.kept is not None:
                    self.kept.keep(
                        result.model_copy(update={"measured": self.created}), self._place(self.kept, subject, one)
                    )
        except CheckError as error:
            subject.reasons.append(str(error))
        return [result for result in found.values() if result is not None]

    def _find(self, subject: Subject, one: _Asked) -> AccuracyResult | None:
        if self.kept is None:
            return None
        found = self.kept.find(AccuracyResult, self._place(self.kept, subject, one))
        return found.model_copy(update={"artefact": str(subject.artefact.path)}) if found else None

    def _place(self, kept: Kept, subject: Subject, one: _Asked) -> Path:
        tokenizer = kept.hashes(self.tokenizer_from) if self.tokenizer_from else None
        task = one.described.model_dump(exclude={"source"})
        return kept.place(subject.artefact, subject.row.label, self.threads, task=task, tokenizer=tokenizer)

    def _ask(self, subject: Subject, missing: list[_Asked]) -> Iterator[tuple[_Asked, AccuracyResult]]:
        """Raises CheckError where the runtime fails, or a likelihood is not finite."""
        if not missing:
            return
        with _model(subject, self.threads, self.tokenizers[subject.artefact.path]) as model:
            for one in missing:
                start = time.perf_counter()
                found = evaluate(model, one.task, self.limit)
                yield one, _result(subject, one, found, time.perf_counter() - start)


def _result(subject: Subject, one: _Asked, found: Evaluated, seconds: float) -> AccuracyResult:
    lost = sum(not math.isfinite(value) for value in found.likelihoods)
    if lost:
        where = f"{subject.row.label} on {subject.artefact.path}"
        raise CheckError(f"{where}: {lost} answers of {one.described.name} have no finite likelihood")
    metric = MEAN if MEAN in found.metrics else next(iter(found.metrics))
    return AccuracyResult(
        artefact=str(subject.artefact.path),
        kind=subject.artefact.kind,
        precision=subject.precision,
        runtime=subject.row.label,
        version=subject.version,
        task=one.described.name,
        n=found.questions,
        metric=metric,
        metrics={name: share(values) for name, values in found.metrics.items()},
        values=found.metrics[metric],
        difference=None,
        seconds=seconds,
    )


def share(values: Sequence[float]) -> Share:
    """The mean of a figure per question and its standard error, the sample's deviation / sqrt(n), as the harness has it."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Share(value=float(np.mean(values)), standard_error=deviation / math.sqrt(len(values)))


def paired(before: AccuracyResult, after: AccuracyResult) -> Difference:
    """The mean difference on the same questions and its standard error."""
    found = share([b - a for a, b in zip(before.values, after.values, strict=True)])
    return Difference(baseline=before.artefact, value=found.value, standard_error=found.standard_error)


def _paired(first: AccuracyResult | None, result: AccuracyResult) -> AccuracyResult:
    """With the difference to the first artefact's result, where that is another one and there."""
    if first is None or first is result:
        return result
    return result.model_copy(update={"difference": paired(first, result)})


@contextmanager
def _model(subject: Subject, threads: int, tokenizer: Any) -> Iterator[Any]:
    """What the harness asks."""
    path = subject.artefact.path
    if subject.artefact.kind == "checkpoint":
        with loaded(open_checkpoint(path)) as model:
            import transformers

            subject.version = f"transformers {transformers.__version__}"
            with pytorch_threads(threads):
                yield transformers_model(model.to(subject.row.known), tokenizer)
        return
    yield RuntimeModel(subject, tokenizer, threads)
