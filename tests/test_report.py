"""The report: its data survive a round trip, its page opens offline, its table and summary say what was measured."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from runtime_checks import load_report, print_table, write_report
from runtime_checks.checks import new_report
from runtime_checks.costs import costs_of
from runtime_checks.explain_plots import plots as explain_plots
from runtime_checks.explain_schema import Explanation, LayerFound, Matrix, NormShare
from runtime_checks.parity import tolerance_for
from runtime_checks.plots import plots
from runtime_checks.report import html, write_json
from runtime_checks.schema import (
    Generation,
    Memory,
    Model,
    Parity,
    Perplexity,
    ProtocolRecord,
    Report,
    Result,
    Skipped,
    Speed,
    Throughput,
)
from runtime_checks.summary import cards, continuations, label, number, verdict, warnings
from runtime_checks.window_plots import window_plots
from sola_edge.errors import UserError

PARAMETERS = {"dense": 134_515_008, "compressed": 107_612_006}
RUNTIMES = (
    ("torch", "fp32"),
    ("onnxruntime", "fp32"),
    ("onnxruntime-genai", "fp32"),
    ("llama.cpp", "f16"),
    ("llama.cpp", "q8_0"),
)
BYTES = {"fp32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


def sample_result(model: str, runtime: str, precision: str, fails: bool) -> Result:
    """A row of plausible figures."""
    parameters = PARAMETERS[model]
    size = int(parameters * BYTES[precision])
    perplexity = 22.04 if model == "dense" else 45.5
    kl = {"fp32": 3e-11, "f16": 2e-6, "q8_0": 6e-4}[precision] * (1e4 if fails else 1)
    base, factor = {"fp32": (350.0, 23.0), "f16": (550.0, 58.0), "q8_0": (518.0, 90.0)}[precision]
    gain = 1.0 if model == "dense" else 1.2
    kind = {"torch": "checkpoint", "llama.cpp": "gguf"}.get(runtime, "onnx")
    parity = Parity(
        reference="checkpoint", reference_runtime="torch", kl_mean=kl, kl_median=kl / 2, kl_p99=kl * 8, kl_max=kl * 30,
        top1=0.9995, max_logit_difference=0.01, ppl_change_percent=0.002, ppl_change_standard_error=0.001,
        window_kl=[kl * f for f in (0.8, 1.1, 0.9, 1.2)], window_ppl_change_percent=[0.001, 0.003, 0.002, 0.002],
        nonfinite=0, tolerance=tolerance_for(precision), passed=not fails, reasons=["mean KL 2e-2 > 1e-4"] if fails else [],
    )  # fmt: skip
    told = {"weights": size, "kv": 23_600_000, "compute": 50_000_000} if kind == "gguf" else {"kv": 23_600_000}
    text = " Rome. The capital of Spain is Madrid." if model == "dense" else " Rome. The capital of the country is"
    return Result(
        model=model, artefact=f"build/demo/{model}/{precision}", kind=kind, precision=precision, runtime=runtime,
        version="1.0", bytes=size + 2_000_000, parameters=parameters, expected_bytes=size,
        memory=Memory(covers="loading", baseline=60_000_000, after_load=size + 70_000_000, peak=size + 180_000_000,
                      anonymous=size, file_backed=30_000_000, parts=told),
        throughput=Throughput(
            tool="child process", threads=2, rounds=3, others_busy=0.01,
            prefill=Speed.of("pp512", 512, [base * gain, base * gain * 1.02, base * gain * 0.97]),
            decode=Speed.of("tg128", 128, [factor * gain, factor * gain * 1.04, factor * gain * 0.99]),
        ),
        perplexity=Perplexity(value=perplexity, standard_error=1.3, window_nll=[3.1] * 4, tokens=2044, nonfinite=0),
        parity=None if runtime == "torch" else parity,
        generation=Generation(
            prompt="The capital of France is Paris. The capital of Italy is", text=text,
            ids=[1, 2, 3] if precision == "fp32" else [1, 2, 4], first_difference=None if precision == "fp32" else 2,
            logit_gap=None, allowed_gap=None, passed=True, note="parts from PyTorch at token 3",
        ),
        passed=not fails, reasons=["mean KL 2e-2 > 1e-4"] if fails else [],
    )  # fmt: skip


def sample_explanation(layers: int) -> Explanation:
    ranks = {"q": None, "k": 96, "v": None, "o": 128, "gate": 256, "up": 160, "down": 224}
    shapes = {c: (192 if c in "kv" else 576, 576) for c in "qkvo"} | {
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }
    matrices = {
        c: Matrix(form="plain" if rank else "whole", rank=rank, prime=224 if rank and max(shapes[c]) == 1536 else 0,
                  n_out=shapes[c][0], n_in=shapes[c][1], parameters=100_000, parameters_dense=shapes[c][0] * shapes[c][1],
                  predicted=0.001 if c in "qkvo" else None, retained=None)
        for c, rank in ranks.items()
    }  # fmt: skip
    return Explanation(
        checkpoint="build/demo/compressed/checkpoint", architecture="llama", method="sola", settings={"rate": 0.2},
        calibration="python-docstrings, 32768 tokens", parameters=PARAMETERS["compressed"],
        parameters_dense=PARAMETERS["dense"],
        rate=0.2, predicted=0.12, unit="nats", norm_neurons=[0.15, 0.5],
        norm_share=NormShare(neurons=0.15, minimum=0.2, median=0.3, maximum=0.4),
        layers=[LayerFound(layer=i, neurons=1536, neurons_dense=1536, prime=224, matrices=matrices, predicted_attention=0.002,
                           predicted_ffn=0.003, norms=[0.3, 0.7]) for i in range(layers)],
    )  # fmt: skip


def sample_report(fails: bool = False, layers: int = 30) -> Report:
    results = [
        sample_result(m, r, p, fails and m == "compressed" and p == "f16") for m in PARAMETERS for r, p in RUNTIMES
    ]
    models = [
        Model(name=name, checkpoint=f"build/demo/{name}/checkpoint", architecture="llama", parameters=count,
              provenance={"settings": {"rate": 0.2, "method": "sola-paper"}} if name == "compressed" else {},
              explained=sample_explanation(layers) if name == "compressed" else None)
        for name, count in PARAMETERS.items()
    ]  # fmt: skip
    protocol = ProtocolRecord(
        text="doc strings", text_sha256="0" * 64, ids_sha256="1" * 64, context=512, windows=4, stride=512, bos=False,
        tokens_scored=2044,
    )  # fmt: skip
    return new_report(
        2, protocols=[protocol], notes=["Every runtime is given the same token ids."], models=models, results=results,
        costs=costs_of("dense", results, []), skipped=[Skipped(what="CUDA", reason="no GPU was found")],
    )  # fmt: skip


def test_report_round_trip(tmp_path: Path) -> None:
    report = sample_report()
    data, page = write_report(report, tmp_path)
    assert load_report([data]) == report
    assert data.name == "report.json" and page.name == "report.html"
    assert json.loads(data.read_text())["schema_version"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]  # nothing half-written


def test_reports_are_merged_without_repeats(tmp_path: Path) -> None:
    report = sample_report()
    half = report.model_copy(update={"results": report.results[:3], "skipped": []})
    paths = [write_json(half, tmp_path / "a.json"), write_json(report, tmp_path / "b.json")]
    merged = load_report(paths)
    assert merged.results == report.results and merged.skipped == report.skipped


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"schema_version": 1}'])
def test_a_file_that_is_no_report_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.json is no report of schema version 2") as caught:
        load_report([path])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such result file"):
        load_report([tmp_path / "missing.json"])


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        Perplexity(value=float("nan"), standard_error=None, window_nll=[], tokens=0, nonfinite=0)


def test_the_page_needs_no_network() -> None:
    page = html(sample_report())
    bare = re.sub(r"data:image/png;base64,[\w+/=\s]+", "", page)
    assert not re.search(r"(https?:)?//[a-z]", bare), re.findall(r".{30}//[a-z].{30}", bare)
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert "@import" not in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    for wanted in ("currentColor", "<svg", "Artefacts and runtimes", "no GPU was found", "sola-paper", "0" * 64):
        assert wanted in page


def test_svg_identifiers_are_unique_in_the_page() -> None:
    page = html(sample_report(layers=3))
    defined = re.findall(r' id="([^"]+)"', page)
    assert len(defined) == len(set(defined))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(defined)


def test_text_from_a_model_is_escaped() -> None:
    report = sample_report()
    first = report.results[0]
    assert first.generation is not None
    evil = first.model_copy(
        update={"generation": first.generation.model_copy(update={"text": "<script>alert(1)</script>"})}
    )
    page = html(report.model_copy(update={"results": [evil, *report.results[1:]]}))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_summary_says_smaller_faster_and_at_what_cost() -> None:
    by_title = {card.title: card for card in cards(sample_report())}
    assert by_title["Size of the files"].figure == "0.80×"
    assert "0.800×" in by_title["Size of the files"].detail
    assert by_title["Speed, prefill / decode"].figure == "1.20× / 1.20×"
    assert by_title["Cost: perplexity"].figure == "22.04 → 45.5"
    assert "2.06×" in by_title["Cost: perplexity"].detail


def test_the_verdict_counts_failures() -> None:
    assert verdict(sample_report()) == "All 8 exports compute what PyTorch computes, within tolerance"
    failed = sample_report(fails=True)
    assert not failed.passed and verdict(failed) == "1 of 10 results failed"


def test_equal_continuations_are_shown_once() -> None:
    found = continuations(sample_report())
    assert [len(c.writers) for c in found] == [3, 2, 3, 2]


@pytest.mark.parametrize("width", [80, 200])
def test_table(width: int) -> None:
    stream = io.StringIO()
    print_table(sample_report(fails=True), Console(file=stream, width=width))
    text = stream.getvalue()
    for wanted in (
        "q8_0",
        "FAIL",
        "45.5 ± 1.3",
        "108 [107–112]",
        "mean KL 2e-2 > 1e-4",
        "1 of 10 results failed",
        "no GPU",
    ):
        assert wanted in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_numbers_read_well() -> None:
    assert [number(v) for v in (None, 0.0, 1e-7, 0.0123, 22.04, 518.3, 20486.0)] == [
        "–", "0", "1.0e-07", "0.0123", "22", "518", "20,486",
    ]  # fmt: skip


def test_a_busy_machine_is_told() -> None:
    report = sample_report()
    assert warnings(report) == []
    first = report.results[0]
    assert first.throughput is not None
    busy = first.model_copy(update={"throughput": first.throughput.model_copy(update={"others_busy": 0.6})})
    report = report.model_copy(update={"results": [busy]})
    assert "60%" in warnings(report)[0] and warnings(report)[0] in html(report)


def test_windows_are_drawn_of_exports_and_of_what_compression_costs() -> None:
    report = sample_report(layers=2)
    told = dict(window_plots(report))
    assert all(told.values())
    _, (heads, *rows) = told["Change of perplexity against the baseline model's by window, %"] or ("", [[]])
    assert heads == ["runtime", "model", "window", "change, %"]
    assert [row[:3] for row in rows] == [["torch", "compressed / dense", i] for i in range(1, 5)]
    nll = [
        r.perplexity.model_copy(update={"window_nll": [3.1, 3.1, 3.1, 3.1 + math.log(1.2)]})
        for r in report.results
        if r.perplexity
    ]
    worse = [
        r.model_copy(update={"perplexity": one}) if r.model == "compressed" else r
        for r, one in zip(report.results, nll, strict=True)
    ]
    _, (_, *rows) = dict(window_plots(report.model_copy(update={"results": worse})))[
        "Change of perplexity against the baseline model's by window, %"
    ] or ("", [[]])
    assert [row[3] for row in rows] == pytest.approx([0, 0, 0, 20])
    one_window = [r.model_copy(update={"perplexity": None, "parity": None}) for r in report.results]
    assert not any(drawn for _, drawn in window_plots(report.model_copy(update={"results": one_window})))


def test_every_picture_has_its_data_as_csv() -> None:
    report = sample_report(layers=4)
    drawn = plots(report)
    told = {plot.title: list(csv.reader(io.StringIO(plot.csv))) for plot in drawn}
    assert len(told) == 5
    heads, *rows = told["Prefill, tokens/s (median, range)"]
    assert heads == ["runtime", "model", "value", "lowest", "highest"]
    speeds = {(label(r), r.model): r.throughput.prefill for r in report.results if r.throughput}
    for runtime, model, *figures in rows:
        speed = speeds[runtime, model]
        assert [float(v) for v in figures] == pytest.approx([speed.median, speed.minimum, speed.maximum])
    peaks = {tuple(row[:2]): int(row[3]) for row in told["Peak memory, MB"][1:] if row[2] == "peak"}
    assert peaks == {(label(r), r.model): r.memory.peak for r in report.results if r.memory}
    explained = report.models[1].explained
    assert explained is not None
    ranks = next(p for p in explain_plots(explained) if p.title.startswith("Ranks"))
    assert ranks.rows[1] == [0, *((m.rank and str(m.rank)) or "whole" for m in explained.layers[0].matrices.values())]
    page = html(report)
    links = re.findall(r'<a download="([^"]+\.csv)" href="data:text/csv;charset=utf-8;base64,([^"]+)">', page)
    assert len(links) == page.count("<svg") and base64.b64decode(links[0][1]).decode() == drawn[0].csv
