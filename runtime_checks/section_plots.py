"""Pictures of studies for a report's page, each with its data."""

import statistics
from collections.abc import Callable
from typing import Any

from runtime_checks.accuracy_schema import AccuracyReport
from runtime_checks.frontier_front import ratio, size
from runtime_checks.frontier_plot import draw_bytes, draw_decode
from runtime_checks.frontier_schema import Frontier
from runtime_checks.frontier_table import marks_of
from runtime_checks.grids import file_names
from runtime_checks.memory_curve import MemoryReport
from runtime_checks.plot import Plot, Value
from runtime_checks.plots import LINE_COLOURS, STYLES, WIDTH, Drawn, draw_bars, drawn_plots, pyplot, svg_of
from runtime_checks.throughput_grid import SpeedTest, ThroughputPoint, ThroughputReport

STROKES = [style for style in STYLES if style != ":"]  # dotted is what is expected
FRONTIER_SIDES = 6.2, 5.0  # inches: points have names beside them


def frontier(study: Frontier, of: str) -> list[Plot]:
    """Perplexity over bytes and over decode speed; nothing where no setting was measured."""
    if not study.measured:
        return []
    marks = marks_of(study)
    settings: list[tuple[list[Value], Any]] = [
        ([c.setting.model, c.setting.type, c.setting.runtime, ratio(c), c.ratio.standard_error if c.ratio else None], c)
        for c in study.measured
    ]
    heads = ["model", "type", "runtime", "perplexity ÷ reference", "standard error"]
    in_bytes = [[*about, size(cell), "B" in marks[id(cell)]] for about, cell in settings]
    in_speed = [[*about, study.speed(cell, "decode"), "D" in marks[id(cell)]] for about, cell in settings]
    return drawn_plots(
        [
            (
                "Perplexity over file size; the line is what nothing beats",
                (
                    _panel(lambda axes: draw_bytes(axes, study), f"{of}bytes"),
                    [[*heads, "bytes", "on the front"], *in_bytes],
                ),
            ),
            (
                "Perplexity over decode speed",
                (
                    _panel(lambda axes: draw_decode(axes, study), f"{of}decode"),
                    [[*heads, "tokens/s", "on the front"], *in_speed],
                ),
            ),
        ]
    )


def _panel(draw: Callable[[Any], None], name: str) -> str:
    figure, axes = pyplot().subplots(figsize=FRONTIER_SIDES)
    draw(axes)
    return svg_of(figure, name)


def memory(study: MemoryReport, of: str) -> list[Plot]:
    """Measured peaks as points on lines, what the shapes say as a dotted line."""
    curves = [curve for curve in study.curves if curve.points]
    if not curves:
        return []
    names = file_names(curves)
    lines: dict[str, list[tuple[float, float]]] = {}
    dotted: dict[str, list[tuple[float, float]]] = {}
    rows: list[list[Value]] = [
        ["artefact", "context", "least peak, bytes", "largest, bytes", "expected, bytes", "GPU, bytes"]
    ]
    for name, curve in zip(names, curves, strict=True):
        lines[name] = [(p.context, p.memory.peak / 1e6) for p in curve.points]
        dotted[name] = [(p.context, sum(p.expected.values()) / 1e6) for p in curve.points if p.expected]
        rows += [
            [name, p.context, p.memory.peak, p.peaks[-1], sum(p.expected.values()) or None, p.gpu] for p in curve.points
        ]
    drawn = _lines(lines, f"{of}memory", "tokens of context", dotted), rows
    return drawn_plots([("Least peak memory, MB (dotted: what the shapes say)", drawn)])


def throughput(study: ThroughputReport, of: str) -> list[Plot]:
    """Decode speed over prompts, and the shares of the machine's limits."""
    points = [(name, p) for name, c in zip(file_names(study.curves), study.curves, strict=True) for p in c.points]
    if not points:
        return []
    lines: dict[str, list[tuple[float, float]]] = {}
    rows: list[list[Value]] = [["artefact", "threads", "batch", "prompt", "first token, s", "decode, tokens/s"]]
    for name, point in points:
        speed = statistics.median(point.decode_speeds)
        lines.setdefault(f"{name}{_kind(point.test, study)}", []).append((point.test.prompt, speed))
        test = point.test
        rows.append([name, test.threads, test.batch, test.prompt, point.seconds_to_first, speed])
    drawn = _lines(lines, f"{of}decode-by-prompt", "tokens of the prompt", {}), rows
    return drawn_plots(
        [
            ("Decode, tokens/s by length of the prompt", drawn),
            ("Of the machine's memory bandwidth in decoding, %", _shares(study, points, f"{of}bandwidth", _bandwidth)),
            ("Of the machine's fp32 rate in prefill, %", _shares(study, points, f"{of}gemm", _gemm)),
        ]
    )


def _kind(test: SpeedTest, study: ThroughputReport) -> str:
    """What tells a test apart from others of the artefact beside its prompt."""
    tests = [point.test for curve in study.curves for point in curve.points]
    batch = f", batch {test.batch}" if len({t.batch for t in tests}) > 1 else ""
    return batch + (f", {test.threads} threads" if len({t.threads for t in tests}) > 1 else "")


def _bandwidth(study: ThroughputReport, point: ThroughputPoint) -> float | None:
    return point.bandwidth_share(study.limits_of(point.test.threads))


def _gemm(study: ThroughputReport, point: ThroughputPoint) -> float | None:
    return point.gemm_share(study.limits_of(point.test.threads))


def _shares(
    study: ThroughputReport,
    points: list[tuple[str, ThroughputPoint]],
    name: str,
    share: Callable[[ThroughputReport, ThroughputPoint], float | None],
) -> Drawn | None:
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for artefact, point in points:
        value = share(study, point)
        if value is not None:
            group = f"{point.test.prompt} tokens{_kind(point.test, study)}"
            found[group, artefact] = (100 * value, 0.0, 0.0)
    return draw_bars(found, [artefact for artefact, _ in points], name, ("test", "artefact"))


def accuracy(study: AccuracyReport, of: str) -> list[Plot]:
    """Bars with standard errors, a group for every task."""
    names = file_names(study.results)
    points = {}
    for name, result in zip(names, study.results, strict=True):
        found = result.metrics[result.metric]
        error = 100 * found.standard_error
        points[result.task, name] = (100 * found.value, error, error)
    drawn = draw_bars(points, names, f"{of}accuracy", ("task", "artefact"))
    return drawn_plots([("Answered right, % (± standard error)", drawn)])


def _lines(
    lines: dict[str, list[tuple[float, float]]], name: str, across: str, dotted: dict[str, list[tuple[float, float]]]
) -> str:
    """A line for every name, from 0 up, and a dotted one of the same colour."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    for number, (label, points) in enumerate(lines.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        style = STROKES[number // len(LINE_COLOURS) % len(STROKES)]
        axes.plot(*zip(*sorted(points), strict=True), style, color=colour, marker="o", markersize=3, label=label)
        if dotted.get(label):
            axes.plot(*zip(*sorted(dotted[label]), strict=True), ":", color=colour)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(across)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.2), frameon=False, fontsize=9)
    return svg_of(figure, name)
