"""Throughput on the terminal: a table for every artefact in a runtime, the machine's limits below."""

import statistics

from rich.console import Console

from runtime_checks.grids import file_names, print_grid, print_left_out, print_lines
from runtime_checks.schema import BUSY
from runtime_checks.summary import DASH, megabytes
from runtime_checks.throughput_grid import ThroughputCurve, ThroughputPoint, ThroughputReport

TEST = ("Threads", "Batch", "Prompt")
SPEEDS = ("First token", "Prefill", "Decode")
SHARES = ("Prefill ÷ baseline", "Decode ÷", "Bandwidth", "GEMM")
EXPLAINED = (
    "First token: median, from an empty context. Prefill, decode: tokens/s of the whole batch, median [least–most of the "
    "rounds]. ÷: median of the rounds' ratios to the baseline. Bandwidth: the bytes that decoding must read, as a share of the "
    "machine's; GEMM: the operations of a prompt, as a share of its fp32 rate (integer kernels may be faster)."
)


def print_throughput(report: ThroughputReport, console: Console | None = None) -> None:
    """Print every curve, the limits, and what failed, to stdout."""
    console = console or Console()
    for name, curve in zip(file_names(report.curves), report.curves, strict=True):
        role = ", the baseline" if curve.artefact == report.baseline else ""
        size = megabytes(curve.bytes)
        print_lines(console, [f"{name}, {size} on disk{role}"], "bold")
        print_grid(console, (*TEST, *SPEEDS), [(*test(point), *speeds(point)) for point in curve.points])
        print_grid(console, (*TEST, *SHARES), [(*test(p), *shares(report, curve, p)) for p in curve.points])
    print_lines(console, [EXPLAINED, *limit_lines(report)])
    print_lines(console, (f"warning: {line}" for line in warnings(report)), "yellow")
    print_left_out(console, report.skipped, report.failures)


def limit_lines(report: ThroughputReport) -> list[str]:
    """The machine's limits by number of threads."""
    lines = []
    for limits in report.limits:
        kernels = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in limits.bandwidth.items())
        rate = f"fp32 products {limits.gemm / 1e9:.0f} GFLOP/s"
        lines.append(f"This machine, {limits.threads} threads: {kernels} GB/s; {rate}.")
    return lines


def warnings(report: ThroughputReport) -> list[str]:
    """What makes the speeds doubtful."""
    if report.others_busy <= BUSY:
        return []
    return [f"other programs took {100 * report.others_busy:.0f} % of the cores: speeds are doubtful"]


def test(point: ThroughputPoint) -> tuple[str, ...]:
    """The cells under TEST."""
    return str(point.test.threads), str(point.test.batch), f"{point.test.prompt:,}"


def speeds(point: ThroughputPoint) -> tuple[str, ...]:
    """The cells under SPEEDS."""
    first = f"{1000 * point.seconds_to_first:,.0f} ms"
    return (first, _speed(point.prefill_speeds), _speed(point.decode_speeds))


def shares(report: ThroughputReport, curve: ThroughputCurve, point: ThroughputPoint) -> tuple[str, ...]:
    """The cells under SHARES."""
    limits = report.limits_of(point.test.threads)
    of_limits = (point.bandwidth_share(limits), point.gemm_share(limits))
    return (*_ratios(report.reference(curve), point), *map(_share, of_limits))


def _share(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"


def _speed(speeds: list[float]) -> str:
    digits = 0 if min(speeds) >= 100 else 1
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(speeds), statistics.median(speeds), max(speeds)))
    return f"{middle} [{low}–{high}]"


def _ratios(reference: ThroughputCurve | None, point: ThroughputPoint) -> tuple[str, str]:
    other = reference.point(point.test) if reference else None
    if other is None:
        return DASH, DASH
    return (
        _ratio(point.prefill_speeds, other.prefill_speeds),
        _ratio(point.decode_speeds, other.decode_speeds),
    )


def _ratio(ours: list[float], theirs: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"
