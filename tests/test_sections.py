"""A report's page with studies: every kind is a section with its pictures and data, and a real browser lays it out."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime_checks import load_report, load_results
from runtime_checks.accuracy_schema import AccuracyReport, AccuracyResult, AskedTask
from runtime_checks.frontier_schema import read_frontier
from runtime_checks.json_file import write_model
from runtime_checks.limits import Limits
from runtime_checks.machine import run_record
from runtime_checks.memory_curve import MemoryCurve, MemoryPoint, MemoryReport
from runtime_checks.report import html
from runtime_checks.schema import Memory, Skipped
from runtime_checks.sections import SECTIONS, Study, section
from runtime_checks.task_schema import Difference, Share
from runtime_checks.throughput_grid import SpeedTest, ThroughputCurve, ThroughputPoint, ThroughputReport
from sola_edge.cli import app
from sola_edge.errors import UserError

FRONTIER = Path(__file__).parent.parent / "docs" / "results" / "frontier" / "frontier.json"  # SmolLM2's, measured
COMPARISON = FRONTIER.parent.parent / "wikitext2" / "compare.json"
ABOUT = {"kind": "gguf", "precision": "f16", "bytes": 2_000_000, "runtime": "llama.cpp", "version": "1"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


def memory_study(reasons: list[str]) -> MemoryReport:
    found = Memory(covers="x", baseline=1, after_load=2, peak=50_000_000, anonymous=1, file_backed=None, parts={})
    points = [
        MemoryPoint(
            context=n,
            memory=found,
            peaks=[50_000_000, 52_000_000],
            system_peak=None,
            system_off=0,
            expected={"weights": 49_000_000},
        )
        for n in (512, 2048)
    ]
    curve = MemoryCurve(artefact="build/small.gguf", points=points, reasons=reasons, **ABOUT)
    skipped = [Skipped(what="a.onnx", reason="not installed")]
    return MemoryReport(**run_record(1), packages={}, tolerance=0.05, rounds=2, curves=[curve], skipped=skipped)


def throughput_study() -> ThroughputReport:
    points = [
        ThroughputPoint(
            test=SpeedTest(threads=1, batch=batch, prompt=prompt, generate=8),
            first_token=[0.1, 0.11],
            decode=[0.5, 0.4],
            step_bytes=1_000_000,
            prompt_flops=None,
        )
        for batch in (1, 2)
        for prompt in (64, 256)
    ]
    limits = [Limits(threads=1, array=8, bandwidth={"sum": 1e9}, gemm=1e11)]
    curves = [
        ThroughputCurve(artefact=f"build/a quite long name {n}.gguf", points=points, reasons=[], **ABOUT)
        for n in range(3)
    ]
    return ThroughputReport(
        **run_record(1), packages={}, others_busy=0.5, rounds=2, baseline=None, limits=limits, curves=curves, skipped=[]
    )


def accuracy_study() -> AccuracyReport:
    share = Share(value=0.5, standard_error=0.1)
    task = AskedTask(name="piqa", source="piqa.jsonl", sha256="0", version="1", questions=25)
    result = AccuracyResult(
        artefact="build/small.gguf", kind="gguf", precision="f16", runtime="llama.cpp", version="1", task="piqa", n=25,
        metric="acc", metrics={"acc": share}, values=[0.0], difference=Difference(baseline="d", value=0.1, standard_error=0.1),
        seconds=1.0,
    )  # fmt: skip
    return AccuracyReport(**run_record(1), packages={}, tasks=[task], results=[result], skipped=[], reasons=[])


def studies(reasons: list[str] | None = None) -> list[Study]:
    return [read_frontier(FRONTIER), memory_study(reasons or []), throughput_study(), accuracy_study()]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write_model(study, tmp_path / f"{n}.json") for n, study in enumerate(studies())]


def test_there_is_a_section_for_every_kind_with_pictures_whose_data_are_told() -> None:
    assert {type(study) for study in studies()} == set(SECTIONS)
    for number, study in enumerate(studies(), 1):
        found = section(study, number)
        assert found.plots and found.tables and found.explained
        for plot in found.plots:
            assert f'aria-label="study-{number}-' in plot.svg
            heads, *rows = plot.rows
            assert rows and all(len(row) == len(heads) for row in rows)


def test_a_study_without_a_figure_has_a_section_without_pictures() -> None:
    frontier = read_frontier(FRONTIER)
    empty: list[Study] = [
        frontier.model_copy(update={"cells": []}),
        memory_study([]).model_copy(update={"curves": []}),
        throughput_study().model_copy(update={"curves": []}),
        accuracy_study().model_copy(update={"results": []}),
    ]
    for study in empty:
        assert section(study, 1).plots == []


def test_what_is_kept_of_a_frontier_is_what_its_page_says() -> None:
    found = section(read_frontier(FRONTIER), 1)
    assert any("Plain quantization wins against" in line for line in found.lead)
    heads, *rows = found.plots[0].rows
    front = [row for row in rows if row[heads.index("on the front")]]
    assert len(front) == sum("B" in row[-2] for row in found.tables[0].rows)


def test_files_are_read_by_what_they_are(files: list[Path]) -> None:
    report, found = load_results(files)
    assert [type(study) for study in found] == [type(study) for study in studies()]
    assert report.results == [] and report.created == found[0].created
    with pytest.raises(UserError, match=r"only report.json files can be one report"):
        load_report(files)


def test_files_of_one_name_are_told_apart() -> None:
    found = throughput_study()
    two = [found.curves[0].model_copy(update={"artefact": path}) for path in ("a/model.gguf", "b/model.gguf")]
    names = ["a/model.gguf (f16) in llama.cpp", "b/model.gguf (f16) in llama.cpp"]
    told = section(found.model_copy(update={"curves": two}), 1)
    assert [table.title for table in told.tables] == names
    assert {row[0] for row in told.plots[0].rows[1:]} == set(names)
    accuracy = accuracy_study()
    results = [accuracy.results[0].model_copy(update={"artefact": path}) for path in ("a/model.gguf", "b/model.gguf")]
    both = section(accuracy.model_copy(update={"results": results}), 1)
    assert len(both.tables[0].rows) == 2 and len(both.plots[0].rows) == 3


@pytest.mark.parametrize("name", ["frontier/frontier.json", "memory/memory.json", "accuracy/accuracy.json"])
def test_published_results_are_of_the_present_schema(name: str) -> None:
    assert load_results([FRONTIER.parent.parent / name])[1]


def test_what_is_wrong_is_told_of_the_kind_that_a_file_is(files: list[Path], tmp_path: Path) -> None:
    damaged = json.loads(files[1].read_text()) | {"tolerance": "much"}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=r"is no result of check memory of schema version 2 \(tolerance: "):
        load_results([tmp_path / "damaged.json"])
    with pytest.raises(UserError, match=r"is a compare\.json, which no page shows: give one of report\.json, frontier"):
        load_results([COMPARISON])
    older = {name: value for name, value in json.loads(files[1].read_text()).items() if name != "rounds"}
    (tmp_path / "older.json").write_text(json.dumps(older | {"schema_version": 1}))
    with pytest.raises(UserError, match="is no result of check memory of schema version 2"):
        load_results([tmp_path / "older.json"])


def test_a_failed_study_fails_the_page(files: list[Path], tmp_path: Path) -> None:
    page = html(load_results(files)[0], studies(["512 tokens: killed"]))
    assert "parts of 1 of 4 studies failed" in page and "512 tokens: killed" in page
    failed = write_model(memory_study(["512 tokens: killed"]), tmp_path / "failed.json")
    done = CliRunner().invoke(app, ["report", str(failed), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 1 and (tmp_path / "page.html").is_file()
    assert "failed: small.gguf (f16) in llama.cpp: 512 tokens: killed" in done.stdout


def test_the_command_writes_one_page_of_all(files: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, files), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert page.count('<div class="card"><h3>') == sum(len(section(s, 1).plots) for s in studies())
    assert "other programs took 50 % of the cores" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


# --- a real browser --------------------------------------------------------------------------------------------------

LOOK = """<script>
const box = (e) => e.getBoundingClientRect();
const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg') &&
  box(e).right > innerWidth + 1).map(e => e.tagName + ' ' + e.className);
const small = [...document.querySelectorAll('svg[role=img]')].filter(e => box(e).width < 200 || box(e).height < 60)
  .map(e => e.getAttribute('aria-label'));
parent.document.title = JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth, wide, small,
  pictures: document.querySelectorAll('svg[role=img]').length,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.querySelector('svg')).color});
</script>"""
FRAME = '<!doctype html><title></title><iframe style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe>'
"""A browser's own window is 500 wide at least; a frame is as narrow as a phone."""


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_lays_the_page_out(tmp_path: Path, files: list[Path], width: int, dark: bool) -> None:
    """Nothing sticks out but what scrolls, no picture is squashed, and light and dark are two."""
    from test_report import sample_report

    page = html(sample_report(), load_results(files)[1])
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    framed = FRAME.format(width=width, page=escape(page.replace("</body>", LOOK + "</body>")))
    (tmp_path / "page.html").write_text(framed)
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--window-size=1400,2000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    seen = json.loads(unescape(title[1]))
    assert seen["inner"] == width and seen["scroll"] <= width
    assert seen["wide"] == [] and seen["small"] == []
    assert seen["pictures"] == page.count('role="img"') > 15
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) / 3 for key in ("paper", "ink"))
    assert (paper < 60 and ink > 190) if dark else (paper > 190 and ink < 60)
