"""The report's plots as inline SVG. Text and axes take the page's own colour, so light and dark both work.

Every plot is about as many points wide as a phone's screen.
"""

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from runtime_checks.plot import Plot, Rows, Value
from runtime_checks.schema import Report, Result
from runtime_checks.summary import label, number
from sola_edge.errors import UserError

INK = "#010203"  # replaced by the page's text colour
COLOURS = ("#8a94a6", "#1a9a86", "#c8772b", "#7a6fd0")
PART_COLOURS = {"weights": "#1a9a86", "kv": "#c8772b", "compute": "#7a6fd0", "output": "#b85c8e", "rest": "#8a94a6"}
LINE_COLOURS = ("#1a9a86", "#c8772b", "#7a6fd0", "#b85c8e", "#4a90d9")
STYLES = ("-", "--", ":", "-.")
WIDTH = 4.6
LONG = 13  # characters of a name from where on each has a line of its own
Drawn = tuple[str, Rows]  # an svg element and its data, see Plot


def plots(report: Report) -> list[Plot]:
    """Every plot that the report has data for. Raises UserError without matplotlib."""
    found = [
        ("File size, MB", bars(report, lambda r: (r.bytes / 1e6, 0, 0), "file-size")),
        ("Prefill, tokens/s (median, range)", bars(report, lambda r: _speed(r, "prefill"), "prefill")),
        ("Decode, tokens/s (median, range)", bars(report, lambda r: _speed(r, "decode"), "decode")),
        ("Peak memory, MB", memory_bars(report)),
        ("Perplexity (± standard error)", bars(report, _perplexity, "perplexity")),
    ]
    return drawn_plots(found)


def drawn_plots(found: Iterable[tuple[str, Drawn | None]]) -> list[Plot]:
    """Those of the titled pictures that there were data for."""
    return [Plot(title, *drawn) for title, drawn in found if drawn is not None]


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("report.html needs matplotlib and jinja2: pip install 'sola-edge[report]'") from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings: Any = plt.rcParams
    settings.update(
        dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    )
    settings.update({"svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"})
    settings.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt


def svg_of(figure: Any, name: str) -> str:
    """The figure as an SVG element without size, metadata or links to anywhere."""
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = name
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04)
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text).replace(
        "<svg", f'<svg role="img" aria-label="{name}"', 1
    )
    text = re.sub(r'(id="|href="#|url\(#)(?=[\w])', lambda m: m[1] + name + "-", text)
    return text.replace(INK, "currentColor")


def tick(result: Result) -> str:
    """Runtime and type on two lines."""
    return label(result).replace(" ", "\n")


def _speed(result: Result, which: str) -> tuple[float, float, float] | None:
    if result.throughput is None:
        return None
    speed = getattr(result.throughput, which)
    return speed.median, speed.median - speed.minimum, speed.maximum - speed.median


def _perplexity(result: Result) -> tuple[float, float, float] | None:
    found = result.perplexity
    if found is None or found.value is None:
        return None
    error = found.standard_error or 0.0
    return found.value, error, error


def bars(report: Report, value: Any, name: str) -> Drawn | None:
    """Horizontal bars, one group per runtime and type, one bar per model; value gives (length, below, above)."""
    points = {(tick(r), r.model): value(r) for r in report.results}
    known = {key: found for key, found in points.items() if found is not None}
    return draw_bars(known, [r.model for r in report.results], name, ("runtime", "model"))


def draw_bars(
    points: Mapping[tuple[str, str], tuple[float, float, float]],
    series: Iterable[str],
    name: str,
    heads: tuple[str, str],
) -> Drawn | None:
    """Bars of (length, below, above) by group and series, in the order of `series`; heads: what the two are called."""
    if not points:
        return None
    groups = list(dict.fromkeys(group for group, _ in points))
    models = list(dict.fromkeys(series))
    plt = pyplot()
    height = 0.8 / len(models)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.7 + (0.25 + 0.24 * len(models)) * len(groups)))
    longest = max(v[0] + v[2] for v in points.values())
    for m, model in enumerate(models):
        at = [(g, points[group, model]) for g, group in enumerate(groups) if (group, model) in points]
        where = [g + (m - (len(models) - 1) / 2) * height for g, _ in at]
        lengths = [v[0] for _, v in at]
        spread = np.array([[v[1] for _, v in at], [v[2] for _, v in at]])
        axes.barh(
            where,
            lengths,
            height * 0.9,
            xerr=spread if spread.any() else None,
            color=COLOURS[m % len(COLOURS)],
            ecolor=INK,
            capsize=2,
            label=model,
        )
        for y, (_, found) in zip(where, at, strict=True):
            axes.text(found[0] + found[2] + 0.02 * longest, y, number(found[0], 4), va="center", fontsize=10)
    axes.set_yticks(range(len(groups)), groups, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.24 * longest)
    axes.locator_params(axis="x", nbins=5)
    _legend(figure, axes, models)
    rows: list[list[Value]] = [
        [group.replace("\n", " "), model, v[0], v[0] - v[1], v[0] + v[2]] for (group, model), v in points.items()
    ]
    return svg_of(figure, name), [[*heads, "value", "lowest", "highest"], *rows]


def _legend(figure: Any, axes: Any, names: list[str]) -> None:
    if len(names) > 1:
        columns, left = (3, 0.0) if max(map(len, names)) < LONG else (1, -0.3)
        place = {"loc": "lower left", "bbox_to_anchor": (left, 1.0), "borderaxespad": 0.1}
        axes.legend(**place, ncols=columns, frameon=False, handlelength=1, fontsize=10)


def memory_bars(report: Report) -> Drawn | None:
    """Peak memory, stacked by what the runtime tells of it; 'rest' is the runtime itself, activations and copies."""
    measured = [r for r in report.results if r.memory is not None]
    if not measured:
        return None
    plt = pyplot()
    models = list(dict.fromkeys(r.model for r in measured))
    groups = list(dict.fromkeys(tick(r) for r in measured))
    height = 0.8 / len(models)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + (0.25 + 0.24 * len(models)) * len(groups)))
    longest = max(r.memory.peak for r in measured if r.memory) / 1e6
    for result in measured:
        assert result.memory is not None
        y = groups.index(tick(result)) + (models.index(result.model) - (len(models) - 1) / 2) * height
        left, peak = 0.0, result.memory.peak / 1e6
        for part, size in (*result.memory.parts.items(), ("rest", result.memory.peak)):
            # Buffers that were reserved but not touched may exceed the peak: the bar ends where the peak is.
            width = min(size / 1e6, peak - left)
            axes.barh(y, width, height * 0.9, left=left, color=PART_COLOURS.get(part, COLOURS[0]))
            left += width
        axes.text(peak + 0.02 * longest, y, f"{peak:.0f} {result.model}", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), groups, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * longest)
    axes.locator_params(axis="x", nbins=5)
    seen = dict.fromkeys(part for r in measured if r.memory for part in (*r.memory.parts, "rest"))
    handles = [plt.Rectangle((0, 0), 1, 1, color=PART_COLOURS.get(part, COLOURS[0])) for part in seen]
    place = {"loc": "lower left", "bbox_to_anchor": (-0.35, 1.0), "borderaxespad": 0.1}
    axes.legend(handles, list(seen), ncols=5, frameon=False, handlelength=0.8, columnspacing=0.9, fontsize=10, **place)
    told = [
        (r, part, size)
        for r in measured
        if r.memory
        for part, size in (*r.memory.parts.items(), ("peak", r.memory.peak))
    ]
    rows: list[list[Value]] = [[label(r), r.model, part, size] for r, part, size in told]
    return svg_of(figure, "memory"), [["runtime", "model", "part", "bytes"], *rows]
