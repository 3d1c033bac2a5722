"""A frontier as a picture: bytes, then decode speed, against perplexity ÷ the reference's; the Pareto sets are lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime_checks.frontier_front import front_of_bytes, front_of_decode, ratio, size
from runtime_checks.frontier_schema import Frontier, FrontierCell
from runtime_checks.pictures import plain_ticks, write_panels
from runtime_checks.plots import LINE_COLOURS

CEILING = 10.0  # perplexity ÷ the reference's: what is above has collapsed, and is an arrow at this height
MARKERS = "osDP*X"  # the dense model's first, then a shape for each method


def write_plot(found: Frontier, path: Path) -> None:
    """Write the picture as PNG. Raises UserError if the place is not writable."""
    write_panels(path, [lambda axes: draw_bytes(axes, found), lambda axes: draw_decode(axes, found)], 13, 5.6)


def draw_bytes(axes: Any, found: Frontier) -> None:
    """Perplexity over megabytes."""
    _draw(axes, found, lambda cell: size(cell) / 1e6, front_of_bytes(found), "post")
    axes.set_xlabel("file size, MB")
    axes.set_ylabel(f"perplexity ÷ {found.reference.model} {found.reference.type}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def draw_decode(axes: Any, found: Frontier) -> None:
    """Perplexity over decode speed."""
    _draw(axes, found, lambda cell: found.speed(cell, "decode") or 0.0, front_of_decode(found), "pre")
    axes.set_xlabel("decode, tokens/s")


def _draw(
    axes: Any, found: Frontier, across: Callable[[FrontierCell], float], front: Sequence[FrontierCell], step: str
) -> None:
    labels = list(dict.fromkeys(cell.setting.label for cell in found.cells))
    runtimes = list(dict.fromkeys(cell.setting.runtime for cell in found.cells))
    for label in labels:
        for runtime in runtimes:
            cells = [c for c in found.measured if (c.setting.label, c.setting.runtime) == (label, runtime)]
            colour, marker = LINE_COLOURS[runtimes.index(runtime) % len(LINE_COLOURS)], MARKERS[labels.index(label) % 6]
            _points(axes, cells, across, colour, marker, f"{label}, {runtime}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    line = sorted((across(cell), min(ratio(cell), CEILING)) for cell in front)
    axes.plot(
        *zip(*line, strict=True) if line else ((), ()), color="grey", linewidth=1, drawstyle=f"steps-{step}", zorder=1
    )
    for cell in front:
        text = {"textcoords": "offset points", "fontsize": 7, "rotation": 25}
        axes.annotate(_short(cell), (across(cell), min(ratio(cell), CEILING)), (4, 5), **text)
    axes.set_yscale("log")
    axes.set_xscale("log")
    plain_ticks(axes.yaxis)
    plain_ticks(axes.xaxis)


def _short(cell: FrontierCell) -> str:
    rate = "" if cell.setting.dense else f" {cell.setting.rate:g}"
    return f"{cell.setting.type}{rate}"


def _points(
    axes: Any,
    cells: Sequence[FrontierCell],
    across: Callable[[FrontierCell], float],
    colour: str,
    marker: str,
    name: str,
) -> None:
    """The cells with their standard errors; collapsed ones as arrows."""
    here = [cell for cell in cells if ratio(cell) <= CEILING]
    errors = [cell.ratio.standard_error or 0.0 for cell in here if cell.ratio]
    style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 2, "markersize": 6, "alpha": 0.85}
    if here:
        axes.errorbar([across(cell) for cell in here], [ratio(cell) for cell in here], errors, label=name, **style)
    for cell in cells:
        if ratio(cell) > CEILING:
            axes.plot([across(cell)], [CEILING], marker="^", markersize=9, color=colour)
            axes.annotate(f"{ratio(cell):.2g}", (across(cell), CEILING), (6, 0), textcoords="offset points", fontsize=7)
