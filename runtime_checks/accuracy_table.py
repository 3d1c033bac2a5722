"""Accuracies of artefacts in runtimes on the terminal: rows are artefacts, columns are tasks."""

from rich.console import Console

from runtime_checks.accuracy_schema import AccuracyReport, AccuracyResult, AskedTask
from runtime_checks.grids import file_names, print_grid, print_left_out, print_lines
from runtime_checks.summary import DASH, reused

EXPLAINED = (
    "Per cent of the questions answered right ± standard error, zero-shot, by lm-evaluation-harness. Below it the difference "
    "to the first row on the same questions ± its paired standard error."
)


def print_accuracy(report: AccuracyReport, console: Console | None = None) -> None:
    """Print every cell, what was left out and what failed, to stdout."""
    console = console or Console()
    print_grid(console, heads(report), rows(report))
    print_lines(console, [EXPLAINED, *reused(result.measured for result in report.results)])
    print_left_out(console, report.skipped, report.reasons)


def heads(report: AccuracyReport) -> tuple[str, ...]:
    """What the columns are: the artefact, and every task."""
    return "Artefact", *(_head(task, report) for task in report.tasks)


def rows(report: AccuracyReport) -> list[tuple[str, ...]]:
    """The cells under `heads`."""
    names = file_names(report.results, "\n")
    cells = {(name, r.task): r for name, r in zip(names, report.results, strict=True)}
    return [(name, *(_cell(cells.get((name, t.name))) for t in report.tasks)) for name in dict.fromkeys(names)]


def _head(task: AskedTask, report: AccuracyReport) -> str:
    metric = next((r.metric for r in report.results if r.task == task.name), "")
    return f"{task.name}\n{metric}\nn = {task.questions:,}"


def _cell(result: AccuracyResult | None) -> str:
    if result is None:
        return DASH
    found = result.metrics[result.metric]
    text = f"{100 * found.value:.2f} ± {100 * found.standard_error:.2f}"
    if result.difference is None:
        return text
    return f"{text}\n{100 * result.difference.value:+.2f} ± {100 * result.difference.standard_error:.2f}"
