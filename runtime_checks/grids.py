"""Tables of text: as Markdown, and on the terminal; and the line below that says how a study was measured."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime_checks.schema import Machine, Skipped
from runtime_checks.study_schema import Estimate, StudyProtocol
from runtime_checks.summary import DASH


def estimate(found: Estimate | None) -> str:
    """Value ± standard error, to four digits of the value and at most three decimals."""
    if found is None:
        return DASH
    decimals = max(0, 3 - int(math.log10(max(abs(found.value), 1.0))))
    text = f"{found.value:.{decimals}f}"
    return text if found.standard_error is None else f"{text} ± {found.standard_error:.{decimals}f}"


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_grid(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The same on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


class InRuntime(Protocol):
    """What was measured of a file in a runtime."""

    @property
    def artefact(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def runtime(self) -> str: ...


def file_names(measured: Sequence[InRuntime], between: str = " in ") -> list[str]:
    """What to call each: the file (its whole path where another has that name), its type and the runtime."""
    shared = Counter(Path(path).name for path in {one.artefact for one in measured})
    told = [one.artefact if shared[Path(one.artefact).name] > 1 else Path(one.artefact).name for one in measured]
    return [f"{name} ({one.precision}){between}{one.runtime}" for name, one in zip(told, measured, strict=True)]


def print_lines(console: Console, lines: Iterable[str], style: str = "dim") -> None:
    """Lines below a table, as they are."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False)


def print_left_out(console: Console, skipped: Iterable[Skipped], failures: Iterable[str]) -> None:
    """What was skipped, and what failed."""
    print_lines(console, (f"skipped: {one.what}: {one.reason}" for one in skipped), "yellow")
    print_lines(console, failures, "red")


def protocol_line(protocol: StudyProtocol, where: Machine, how: str) -> str:
    """How a study was measured, in one paragraph; `how`: in which runtime."""
    scoring, calibration = protocol.scoring, protocol.calibration
    options = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in protocol.options.items() if value is not None
    )
    versions = ", ".join(f"{name} {version}" for name, version in protocol.versions.items())
    return (
        f"Scored: {scoring.text} (SHA-256 {scoring.text_sha256}), {scoring.windows} windows × {scoring.context} tokens, "
        f"no BOS, {how}. Calibrated: {calibration.text} (SHA-256 {calibration.sha256}), {calibration.windows} "
        f"windows × {calibration.window} tokens. Options: {options}. Versions: {versions}, Python {where.python}. "
        f"Machine: {where.processor}, {where.cores} cores, {where.threads_used} threads, {where.system}."
    )
