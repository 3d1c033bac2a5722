"""Write and read reports: `report.json` (validated both ways, see schema.py) and a self-contained `report.html`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime_checks.formats import FILES
from runtime_checks.json_file import read_model, write_model
from runtime_checks.schema import Report
from runtime_checks.sections import SECTIONS, Study, section
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


def write_html(report: Report, path: Path, studies: Sequence[Study] = ()) -> Path:
    """Write the page. Raises UserError if the place is not writable or the packages it needs are missing."""
    text = html(report, studies)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def html(report: Report, studies: Sequence[Study] = ()) -> str:
    """The page: one file, no network, light and dark; studies: a section for each."""
    environment = pages("report.html")
    from runtime_checks.explain_plots import plots as explained
    from runtime_checks.plots import drawn_plots, plots
    from runtime_checks.window_plots import window_plots

    environment.filters["megabytes"] = megabytes
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report, studies),
        cards=cards(report),
        columns=COLUMNS,
        rows=[(result, row(result)) for result in by_runtime(report)],
        failures=failures(report),
        warnings=warnings(report),
        plots=[*plots(report), *drawn_plots(window_plots(report))],
        explained=[
            (m.name, explained(m.explained, of=f"model-{i}-")) for i, m in enumerate(report.models) if m.explained
        ],
        continuations=continuations(report),
        sections=[section(study, number) for number, study in enumerate(studies, 1)],
        passed=report.passed and all(study.passed for study in studies),
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


def load_results(paths: Sequence[Path]) -> tuple[Report, list[Study]]:
    """Read files of results: all report.json files as one report, and the studies, in the order given. Raises UserError.

    Without a report.json the report has no results, and the provenance of the first study.
    """
    if not paths:
        raise UserError("no results were named; give one or more files that checks wrote")
    found = [_read(Path(path)) for path in paths]
    studies = [one for one in found if not isinstance(one, Report)]
    reports = [one for one in found if isinstance(one, Report)]
    return (_merged(reports) if reports else _empty(studies[0])), studies


def load_report(paths: Sequence[Path]) -> Report:
    """Read one or more report.json files as one report: later results are appended. Raises UserError."""
    report, studies = load_results(paths)
    if studies:
        raise UserError(f"{', '.join(map(str, paths))}: only report.json files can be one report")
    return report


def _empty(study: Study) -> Report:
    packages = getattr(study, "packages", {})
    return Report(created=study.created, command=study.command, machine=study.machine, packages=packages)


def _merged(reports: Sequence[Report]) -> Report:
    merged, *others = reports
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


def _read(path: Path) -> Report | Study:
    """As the kind of file that its fields say it is. Raises UserError for one that no page shows."""
    kind = _kind(path)
    if kind is not Report and kind not in SECTIONS:
        file = next(name for name, (model, _) in FILES.items() if model is kind)
        shown = ", ".join(name for name, (model, _) in FILES.items() if model is Report or model in SECTIONS)
        raise UserError(f"{path} is a {file}, which no page shows: give one of {shown}")
    version = kind.model_fields["schema_version"].default
    name = SECTIONS[kind].name if kind in SECTIONS else "report"
    wanted = f"{name} of schema version {version}"
    found: Report | Study = read_model(
        kind, path, missing=f"no such result file: {path}", wanted=wanted, remedy="measure again"
    )
    return found


def _kind(path: Path) -> Any:
    """The model that lacks the fewest fields and has the fewest too many: what an older version wrote has some of either."""
    try:
        fields = set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # told when it is read
        return Report

    def wrong(kind: Any) -> int:
        required = {name for name, field in kind.model_fields.items() if field.is_required()}
        return len(required - fields) + len(fields - set(kind.model_fields))

    return min((model for model, _ in FILES.values()), key=wrong)
