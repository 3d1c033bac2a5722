"""Memory over lengths of context on the terminal: measured, expected and what the difference is."""

from rich.console import Console

from runtime_checks.grids import file_names, print_grid, print_left_out, print_lines
from runtime_checks.memory_curve import MemoryPoint, MemoryReport
from runtime_checks.summary import DASH, megabytes, reused

PARTS = {
    "runtime": "runtime",
    "libraries": "libraries",
    "session": "session",
    "weights": "weights",
    "copies": "copies",
    "vocabulary": "tokens",
    "kv": "kv",
    "logits": "logits",
    "activations": "other",
}
HEADS = ("Context", "Least peak", "Largest", "System's", "Anonymous", "Files", "GPU", "Expected", "Off")
EXPLAINED = (
    "Peak: resident, of fresh processes, the least and the largest of them (heaps find room by chance), by a process's own "
    "account; all else is of the one with the least. System's: the same by the system (wait4). Anonymous: pages of its own; "
    "files: mapped ones (weights, libraries). Expected: the sum of the parts below it, which follow from the shapes in the "
    "file, beside the runtime's own; off: expected - least peak, as a share of it. GPU: of the process on CUDA devices, by "
    "NVIDIA's library; where nothing is expected (another device than the CPU, fp16 and bf16 graphs on it), the peak is not "
    "judged."
)


def print_memory(report: MemoryReport, console: Console | None = None) -> None:
    """Print every curve, its parts and what is wrong, to stdout."""
    console = console or Console()
    for name, curve in zip(file_names(report.curves), report.curves, strict=True):
        print_lines(console, [f"{name}, {megabytes(curve.bytes)} on disk"], "bold")
        print_grid(console, HEADS, map(row, curve.points))
        print_grid(console, ("MB of", *PARTS.values()), map(_parts, curve.points))
    print_lines(console, [EXPLAINED, *reused(point.measured for curve in report.curves for point in curve.points)])
    print_left_out(console, report.skipped, report.failures)


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


def _parts(point: MemoryPoint) -> tuple[str, ...]:
    return (f"{point.context:,}", *(f"{point.expected.get(part, 0) / 1e6:,.1f}" for part in PARTS))
