"""What a report's page says of a study that has a file of its own: a frontier, memory, throughput, accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from runtime_checks import accuracy_table, frontier_table, memory_table, section_plots, throughput_table
from runtime_checks.accuracy_schema import AccuracyReport
from runtime_checks.frontier_front import verdict
from runtime_checks.frontier_schema import Frontier
from runtime_checks.grids import file_names
from runtime_checks.memory_curve import MemoryReport
from runtime_checks.plot import Plot
from runtime_checks.summary import reused
from runtime_checks.throughput_grid import ThroughputReport

Study = Frontier | MemoryReport | ThroughputReport | AccuracyReport


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; title: of which artefact, empty where the rows say it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """title; lead: what it says, in sentences; explained: how to read the tables; provenance: by which command, when and where;
    failures: what could not be measured.
    """

    title: str
    tables: list[Table]
    plots: list[Plot]
    explained: list[str]
    provenance: str
    lead: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def section(study: Study, number: int) -> Section:
    """Of one study; number: of the section, which tells its pictures apart from others. Raises UserError without matplotlib."""
    return SECTIONS[type(study)].section(study, f"study-{number}-")


def _common(study: Any) -> dict[str, Any]:
    where = study.machine
    versions = "".join(f", {name} {version}" for name, version in getattr(study, "packages", {}).items())
    told = (
        f"{where.processor}, {where.cores} cores, {where.threads_used} threads, {where.system}, Python {where.python}"
    )
    return {
        "provenance": f"{study.created} · {' '.join(study.command)} · {told}{versions}",
        "failures": study.failures,
    }


def _skipped(study: Any) -> list[str]:
    return [f"skipped: {one.what}: {one.reason}" for one in study.skipped]


def _frontier(study: Frontier, of: str) -> Section:
    return Section(
        title=f"Frontier of {study.protocol.model}: bytes and speed against perplexity",
        lead=verdict(study),
        tables=[Table(frontier_table.HEADS, frontier_table.rows(study))],
        plots=section_plots.frontier(study, of),
        explained=[
            frontier_table.EXPLAINED,
            frontier_table.reference_line(study),
            *(line for line in frontier_table.notes(study) if line not in study.failures),
            frontier_table.how(study),
        ],
        **_common(study),
    )


def _memory(study: MemoryReport, of: str) -> Section:
    names = file_names(study.curves)
    tables = [
        Table(heads, rows, title)
        for name, curve in zip(names, study.curves, strict=True)
        for title, heads, rows in memory_table.tables(name, curve)
    ]
    moments = reused(point.measured for curve in study.curves for point in curve.points)
    return Section(
        title="Memory by length of context",
        tables=tables,
        plots=section_plots.memory(study, of),
        explained=[memory_table.explained(study), *moments, *_skipped(study)],
        **_common(study),
    )


def _throughput(study: ThroughputReport, of: str) -> Section:
    heads = (*throughput_table.TEST, *throughput_table.SPEEDS, *throughput_table.SHARES)
    tables = [
        Table(
            heads,
            [
                (*throughput_table.test(p), *throughput_table.speeds(p), *throughput_table.shares(study, curve, p))
                for p in curve.points
            ],
            name,
        )
        for name, curve in zip(file_names(study.curves), study.curves, strict=True)
    ]
    return Section(
        title="Speed by prompt, batch and threads, beside the machine's limits",
        tables=tables,
        plots=section_plots.throughput(study, of),
        explained=[throughput_table.EXPLAINED, *throughput_table.limit_lines(study), *_skipped(study)],
        warnings=throughput_table.warnings(study),
        **_common(study),
    )


def _accuracy(study: AccuracyReport, of: str) -> Section:
    return Section(
        title="Zero-shot accuracy",
        tables=[Table(accuracy_table.heads(study), accuracy_table.rows(study))],
        plots=section_plots.accuracy(study, of),
        explained=[accuracy_table.EXPLAINED, *reused(r.measured for r in study.results), *_skipped(study)],
        **_common(study),
    )


@dataclass(frozen=True)
class Kind:
    """A kind of study that a page can hold: what its file is called in a complaint, and what makes its section."""

    name: str
    section: Callable[[Any, str], Section]


SECTIONS: dict[type[BaseModel], Kind] = {
    Frontier: Kind("frontier", _frontier),
    MemoryReport: Kind("result of check memory", _memory),
    ThroughputReport: Kind("result of check throughput", _throughput),
    AccuracyReport: Kind("result of check accuracy", _accuracy),
}
