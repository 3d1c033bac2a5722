"""Zero-shot multiple-choice tasks in PyTorch fp32: checkpoints × task files → accuracies and paired differences.

Standard errors: of an accuracy p over n questions sqrt(p (1 - p) / n). A difference to the first checkpoint is paired: the
mean over questions of (right now) - (right before), whose standard error is those differences' standard deviation / sqrt(n).
Both models answer the same questions, most of them alike, so it is smaller than that of two separate samples.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import sola_edge  # noqa: F401  (teaches transformers to load a compressed checkpoint)
from runtime_checks.checks import new_report
from runtime_checks.json_file import write_model
from runtime_checks.machine import checked_threads
from runtime_checks.metrics import Floats
from runtime_checks.runtimes.torch_ import loading_options
from runtime_checks.schema import Model
from runtime_checks.task_files import Metric, Question, Task, read_tasks
from runtime_checks.task_schema import Difference, Share, TaskFile, TaskReport, TaskResult
from runtime_checks.task_scoring import NothingToScore, encode, log_likelihoods
from runtime_checks.task_trees import Request
from sola_edge.checkpoint import Checkpoint, copy_checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_file_target

Right = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Subject:
    """A checkpoint, and each task in its own ids."""

    name: str
    checkpoint: Checkpoint
    requests: tuple[list[Request], ...]

    def described(self) -> Model:
        kind, parameters = self.checkpoint.config.model_type, self.checkpoint.parameters()
        return Model(name=self.name, checkpoint=str(self.checkpoint.path), architecture=kind, parameters=parameters)


def measure_tasks(
    checkpoints: Sequence[str | Path],
    tasks: Sequence[Path],
    *,
    limit: int | None = None,
    threads: int | None = None,
    output: Path | None = None,
) -> TaskReport:
    """Score every checkpoint (a folder, a .gguf file or a hub id) on every task file, the first checkpoint as the baseline.

    limit: questions of each task, at most. threads: None leaves PyTorch's own. output: a JSON file that is written anew
    after every checkpoint. Raises UserError for bad input, before anything is computed, and for log-likelihoods that are
    not finite.
    """
    if output is not None:
        check_file_target(output)
    read = read_tasks(tasks, limit)
    subjects = [_subject(name, source, read) for name, source in _named(checkpoints).items()]
    if threads is not None:
        torch.set_num_threads(checked_threads(threads))
    results: list[TaskResult] = []
    for count, subject in enumerate(subjects, 1):
        results += _measure_all(subject, read, results[: len(read)])
        report = _report(read, subjects[:count], results)
        if output is not None:
            write_model(report, output)
    return report


def measure_checkpoint(
    name: str, source: str | Path, tasks: list[Task], baseline: Sequence[TaskResult] = (), *, threads: int
) -> list[TaskResult]:
    """One checkpoint on every task, paired with results of another on the same tasks where they are given.

    Raises UserError for log-likelihoods that are not finite.
    """
    with pytorch_threads(threads):
        return _measure_all(_subject(name, str(source), tasks), tasks, baseline)


@contextmanager
def pytorch_threads(threads: int) -> Iterator[None]:
    """So many threads in PyTorch while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_tasks(checkpoint: Checkpoint, tasks: list[Task]) -> None:
    """Raises UserError for a question that the model cannot take."""
    tokenizer = checkpoint.tokenizer()
    for task in tasks:
        _requests(task, tokenizer, checkpoint.path.name, checkpoint.config)


def _named(checkpoints: Sequence[str | Path]) -> dict[str, str]:
    """Short names of checkpoints, the whole path where two end alike. Raises UserError where one is named twice."""
    given = [str(source) for source in checkpoints]
    if not given:
        raise UserError("no checkpoint was named: give one or more checkpoint folders")
    if len({Path(source).resolve() for source in given}) < len(given):
        raise UserError("a checkpoint is named twice: give each one once")
    short = [Path(source).name or source for source in given]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, given, strict=True)}


def _subject(name: str, source: str, tasks: list[Task]) -> _Subject:
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    return _Subject(name, checkpoint, tuple(_requests(task, tokenizer, name, checkpoint.config) for task in tasks))


def _requests(task: Task, tokenizer: Any, model: str, config: Any) -> list[Request]:
    """A task's choices in a model's ids. Raises UserError for one that the model cannot take."""
    lines = [n for n, row in zip(task.lines, task.questions, strict=True) for _ in row.choices]
    try:
        requests = encode(tokenizer, task.pairs())
    except NothingToScore as error:
        line = lines[error.index]
        raise UserError(f"{task.path} line {line}: nothing to score is left in {model}'s ids; leave it out") from error
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    for line, request in zip(lines, requests, strict=True):
        if len(request.inputs) > context:
            raise UserError(
                f"{task.path} line {line} has {len(request.inputs)} tokens with a choice, more than the context of "
                f"{context} that {model} has; leave it out"
            )
        if max(*request.inputs, *request.targets) >= vocabulary:
            raise UserError(f"{task.path} line {line} has a token that {model}'s tokenizer knows and {model} does not")
    return requests


@contextmanager
def loaded(checkpoint: Checkpoint) -> Iterator[Any]:
    """The model in fp32 while the context lasts (a .gguf file goes through a temporary folder)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="sola-edge-") as scratch:
        folder = checkpoint.path
        if not folder.is_dir():
            folder = Path(scratch) / "model"
            copy_checkpoint(checkpoint, folder)
        options = loading_options(checkpoint.config)
        yield transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def _measure_all(subject: _Subject, tasks: list[Task], baseline: Sequence[TaskResult]) -> list[TaskResult]:
    before = {result.task: result for result in baseline}
    found = []
    with loaded(subject.checkpoint) as model:
        for task, requests in zip(tasks, subject.requests, strict=True):
            result = _measure(subject.name, model, task, requests)
            if task.name in before:
                first = before[task.name]
                difference = paired(first.model, _right(first.chosen, task), _right(result.chosen, task))
                result = result.model_copy(update={"difference": difference})
            found.append(result)
    return found


def _right(chosen: Sequence[int], task: Task) -> Right:
    """Which questions were answered right."""
    return np.array(chosen) == np.array([row.answer for row in task.questions])


def _measure(name: str, model: Any, task: Task, requests: list[Request]) -> TaskResult:
    """A result without difference."""
    start = time.perf_counter()
    scores = log_likelihoods(model, requests, f"{task.name} of {name}")
    seconds = time.perf_counter() - start
    if scores.nonfinite:
        raise UserError(
            f"{name} gives no finite log-likelihood for {scores.nonfinite:,} of {scores.scored:,} tokens of {task.name}; "
            "its weights are damaged, make or fetch it again"
        )
    chosen = choose(task.questions, scores.values)
    right = {metric: _right(indices, task) for metric, indices in chosen.items()}
    return TaskResult(
        model=name,
        task=task.name,
        n=len(task.questions),
        metric=task.metric,
        accuracy=share(right[task.metric]),
        acc=share(right["acc"]),
        acc_norm=share(right["acc_norm"]) if task.kind == "answer" else None,
        difference=None,
        chosen=chosen[task.metric],
        tokens=scores.tokens,
        positions=scores.positions,
        seconds=seconds,
    )


def choose(questions: Sequence[Question], values: Floats) -> dict[Metric, list[int]]:
    """The chosen index of each question by each metric; the first of equals. values: one per choice, in order, nats."""
    found: dict[Metric, list[int]] = {"acc": [], "acc_norm": []}
    start = 0
    for row in questions:
        mine = values[start : start + len(row.choices)]
        start += len(row.choices)
        found["acc"].append(int(mine.argmax()))
        found["acc_norm"].append(int((mine / [len(choice) for choice in row.choices]).argmax()))
    return found


def share(right: Right) -> Share:
    """The share that is right, and its standard error sqrt(p (1 - p) / n)."""
    p = float(right.mean())
    return Share(value=p, standard_error=float(np.sqrt(p * (1 - p) / len(right))))


def paired(baseline: str, before: Right, now: Right) -> Difference:
    """Mean of the per-question differences, each -1, 0 or 1, and its standard error (their deviation / sqrt(n))."""
    each = now.astype(float) - before.astype(float)
    error = float(each.std() / np.sqrt(len(each)))
    return Difference(baseline=baseline, value=float(each.mean()), standard_error=error)


def describe(tasks: Sequence[Task]) -> list[TaskFile]:
    """The tasks as a report has them."""
    return [
        TaskFile(
            name=task.name,
            file=str(task.path),
            sha256=task.sha256,
            in_file=task.in_file,
            questions=len(task.questions),
            choices=sum(len(row.choices) for row in task.questions),
            kind=task.kind,
            metric=task.metric,
        )
        for task in tasks
    ]


def _report(tasks: list[Task], subjects: list[_Subject], results: list[TaskResult]) -> TaskReport:
    where = new_report(torch.get_num_threads())
    return TaskReport(
        created=where.created,
        command=where.command,
        machine=where.machine,
        packages=where.packages,
        tasks=describe(tasks),
        models=[subject.described() for subject in subjects],
        results=list(results),
    )
