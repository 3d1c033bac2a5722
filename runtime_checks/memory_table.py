"""Memory over lengths of context on the terminal: measured, expected and what the difference is."""

from collections.abc import Iterator

from rich.console import Console

from runtime_checks.grids import file_names, print_grid, print_left_out, print_lines
from runtime_checks.memory_curve import MemoryCurve, MemoryPoint, MemoryReport
from runtime_checks.summary import DASH, megabytes, reused

PARTS = {
    "runtime": "runtime",
    "libraries": "libs",
    "session": "session",
    "weights": "weights",
    "copies": "copies",
    "vocabulary": "tokens",
    "kv": "kv",
    "logits": "logits",
    "activations": "other",
}
HEADS = ("Tokens", "Least", "Largest", "System", "Own", "Files", "GPU", "Shapes", "Off")  # 80 columns
PART_HEADS = ("MB of", *PARTS.values())


def print_memory(report: MemoryReport, console: Console | None = None) -> None:
    """Print every curve, its parts and what is wrong, to stdout."""
    console = console or Console()
    for name, curve in zip(file_names(report.curves), report.curves, strict=True):
        print_lines(console, [f"{name}, {megabytes(curve.bytes)} on disk"], "bold")
        for _, heads, rows in tables(name, curve):
            print_grid(console, heads, rows)
    moments = reused(point.measured for curve in report.curves for point in curve.points)
    print_lines(console, [explained(report), *moments])
    print_left_out(console, report.skipped, report.failures)


def tables(name: str, curve: MemoryCurve) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, heads, rows) of what was measured, and of what is expected where anything is."""
    yield name, HEADS, [row(point) for point in curve.points]
    if any(point.expected for point in curve.points):
        yield f"{name}: what is expected", PART_HEADS, [parts(point) for point in curve.points]


def explained(report: MemoryReport) -> str:
    """What the columns are."""
    processes = "one fresh process" if report.rounds == 1 else f"{report.rounds} fresh processes"
    return (
        f"Least, largest: resident peak of {processes} (heaps find room by chance), by a process's own account; the rest is "
        "of the one with the least. System: its peak by the system (wait4). Own, files: of what was resident at its end, pages "
        "of its own and those of mapped files (weights, libraries). Shapes: the sum of the parts, which follow from the "
        "shapes in the file, but for the runtime before the model is loaded and pages of libraries, which are measured, and "
        "the session, a constant; off: shapes - least, as a share of it. GPU: the most that a process had on CUDA devices, "
        "by NVIDIA's library; where nothing is expected (another device than the CPU, fp16 and bf16 graphs on it), the peak "
        "is not judged."
    )


def row(point: MemoryPoint) -> tuple[str, ...]:
    """The cells under HEADS."""
    found = point.memory
    optional = [
        megabytes(v) if v is not None else DASH
        for v in (point.peaks[-1], point.system_peak, found.anonymous, found.file_backed, point.gpu)
    ]
    off = point.off
    expected = (DASH, DASH) if off is None else (megabytes(sum(point.expected.values())), f"{100 * off:+.1f} %")
    return (f"{point.context:,}", megabytes(found.peak), *optional, *expected)


def parts(point: MemoryPoint) -> tuple[str, ...]:
    """The cells under PART_HEADS."""
    sizes = [point.expected.get(part, 0) / 1e6 for part in PARTS] if point.expected else []
    cells = [f"{size:,.1f}" if size < 100 else f"{size:,.0f}" for size in sizes]
    return (f"{point.context:,}", *(cells or [DASH] * len(PARTS)))
