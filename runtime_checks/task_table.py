"""Accuracies on the terminal: checkpoints are rows, tasks are columns."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime_checks.task_schema import TaskFile, TaskReport, TaskResult


def print_tasks(report: TaskReport, console: Console | None = None) -> None:
    """Print every cell: accuracy, and below it the difference to the first checkpoint, each ± its standard error."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("Model", overflow="fold")
    for task in report.tasks:
        table.add_column(_heading(task), justify="right")
    for model in report.models:
        table.add_row(escape(model.name), *(cell(report.result(model.name, task.name)) for task in report.tasks))
    console.print(table)
    console.print("Per cent of the questions answered right ± standard error, zero-shot, in PyTorch fp32.", style="dim")
    if len(report.models) > 1:
        text = f"Below: the difference to {report.models[0].name} on the same questions ± its paired standard error."
        console.print(text, style="dim", markup=False, highlight=False)


def _heading(task: TaskFile) -> str:
    asked = f"{task.questions:,}" if task.questions == task.in_file else f"{task.questions:,} of {task.in_file:,}"
    return f"{escape(task.name)}\n{task.metric}\nn = {asked}"


def cell(result: TaskResult) -> str:
    """Per cent, as rich markup."""
    accuracy, difference = result.accuracy, result.difference
    text = f"{accuracy.value:.2%} ± {accuracy.standard_error:.2%}".replace("%", "")
    if difference is None:
        return text
    change = f"{difference.value:+.2%} ± {difference.standard_error:.2%}".replace("%", "")
    return f"{text}\n[dim]{change}[/]"
