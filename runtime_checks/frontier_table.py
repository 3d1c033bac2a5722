"""A frontier as tables: Markdown, CSV, and the same cells on the terminal."""

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime_checks.frontier_front import beaten, front_of_bytes, front_of_decode, verdict
from runtime_checks.frontier_schema import Frontier, FrontierCell, Speeds
from runtime_checks.grids import estimate, grid, print_grid, print_lines, protocol_line
from runtime_checks.schema import BUSY
from runtime_checks.summary import DASH, megabytes, number
from sola_edge.files import replace_file

HEADS = ("Model", "Type", "Runtime", "Size", "Perplexity ÷", "Peak", "Prefill", "Decode", "Front", "Beaten by")
SHORT = ("Model", "Type", "Size", "Perplexity ÷", "Peak", "Prefill", "Decode", "Front", "Beaten by")  # 80 columns
EXPLAINED = (
    "Perplexity ÷ the reference's ± the standard error of the paired difference over windows. Size: the file or folder. "
    "Peak: resident, of one fresh process (another may take some per cent more). Prefill and decode: tokens/s of the run "
    "(÷ the dense baseline's, measured in turn with it). Front: not beaten by any setting in bytes and perplexity (B), in "
    "decode speed and perplexity (D). Beaten by: the best dense file of the same runtime that is no larger and no worse; "
    "the ratio is of the two perplexities, paired."
)
ROUNDED = ("f", "b")  # first letters of types that are not of few bits


def write_tables(found: Frontier, out: Path) -> None:
    """Write frontier.md and frontier.csv. Raises UserError if the place is not writable."""
    for name, text in (("frontier.md", markdown(found)), ("frontier.csv", comma_separated(found))):
        with replace_file(out / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="")


def markdown(found: Frontier) -> str:
    """The page frontier.md."""
    heading = f"# {found.protocol.model}: bytes, perplexity and speed"
    parts = [heading, *verdict(found), grid(HEADS, rows(found)), EXPLAINED, reference_line(found), *notes(found)]
    return "\n\n".join([*parts, how(found)]) + "\n"


def print_frontier(found: Frontier, console: Console | None = None) -> None:
    """Print the same to stdout."""
    console = console or Console()
    for runtime in dict.fromkeys(cell.setting.runtime for cell in found.cells):
        own = [row for row in rows(found) if row[HEADS.index("Runtime")] == runtime]
        print_lines(console, [runtime], "bold")
        print_grid(console, SHORT, [[row[HEADS.index(name)].split(" (")[0] for name in SHORT] for row in own])
    print_lines(console, verdict(found), "")
    print_lines(console, [EXPLAINED])
    print_lines(console, [reference_line(found)], "")
    print_lines(console, notes(found), "yellow")
    print_lines(console, [how(found)])


def rows(found: Frontier) -> list[tuple[str, ...]]:
    """One row for every cell."""
    marks = marks_of(found)
    return [_row(found, cell, marks[id(cell)]) for cell in found.cells]


def marks_of(found: Frontier) -> dict[int, str]:
    """Of which fronts each cell (by its id) is: B, D, both or neither."""
    fronts = {"B": {id(c) for c in front_of_bytes(found)}, "D": {id(c) for c in front_of_decode(found)}}
    return {id(c): "".join(name for name, members in fronts.items() if id(c) in members) for c in found.cells}


def _row(found: Frontier, cell: FrontierCell, marks: str) -> tuple[str, ...]:
    about = (cell.setting.model, cell.setting.type, cell.setting.runtime)
    if cell.status != "measured" or cell.artefact is None:
        return (*about, cell.status, *[DASH] * (len(HEADS) - len(about) - 1))
    lost = beaten(found, cell)
    return (
        *about,
        megabytes(cell.artefact.bytes),
        estimate(cell.ratio),
        megabytes(cell.memory.peak) if cell.memory else DASH,
        _speed(cell, "prefill"),
        _speed(cell, "decode"),
        marks or DASH,
        f"{lost.by.setting.type} ({estimate(lost.ratio)})" if lost else DASH,
    )


def _speed(cell: FrontierCell, which: Speeds) -> str:
    value = getattr(cell.throughput, which).median if cell.throughput else None
    return f"{number(value)} ({number(cell.speed_ratio(which))})"


def reference_line(found: Frontier) -> str:
    """What perplexities are divided by."""
    cell = found.cell(found.reference)
    if cell is None or cell.perplexity is None:
        return f"The reference, {found.reference}, is not measured yet."
    value, error = cell.perplexity.value, cell.perplexity.standard_error
    return f"Reference: {found.reference}, perplexity {number(value, 4)} ± {number(error, 2)}."


def notes(found: Frontier) -> list[str]:
    """What a reader must know beside the figures, and why cells have none."""
    lines = []
    stored = found.protocol.options.get("stored as")
    if isinstance(stored, str) and not stored.startswith(ROUNDED):
        lines.append(
            f"The model itself came rounded to {stored}: rounding it to that type again costs the dense model next to nothing, "
            "and to its like less than it would cost the model as it was trained. That favours plain quantization."
        )
    other = [c for c in found.measured if c.artefact and c.artefact.stored_otherwise]
    if other:
        listed = "; ".join(
            f"{c.setting}: {c.artefact.stored_otherwise}, most weights {c.artefact.precision}"
            for c in other
            if c.artefact
        )
        lines.append(f"Tensors in another type than asked, as their rows are no whole blocks: {listed}.")
    busy = [c for c in found.measured if c.throughput and c.throughput.others_busy > BUSY]
    if busy:
        lines.append(f"Other programs kept the cores busy while {len(busy)} settings were timed: {_listed(busy)}.")
    return lines + list(dict.fromkeys(_reason(cell) for cell in found.cells if cell.reason))


def _reason(cell: FrontierCell) -> str:
    """A model that cannot be made is named once, not for every file of it."""
    return f"{cell.setting.model if cell.status == 'unreachable' else cell.setting}: {cell.reason}"


def _listed(cells: list[FrontierCell]) -> str:
    return "; ".join(str(cell.setting) for cell in cells)


def how(found: Frontier) -> str:
    """How it was measured, in one paragraph."""
    return protocol_line(found.protocol, found.machine, "each file in its own runtime")


def comma_separated(found: Frontier) -> str:
    """The data of all cells and both panels of the picture, a line each."""
    stream = io.StringIO()
    lines = [_record(found, cell, marks) for cell, marks in zip(found.cells, _in_order(found), strict=True)]
    writer = csv.DictWriter(stream, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _in_order(found: Frontier) -> list[str]:
    marks = marks_of(found)
    return [marks[id(cell)] for cell in found.cells]


def _record(found: Frontier, cell: FrontierCell, marks: str) -> dict[str, Any]:
    lost = beaten(found, cell) if cell.status == "measured" else None
    return {
        **cell.setting.model_dump(),
        "status": cell.status,
        "achieved_rate": cell.achieved,
        "parameters": cell.parameters,
        "bytes": cell.artefact.bytes if cell.artefact else None,
        "precision": cell.artefact.precision if cell.artefact else None,
        "perplexity": cell.perplexity.value if cell.perplexity else None,
        "perplexity_error": cell.perplexity.standard_error if cell.perplexity else None,
        "ratio": cell.ratio.value if cell.ratio else None,
        "ratio_error": cell.ratio.standard_error if cell.ratio else None,
        "nonfinite": cell.perplexity.nonfinite if cell.perplexity else None,
        "peak_memory": cell.memory.peak if cell.memory else None,
        **_speeds(found, cell, "prefill"),
        **_speeds(found, cell, "decode"),
        "front_bytes": int("B" in marks),
        "front_decode": int("D" in marks),
        "beaten_by": lost.by.setting.type if lost else None,
        "reason": cell.reason,
    }


def _speeds(found: Frontier, cell: FrontierCell, which: Speeds) -> dict[str, float | None]:
    return {
        which: getattr(cell.throughput, which).median if cell.throughput else None,
        f"{which}_ratio": cell.speed_ratio(which),
        f"{which}_at_one_time": found.speed(cell, which),
    }
