"""A comparison as tables: Markdown for `compare.md`, the same cells on the terminal."""

import math
from collections.abc import Sequence

from rich.console import Console

from runtime_checks.compare_schema import Comparison
from runtime_checks.grids import estimate, grid, print_grid, protocol_line
from runtime_checks.summary import DASH, number
from runtime_checks.task_schema import TaskResult

EXPLAINED = "Perplexity ÷ the dense model's ± the standard error of the paired difference over windows."
PREDICTED = ("Method", "Rate", "Predicted", "Measured", "Measured ÷ predicted")


def markdown(comparison: Comparison) -> str:
    """The page compare.md."""
    parts = [
        f"# {comparison.protocol.model}, compressed by {len(comparison.labels)} methods",
        EXPLAINED,
        grid(("Method", *_heads(comparison)), _rows(comparison)),
        dense_line(comparison),
        *(f"{line}" for line in reasons(comparison)),
    ]
    if comparison.dense_tasks:
        parts += [task_line(comparison), grid(task_heads(comparison), task_rows(comparison))]
    predicted = prediction_rows(comparison)
    if predicted:
        heading = "Rise of the loss, nats per token. Predicted on the calibration text, before the correction."
        parts += [heading, grid(PREDICTED, predicted)]
    return "\n\n".join([*parts, _how(comparison)]) + "\n"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the same to stdout."""
    console = console or Console()
    print_grid(console, ("Method", *_heads(comparison)), _rows(comparison))
    console.print(EXPLAINED, style="dim", highlight=False)
    console.print(dense_line(comparison), markup=False, highlight=False)
    for line in reasons(comparison):
        console.print(line, markup=False, highlight=False, style="yellow")
    if comparison.dense_tasks:
        print_grid(console, task_heads(comparison), task_rows(comparison))
        console.print(task_line(comparison), style="dim", markup=False, highlight=False)
    predicted = prediction_rows(comparison)
    if predicted:
        print_grid(console, PREDICTED, predicted)
    console.print(_how(comparison), style="dim", markup=False, highlight=False)


def dense_line(comparison: Comparison) -> str:
    """The dense model's own perplexity."""
    found = comparison.dense
    if found is None or found.value is None:
        return "The dense model is not measured yet."
    return f"Dense model: perplexity {number(found.value, 4)} ± {number(found.standard_error, 2)}."


def reasons(comparison: Comparison) -> list[str]:
    """Why cells have no figure."""
    return [f"{c.label} at {c.rate:g}: {c.reason}" for c in comparison.cells if c.reason]


def task_line(comparison: Comparison) -> str:
    """What the accuracies are."""
    asked = ", ".join(f"{t.name} {t.metric}, {t.questions:,} of {t.in_file:,}" for t in comparison.task_files)
    return (
        "Zero-shot accuracy in per cent ± standard error; in brackets the difference to the dense model on the same "
        f"questions ± its paired standard error. {asked} questions."
    )


def task_heads(comparison: Comparison) -> tuple[str, ...]:
    """Columns of the accuracies."""
    return ("Method", "Rate", *(task.name for task in comparison.task_files), "mean")


def task_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Accuracies of the dense model and of every cell that has them."""
    measured = [(c.label, f"{c.rate:g}", c.tasks) for c in comparison.cells if c.tasks]
    return [
        (*about, *map(accuracy, found), _mean(found))
        for *about, found in [("dense", DASH, comparison.dense_tasks), *measured]
    ]


def accuracy(result: TaskResult) -> str:
    """`46.1 ± 1.2 (-0.9 ± 0.5)`, per cent."""
    text = f"{100 * result.accuracy.value:.1f} ± {100 * result.accuracy.standard_error:.1f}"
    change = result.difference
    return text if change is None else f"{text} ({100 * change.value:+.1f} ± {100 * change.standard_error:.1f})"


def _mean(results: Sequence[TaskResult]) -> str:
    """Over tasks, which are independent samples."""
    errors = [r.accuracy.standard_error for r in results]
    value = sum(r.accuracy.value for r in results) / len(results)
    return f"{100 * value:.1f} ± {100 * math.hypot(*errors) / len(results):.1f}"


def prediction_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Predicted and measured rise of the loss, and their ratio."""
    return [
        (
            c.label,
            f"{c.rate:g}",
            number(predicted),
            estimate(rise),
            number(rise.value / predicted) if predicted else DASH,
        )
        for c, predicted, rise in comparison.predictions
    ]


def _how(comparison: Comparison) -> str:
    return protocol_line(comparison.protocol, comparison.machine, "in PyTorch fp32")


def _heads(comparison: Comparison) -> list[str]:
    return [f"rate {rate:g}" for rate in comparison.rates]


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [(label, *(_cell(comparison, label, rate) for rate in comparison.rates)) for label in comparison.labels]


def _cell(comparison: Comparison, label: str, rate: float) -> str:
    found = comparison.cell(label, rate)
    if found is None:
        return DASH
    return estimate(found.ratio) if found.status == "measured" else found.status
