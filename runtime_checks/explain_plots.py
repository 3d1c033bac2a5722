"""Pictures of what was done to a compressed checkpoint: heat maps by layer and component, activation curves, predictions."""

import math
from collections.abc import Sequence

from runtime_checks.compare_plot import draw_predictions
from runtime_checks.compare_schema import Cell, Comparison
from runtime_checks.explain_schema import PREMISE, Explanation, LayerFound
from runtime_checks.plot import Plot, Rows, Value
from runtime_checks.plots import WIDTH, Drawn, pyplot, svg_of
from runtime_checks.summary import number
from sola_edge.architecture import ATTENTION, COMPONENTS

MOST_LABELLED = 48  # layers whose cells still have room for a number


def plots(found: Explanation, comparison: Comparison | None = None, of: str = "") -> list[Plot]:
    """Every picture that there are data for; `of`: told apart from another model's on one page.

    Raises UserError without matplotlib.
    """
    layers = found.layers
    shares = [[100 * row.matrices[c].share for c in COMPONENTS] for row in layers]
    pictures = [
        ("Parameters kept, %", heat_map(layers, COMPONENTS, shares, f"{of}kept", 100.0)),
        ("Ranks, and their share of full rank, %", ranks(layers, f"{of}ranks")),
        ("FFN neurons, % of the dense model's", neurons(layers, f"{of}neurons")),
    ]
    if found.unit:
        rows = [
            [*(_or_nan(row.matrices[c].predicted) for c in ATTENTION), _or_nan(row.predicted_ffn)] for row in layers
        ]
        title = f"Predicted rise of the loss, {'millinats' if found.unit == 'nats' else '‰ of the output energy'}"
        pictures.append(
            (title, heat_map(layers, (*ATTENTION, "FFN"), [[1000 * v for v in row] for row in rows], f"{of}predicted"))
        )
    retained = [[100 * _or_nan(row.matrices[c].retained) for c in COMPONENTS] for row in layers]
    if not all(math.isnan(value) for row in retained for value in row):
        pictures.append(
            ("Energy that the factors keep, %", heat_map(layers, COMPONENTS, retained, f"{of}retained", 100.0))
        )
    if found.norm_neurons:
        pictures.append(("Norm carried by the largest neurons, %", norm_curves(found, f"{of}norm-curves")))
    if comparison is not None:
        pictures.append(("Predicted and measured rise of the loss", predictions(found, comparison)))
    return [Plot(title, *drawn) for title, drawn in pictures]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def ranks(layers: Sequence[LayerFound], name: str) -> Drawn:
    """Of every matrix; a whole one has its full rank."""
    rows = [[row.matrices[c] for c in COMPONENTS] for row in layers]
    shares = [[100.0 if m.rank is None else 100 * m.rank / min(m.n_out, m.n_in) for m in row] for row in rows]
    words = [["whole" if m.rank is None else str(m.rank) for m in row] for row in rows]
    return heat_map(layers, COMPONENTS, shares, name, 100.0, words)


def neurons(layers: Sequence[LayerFound], name: str) -> Drawn:
    """Kept and prime ones; in an FFN without a product all kept ones are whole."""
    shares = [[100 * n / row.neurons_dense for n in (row.neurons, row.prime)] for row in layers]
    return heat_map(layers, ("kept", "of them prime beside a product"), shares, name, 100.0)


def heat_map(
    layers: Sequence[LayerFound],
    columns: Sequence[str],
    values: list[list[float]],
    name: str,
    top: float | None = None,
    words: list[list[str]] | None = None,
) -> Drawn:
    """Layers down, columns across; NaN stays empty. top: end of the scale, None: the largest value. words: None: the values."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.19 * len(layers)))
    largest = max((v for row in values for v in row if not math.isnan(v)), default=0.0)
    end = top or largest or 1.0
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=end)
    for y, row in enumerate(values) if len(layers) <= MOST_LABELLED else ():
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "#ffffff" if value < 0.6 * end else "#111111"
                text = words[y][x] if words else number(value, 4 if top else 3)
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.xaxis.tick_top()
    step = max(1, len(layers) // 15)
    axes.set_yticks(range(0, len(layers), step), [str(row.layer) for row in layers[::step]])
    axes.set_ylabel("decoder layer")
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    told: Rows = words or [[None if math.isnan(v) else v for v in row] for row in values]
    rows: list[list[Value]] = [[row.layer, *cells] for row, cells in zip(layers, told, strict=True)]
    return svg_of(figure, name), [["layer", *columns], *rows]


def norm_curves(found: Explanation, name: str) -> Drawn:
    """One curve per layer, dark ones first; the cross is SoLA's premise."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    neurons = [0.0, *(100 * share for share in found.norm_neurons or []), 100.0]
    colours = plt.get_cmap("viridis")
    last = max(len(found.layers) - 1, 1)
    for row in found.layers:
        carried = [0.0, *(100 * share for share in row.norms or []), 100.0]
        axes.plot(neurons, carried, color=colours(0.9 * row.layer / last), linewidth=1, alpha=0.8)
    axes.plot([100 * PREMISE[0]], [100 * PREMISE[1]], "x", color="#b3261e", markersize=9, markeredgewidth=2)
    axes.annotate("SoLA's premise", (100 * PREMISE[0], 100 * PREMISE[1]), (8, -4), textcoords="offset points")
    axes.set_xlabel("share of a layer's neurons, largest first, %")
    axes.set_ylabel("share of the norm, %")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    rows = [
        [row.layer, n, 100 * c] for row in found.layers for n, c in zip(neurons[1:-1], row.norms or [], strict=False)
    ]
    return svg_of(figure, name), [["layer", "largest neurons, %", "share of the norm they carry, %"], *rows]


def predictions(found: Explanation, comparison: Comparison) -> Drawn:
    """Every predicted cell of a comparison; this checkpoint's own is circled."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    draw_predictions(axes, comparison, _own(found, comparison))
    rows = [[c.label, c.rate, rise, m.value, m.standard_error] for c, rise, m in comparison.predictions]
    return svg_of(figure, "predictions"), [["method", "rate", "predicted, nats", "measured", "standard error"], *rows]


def _own(found: Explanation, comparison: Comparison) -> Cell | None:
    """The comparison's cell of this checkpoint: made with the same settings."""
    return next((cell for cell in comparison.cells if cell.settings == found.settings), None)
