"""A comparison as pictures: perplexity ÷ dense over rate, and predicted against measured rise of the loss."""

from pathlib import Path
from typing import Any

from runtime_checks.compare_schema import Cell, Comparison
from runtime_checks.pictures import plain_ticks, write_panels
from runtime_checks.plots import LINE_COLOURS, STYLES
from runtime_checks.study_schema import Estimate

BAND = 0.2  # of the measured rise: how near a good prediction is
CEILING = 100.0  # perplexity ÷ dense: what is above has collapsed, and how far would only flatten all other lines

FEW = 4  # lines whose names have room among them


def write_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture as PNG. Raises UserError if the place is not writable."""
    panels = [lambda axes: draw_ratios(axes, comparison), lambda axes: draw_predictions(axes, comparison)]
    write_panels(path, panels, height=4.6 if len(comparison.labels) <= FEW else 5.6)


def colour_and_style(comparison: Comparison, label: str) -> tuple[str, str]:
    """The same in every picture of a comparison."""
    at = comparison.labels.index(label)
    return LINE_COLOURS[at % len(LINE_COLOURS)], STYLES[at // len(LINE_COLOURS) % len(STYLES)]


def draw_ratios(axes: Any, comparison: Comparison) -> None:
    """Perplexity ÷ dense over rate, one line per method with its standard errors, log scale; 1 is the dense model.

    Ratios above CEILING are arrows at it, with their value beside them.
    """
    for label in comparison.labels:
        cells = [c for c in comparison.cells if c.label == label and c.ratio is not None]
        if not cells:
            continue
        colour, style = colour_and_style(comparison, label)
        values = [min(c.ratio.value, CEILING) for c in cells if c.ratio]
        errors = [_drawn_error(c.ratio) for c in cells if c.ratio]
        where = [c.achieved for c in cells]
        axes.errorbar(where, values, errors, color=colour, linestyle=style, marker="o", capsize=3, label=label)
        _mark_collapsed(axes, cells, colour, above=len(axes.texts))
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xlabel("share of the parameters removed")
    axes.set_ylabel("perplexity ÷ dense")
    lines = len(axes.get_legend_handles_labels()[0])
    if lines > FEW:  # below, where they hide nothing
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=9)
    elif lines:
        axes.legend(frameon=False)


def _drawn_error(ratio: Estimate) -> float:
    return 0.0 if ratio.value > CEILING else ratio.standard_error or 0.0


def _mark_collapsed(axes: Any, cells: list[Cell], colour: str, above: int) -> None:
    """above: how many such figures stand there already; each has a line of its own."""
    for cell in cells:
        if cell.ratio and cell.ratio.value > CEILING:
            axes.plot([cell.achieved], [CEILING], marker="^", markersize=10, color=colour)
            text = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": colour}
            axes.annotate(f"{cell.ratio.value:.2g}", (cell.achieved, CEILING), (9, -10 * (above + 1)), **text)


def draw_predictions(axes: Any, comparison: Comparison, marked: Cell | None = None) -> None:
    """Measured over predicted rise in nats, with the diagonal and a band. Points are labelled by rate, `marked` is circled."""
    points = comparison.predictions
    axes.set_xlabel("predicted rise of the loss, nats")
    axes.set_ylabel("measured rise, nats")
    if not points:
        axes.text(0.5, 0.5, "no method here predicts its loss", ha="center", va="center", transform=axes.transAxes)
        return
    named: set[str] = set()
    for cell, predicted, rise in points:
        colour, _ = colour_and_style(comparison, cell.label)
        about = {"color": colour, "label": None if cell.label in named else cell.label}
        named.add(cell.label)
        axes.errorbar([predicted], [rise.value], [rise.standard_error or 0.0], fmt="o", capsize=3, **about)
        axes.annotate(f"{cell.rate:g}", (predicted, rise.value), (7, -9), textcoords="offset points", fontsize=8)
        if cell is marked:
            axes.plot([predicted], [rise.value], "o", markersize=13, fillstyle="none", color=colour)
    _diagonal(axes, [value for _, predicted, rise in points for value in (predicted, rise.value)])


def _diagonal(axes: Any, values: list[float]) -> None:
    positive = min(values) > 0
    ends = [min(values) / 1.5, max(values) * 1.5] if positive else [min(*values, 0.0), max(*values, 1e-6) * 1.2]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.fill_between(ends, [(1 - BAND) * v for v in ends], [(1 + BAND) * v for v in ends], color="grey", alpha=0.15)
    axes.text(0.98, 0.03, f"grey: as predicted ± {100 * BAND:.0f} %", ha="right", fontsize=8, transform=axes.transAxes)
    axes.legend(frameon=False, loc="upper left")
    if positive:
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
