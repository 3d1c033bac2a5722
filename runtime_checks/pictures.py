"""What the pictures of studies share: a PNG with panels side by side, and ticks that read well."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sola_edge.files import replace_file


def write_panels(path: Path, draw: Sequence[Callable[[Any], None]], width: float = 11, height: float = 4.6) -> None:
    """Write a PNG of one panel per function, which draws on the axes that it is given. Raises UserError for the place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(draw, figure.subplots(1, len(draw)), strict=True):
        panel(axes)
    with replace_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")


def plain_ticks(axis: Any) -> None:
    """Within two decades of a log scale, numbers as they are spoken, where matplotlib would write powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    if low <= 0 or high / low > 100:
        return
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
