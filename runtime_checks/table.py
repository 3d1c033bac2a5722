"""The report as tables on the terminal: two that fit 80 columns, one where there is room."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime_checks.schema import Report, Result
from runtime_checks.summary import (
    DASH,
    by_runtime,
    cards,
    continuations,
    failures,
    megabytes,
    reused,
    row,
    verdict,
    warnings,
)

COST = ("Runtime", "Model", "Size", "Peak", "Prefill tok/s", "Decode tok/s")
QUALITY = ("Perplexity", "KL to reference", "Same top-1", "Check")
FULL = (*COST, *QUALITY[:-1], "Same top-5", QUALITY[-1])
WIDE = 150


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the summary, every artefact in every runtime, what was generated and what was skipped, to stdout."""
    console = console or Console()
    for card in cards(report):
        console.print(f"[bold]{card.title}[/]: {card.figure}  [dim]{escape(card.detail)}[/]", highlight=False)
    if console.width >= WIDE:
        console.print(_table(report, FULL))
    else:
        console.print(_table(report, COST))
        console.print(_table(report, COST[:2] + QUALITY))
    for found in continuations(report):
        heading = f"{found.model} ({', '.join(found.writers)}):"
        console.print(heading, style="bold", markup=False, highlight=False)
        console.print(f"  {found.prompt} | {found.text}", markup=False, highlight=False)
        for note in found.notes:
            console.print(f"  {note}", markup=False, highlight=False, style="dim")
    for skipped in report.skipped:
        console.print(f"skipped: {skipped.what}: {skipped.reason}", markup=False, highlight=False, style="yellow")
    for line in reused(result.measured for result in report.results):
        console.print(line, markup=False, highlight=False, style="dim")
    for line in failures(report):
        console.print(line, markup=False, highlight=False, style="red")
    for line in warnings(report):
        console.print(line, markup=False, highlight=False, style="yellow")
    console.print(verdict(report), style="bold green" if report.passed else "bold red", highlight=False)


def cells_of(result: Result) -> dict[str, str]:
    """The cells of one row by column, shorter than the page's."""
    peak = megabytes(result.memory.peak) if result.memory else DASH
    short = {"Size": megabytes(result.bytes), "Peak": peak}
    return {**row(result), **short}


def _table(report: Report, columns: tuple[str, ...]) -> Table:
    """Rows of one runtime and type together, so that models stand below one another; empty columns are left out."""
    results = by_runtime(report)
    rows = [cells_of(result) for result in results]
    used = [name for name in columns if any(cells[name] != DASH for cells in rows)] or list(columns[:2])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in used:
        table.add_column(name, justify="left" if name in ("Runtime", "Model", "Check") else "right", overflow="fold")
    before = ""
    for result, cells in zip(results, rows, strict=True):
        shown = {**cells, "Runtime": "" if cells["Runtime"] == before else cells["Runtime"]}
        before = cells["Runtime"]
        table.add_row(*(shown[name] for name in used), style=None if result.passed else "red")
    return table
