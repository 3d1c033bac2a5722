"""A compressed checkpoint explained on one self-contained page: heat maps, activation curves, predictions, a table."""

from pathlib import Path

from runtime_checks.compare_schema import Comparison, read_comparison
from runtime_checks.explain_plots import plots
from runtime_checks.explain_schema import Explanation
from runtime_checks.explain_table import norm_lines, totals
from runtime_checks.report import pages
from runtime_checks.summary import DASH, number
from sola_edge.architecture import COMPONENTS
from sola_edge.files import check_file_target, replace_file

TEMPLATE = "explain.html"


def write_page(found: Explanation, path: Path, compared: Path | None = None) -> Path:
    """Write the page; compared: a compare.json. Raises UserError if the place is not writable or packages are missing."""
    check_file_target(path)
    text = page(found, read_comparison(compared) if compared else None)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def page(found: Explanation, comparison: Comparison | None = None) -> str:
    """The page: one file, no network, light and dark."""
    environment = pages("the page")
    environment.filters["number"] = number
    return environment.get_template(TEMPLATE).render(
        found=found,
        components=COMPONENTS,
        totals=[line for line in totals(found) if line not in norm_lines(found)],
        norms=norm_lines(found),
        plots=plots(found, comparison),
        dash=DASH,
    )
