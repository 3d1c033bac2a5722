"""Write and read reports: `report.json` (validated both ways, see schema.py) and a self-contained `report.html`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime_checks.json_file import read_model, write_model
from runtime_checks.schema import SCHEMA_VERSION, Report
from runtime_checks.summary import (
    COLUMNS,
    by_runtime,
    cards,
    continuations,
    failures,
    megabytes,
    row,
    verdict,
    warnings,
)
from sola_edge.errors import UserError
from sola_edge.files import replace_file

TEMPLATES = Path(__file__).parent / "templates"


def write_report(report: Report, out_dir: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into a folder and return their paths. Raises UserError."""
    return write_json(report, Path(out_dir) / "report.json"), write_html(report, Path(out_dir) / "report.html")


def write_json(report: Report, path: Path) -> Path:
    """Write the data, after validating them as they would be read. Raises UserError if the place is not writable."""
    Report.model_validate_json(report.model_dump_json())
    return write_model(report, path)


def write_html(report: Report, path: Path) -> Path:
    """Write the page. Raises UserError if the place is not writable or the packages it needs are missing."""
    text = html(report)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def html(report: Report) -> str:
    """The page: one file, no network, light and dark."""
    environment = pages("report.html")
    from runtime_checks.explain_plots import plots as explained
    from runtime_checks.plots import plots

    environment.filters["megabytes"] = megabytes
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        cards=cards(report),
        columns=COLUMNS,
        rows=[(result, row(result)) for result in by_runtime(report)],
        failures=failures(report),
        warnings=warnings(report),
        plots=plots(report),
        explained=[
            (m.name, explained(m.explained, of=f"model-{i}-")) for i, m in enumerate(report.models) if m.explained
        ],
        continuations=continuations(report),
    )


def pages(name: str) -> Any:
    """The jinja2 environment of all pages. Raises UserError, naming the page, where jinja2 is missing."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"{name} needs matplotlib and jinja2: pip install 'sola-edge[report]'") from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def load_report(paths: Sequence[Path]) -> Report:
    """Read one or more report.json files as one report: later results are appended. Raises UserError."""
    if not paths:
        raise UserError("no results were named; give one or more report.json files")
    first, *others = [_read(Path(path)) for path in paths]
    merged = first
    for other in others:
        lists = ("protocols", "notes", "models", "results", "costs", "skipped")
        appended = {name: _without_repeats(getattr(merged, name) + getattr(other, name)) for name in lists}
        merged = merged.model_copy(update={**appended, "packages": {**other.packages, **merged.packages}})
    return merged


def _without_repeats(items: list[object]) -> list[object]:
    found: list[object] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _read(path: Path) -> Report:
    wanted = f"report of schema version {SCHEMA_VERSION}"
    return read_model(Report, path, missing=f"no such result file: {path}", wanted=wanted, remedy="measure again")
