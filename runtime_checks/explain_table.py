"""A compressed checkpoint explained on the terminal: one row per layer, totals below."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime_checks.explain_schema import PREMISE, Explanation, LayerFound, Matrix
from runtime_checks.summary import DASH, number
from sola_edge.architecture import COMPONENTS

SHORT = {"plain": "r", "pivoted": "p"}
LEGEND = "whole; r256: a product of rank 256; p256: the same, pivoted. Neurons: kept, of the dense model's."


def print_explanation(found: Explanation, console: Console | None = None) -> None:
    """Print the layers, the totals and what the activations say, to stdout."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    heads = ["Layer", f"Neurons\nof {found.layers[0].neurons_dense}", "Prime", *COMPONENTS]
    heads += ["Attn.", "FFN"] if found.unit else []
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for row in found.layers:
        table.add_row(*map(escape, cells_of(row, bool(found.unit))))
    console.print(table)
    predicted = f" Attn., FFN: predicted rise of the loss, {found.unit}." if found.unit else ""
    console.print(LEGEND + predicted, style="dim", markup=False, highlight=False)
    for line in totals(found):
        console.print(line, markup=False, highlight=False)


def cells_of(row: LayerFound, predicted: bool) -> list[str]:
    """The cells of a layer."""
    cells = [str(row.layer), str(row.neurons), str(row.prime) if row.prime else DASH]
    cells += [_short(row.matrices[component]) for component in COMPONENTS]
    return cells + ([number(row.predicted_attention, 2), number(row.predicted_ffn, 2)] if predicted else [])


def _short(matrix: Matrix) -> str:
    return matrix.form if matrix.rank is None else f"{SHORT[matrix.form]}{matrix.rank}"


def totals(found: Explanation) -> list[str]:
    """What all layers come to, one line each."""
    removed, (kept, dense) = found.parameters_dense - found.parameters, found.neurons
    lines = [
        f"Parameters: {found.parameters:,} of {found.parameters_dense:,}; {removed:,} removed, rate {found.rate:.5f}.",
        f"FFN neurons: {kept:,} of {dense:,} kept.",
    ]
    if found.predicted is not None:
        attention = sum(row.predicted_attention or 0.0 for row in found.layers)
        ffn = sum(row.predicted_ffn or 0.0 for row in found.layers)
        lines.append(
            f"Predicted rise of the loss: {number(found.predicted)} {found.unit}, {number(attention)} of it by attention, "
            f"{number(ffn)} by the FFNs."
        )
    retained = [m.retained for row in found.layers for m in row.matrices.values() if m.retained is not None]
    if retained:
        lines.append(f"Energy that the factors keep: {min(retained):.1%} to {max(retained):.1%}.")
    return [*lines, *norm_lines(found)]


def norm_lines(found: Explanation) -> list[str]:
    """SoLA's premise beside what was measured."""
    norm = found.norm_share
    if norm is None:
        return []
    return [
        f"{norm.neurons:.0%} of a layer's neurons carry {norm.minimum:.0%} / {norm.median:.0%} / {norm.maximum:.0%} of the "
        f"norm (least / median / most of all layers); SoLA's premise says {PREMISE[1]:.0%}."
    ]
