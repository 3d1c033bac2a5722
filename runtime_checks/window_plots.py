"""Pictures of what was measured window by window: how far an export is from its reference, and what compression costs."""

import math
from collections.abc import Sequence

from runtime_checks.plot import Value
from runtime_checks.plots import INK, LINE_COLOURS, STYLES, WIDTH, Drawn, pyplot, svg_of
from runtime_checks.schema import Cost, Report, Result
from runtime_checks.summary import label

LEAST = 1e-16  # what a KL divergence of 0 is drawn as, on its log scale
Line = tuple[str, str, list[float]]  # runtime and type, model, a value for every window


def window_plots(report: Report) -> list[tuple[str, Drawn | None]]:
    """Titles and pictures; None where there are not two windows."""
    changes = _of_parity(report, "window_ppl_change_percent")
    return [
        (
            "Mean KL to the reference by window, nats",
            _draw(_of_parity(report, "window_kl"), "window-kl", "mean KL, nats", logarithmic=True),
        ),
        ("Change of perplexity against the reference's by window, %", _draw(changes, "window-perplexity", "change, %")),
        (
            "Change of perplexity against the baseline model's by window, %",
            _draw(_of_costs(report), "window-cost", "change, %"),
        ),
    ]


def _of_parity(report: Report, series: str) -> list[Line]:
    """Of every compared artefact whose logits are finite in all windows."""
    found = [(r, getattr(r.parity, series)) for r in report.results if r.parity is not None]
    return [(label(r), r.model, values) for r, values in found if all(v is not None for v in values)]


def _of_costs(report: Report) -> list[Line]:
    """Of every model in the first runtime that has figures of it and its baseline; others' lines would lie upon it."""
    lines: dict[str, Line] = {}
    for cost in report.costs:
        ours, theirs = (_window_nll(report, cost, model) for model in (cost.model, cost.baseline))
        if cost.model not in lines and ours and len(ours) == len(theirs):
            changes = [100 * math.expm1(min(a - b, 700.0)) for a, b in zip(ours, theirs, strict=True)]
            lines[cost.model] = (label(cost), f"{cost.model} / {cost.baseline}", changes)
    return list(lines.values())


def _window_nll(report: Report, cost: Cost, model: str) -> list[float]:
    """Mean NLL by window; empty where there is none, or it is not finite."""
    for result in report.results:
        if _is(result, cost, model) and result.perplexity is not None:
            values = [value for value in result.perplexity.window_nll if value is not None]
            return values if len(values) == len(result.perplexity.window_nll) else []
    return []


def _is(result: Result, cost: Cost, model: str) -> bool:
    return (result.model, result.runtime, result.precision) == (model, cost.runtime, cost.precision)


def _draw(lines: Sequence[Line], name: str, head: str, logarithmic: bool = False) -> Drawn | None:
    """A line over the windows for each that has two; colours are runtimes, strokes are models."""
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    runtimes = list(dict.fromkeys(runtime for runtime, _, _ in lines))
    models = list(dict.fromkeys(model for _, model, _ in lines))
    for runtime, model, values in lines:
        drawn = [max(value, LEAST) for value in values] if logarithmic else values
        style = STYLES[models.index(model) % len(STYLES)]
        colour = LINE_COLOURS[runtimes.index(runtime) % len(LINE_COLOURS)]
        axes.plot(range(1, len(drawn) + 1), drawn, style, color=colour, marker="o", markersize=3)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.axhline(0.0, color=INK, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("window")
    handles = [plt.Line2D([], [], color=LINE_COLOURS[i % len(LINE_COLOURS)]) for i, _ in enumerate(runtimes)]
    handles += [plt.Line2D([], [], color=INK, linestyle=STYLES[i % len(STYLES)]) for i, _ in enumerate(models)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.42, -0.22)}
    axes.legend(handles, [*runtimes, *models], ncols=2, frameon=False, fontsize=9, **place)
    rows: list[list[Value]] = [
        [runtime, model, i, value] for runtime, model, values in lines for i, value in enumerate(values, 1)
    ]
    return svg_of(figure, name), [["runtime", "model", "window", head], *rows]
