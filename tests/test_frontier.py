"""`sola-edge check frontier` and `recommend`: fronts by hand, real files in both runtimes, interruption and refusals."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

import runtime_checks.frontier as module
from runtime_checks import measure_perplexity
from runtime_checks.estimates import exponential, paired_rise
from runtime_checks.frontier import frontier
from runtime_checks.frontier_cell import Gauge, measure
from runtime_checks.frontier_front import beaten, front_of_bytes, front_of_decode, pareto, verdict
from runtime_checks.frontier_grid import Asked, Scale
from runtime_checks.frontier_plot import CEILING, draw_bytes, write_plot
from runtime_checks.frontier_schema import Frontier, FrontierCell, Setting, read_frontier, write_frontier
from runtime_checks.frontier_table import comma_separated, markdown
from runtime_checks.machine import machine
from runtime_checks.perplexity import perplexity
from runtime_checks.protocol import make_protocol
from runtime_checks.recommend import Wanted, frontier_of, recommend
from runtime_checks.schema import Memory, Speed, Throughput
from runtime_checks.study import Common, study_protocol
from sola_edge.checkpoint import open_checkpoint
from sola_edge.cli import app
from sola_edge.cli_options import counts, size
from sola_edge.errors import UserError
from sola_edge.files import size_of
from sola_edge.testing import tiny_checkpoint

RATE, TOO_MUCH = 0.3, 0.9
CONTEXT, TEST_WINDOWS = 48, 4
LABEL = "sola"
COMMON = {"align": 32, "window": 64, "windows": 4, "gradient_windows": 4}
REFERENCE = Setting(label="dense", rate=0.0, type="f16", runtime="llama.cpp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows are whole blocks of K-quants, and two texts."""
    root = tmp_path_factory.mktemp("frontier")
    tiny_checkpoint(root / "dense", hidden=256, ffn=512, layers=3)
    (root / "calibration.txt").write_text("".join(f"{i}: the quick brown fox; 12 wizards jump.\n" for i in range(60)))
    (root / "test.txt").write_text("".join(f"{i * 7}, one ring to rule them all. " for i in range(40)))
    return root


def run(
    folder: Path,
    out: Path,
    types: tuple[str, ...],
    runtimes: tuple[str, ...],
    rates: tuple[float, ...] = (0.0, RATE, TOO_MUCH),
    *,
    generate: int = 4,
    **more: Any,
) -> Frontier:
    common = Common(calibration=str(folder / "calibration.txt"), **COMMON)
    scale = Scale(str(folder / "test.txt"), CONTEXT, TEST_WINDOWS, 16, generate, 1, 1)
    return frontier(folder / "dense", out, Asked((LABEL,), rates, types, runtimes), common, scale, **more)


# --- by hand ---------------------------------------------------------------------------------------------------------


def speed(prefill: float, decode: float) -> Throughput:
    figures = {"prefill": Speed.of("pp8", 8, [prefill]), "decode": Speed.of("tg8", 8, [decode])}
    return Throughput(tool="test", threads=1, rounds=1, others_busy=0.0, **figures)


def cell(
    label: str, type: str, mb: float, nll: float, decode: float, base: float = 10.0, **more: Any
) -> dict[str, Any]:
    """Of a file of so many MB, whose windows have the mean NLL `nll` ± a window's own level, the same for all cells."""
    ppl = perplexity([np.full(7, nll + level) for level in (0.0, 2.0, 1.0)])
    reference = perplexity([np.full(7, level) for level in (0.0, 2.0, 1.0)])
    rise = paired_rise(reference, ppl)
    setting = Setting(
        label=label, rate=0.0 if label == "dense" else 0.2, type=type, runtime=more.pop("runtime", "llama.cpp")
    )
    return {
        "setting": setting,
        "compression": None,
        "status": "measured",
        "artefact": {"bytes": int(mb * 1e6), "precision": type, "sha256": {}, "stored_otherwise": 0, "expanded": 0},
        "perplexity": ppl,
        "ratio": exponential(rise),
        "rise": rise,
        "memory": Memory(
            covers="", baseline=1, after_load=2, peak=int(mb * 2e6), anonymous=None, file_backed=None, parts={}
        ),
        "memory_context": 100,
        "growth": 1000,
        "throughput": speed(10 * decode, decode),
        "baseline": speed(10 * base, base),
        **more,
    }


def made(folder: Path, *cells: dict[str, Any]) -> Frontier:
    """A frontier of those cells, the reference first."""
    source = open_checkpoint(folder / "dense")
    tokenizer = source.tokenizer()
    scored = make_protocol(folder / "test.txt", tokenizer, CONTEXT, 3)
    common = Common(calibration=str(folder / "calibration.txt"), **COMMON)
    protocol = study_protocol("dense", source, common, scored, tokenizer, (), **{"stored as": "fp32"})
    found = [FrontierCell.model_validate(values) for values in (cell("dense", "f16", 100, 0.0, 10), *cells)]
    about = {"created": "now", "command": [], "machine": machine(1), "protocol": protocol}
    return Frontier(**about, reference=REFERENCE, cells=found)


def names(cells: list[FrontierCell]) -> list[str]:
    return [f"{c.setting.label} {c.setting.type}" for c in cells]


def test_the_pareto_set_by_hand() -> None:
    points = [(1, 9), (2, 5), (3, 5), (2, 5), (4, 1), (5, 1), (4, 2)]
    assert pareto(points, lambda point: point) == [(1, 9), (2, 5), (2, 5), (4, 1)]


def test_fronts_and_where_plain_quantization_wins(folder: Path) -> None:
    found = made(
        folder,
        cell("dense", "q8_0", 55, 0.01, 15),
        cell("dense", "q4_0", 30, 0.2, 14),
        cell("sola", "f16", 60, 0.3, 16),
        cell("sola", "q8_0", 28, 0.25, 13),
        cell("sola", "int8", 80, 0.3, 1, runtime="onnxruntime-genai"),
    )
    assert names(front_of_bytes(found)) == ["sola q8_0", "dense q4_0", "dense q8_0", "dense f16"]
    assert names(front_of_decode(found)) == ["sola f16", "dense q8_0", "dense f16"]
    lost = beaten(found, found.cells[3])
    assert lost is not None and lost.by.setting.type == "q8_0"
    assert lost.ratio.value == pytest.approx(2.718281828**0.29, rel=1e-6) and lost.sure
    assert beaten(found, found.cells[4]) is None and beaten(found, found.cells[1]) is None
    assert beaten(found, found.cells[5]) is None  # no dense file of that runtime
    assert "1 of 3 compressed settings" in verdict(found)[2] and "sola 0.2 q8_0" in verdict(found)[1]
    assert "nothing is said" in verdict(made(folder, cell("sola", "f16", 60, 0.3, 16)))[-1]


def test_a_slow_hour_makes_no_setting_slower(folder: Path) -> None:
    """Half the speed in a run whose baseline had half the speed is the same speed."""
    found = made(folder, cell("dense", "q8_0", 55, 0.01, 15), cell("dense", "q4_0", 30, 0.2, 7.5, base=5.0))
    assert [found.speed(c, "decode") for c in found.cells] == pytest.approx([10, 15, 15])
    assert found.cells[2].speed_ratio("prefill") == pytest.approx(1.5)


def test_a_picture_of_what_collapsed_and_of_one_cell(folder: Path, tmp_path: Path) -> None:
    axes = Figure().subplots()
    draw_bytes(axes, made(folder, cell("sola", "q4_0", 20, 12.0, 15)))
    assert axes.get_ylim()[1] < 2 * CEILING and "1.6e+05" in [text.get_text() for text in axes.texts]
    write_plot(made(folder), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_that_came_rounded_is_called_so(folder: Path) -> None:
    found = made(folder)
    assert "came rounded" not in markdown(found)
    rounded = found.protocol.model_copy(update={"options": {"stored as": "q4_1"}})
    assert "came rounded to q4_1" in markdown(found.model_copy(update={"protocol": rounded}))


# --- recommend -------------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> Frontier:
    return made(
        folder,
        cell("dense", "q8_0", 55, 0.01, 15),
        cell("sola", "q8_0", 40, 0.25, 18),
        cell("dense", "q4_0", 30, 0.2, 14),
        {"setting": Setting(label="sola", rate=0.2, type="x", runtime="y"), "compression": None, "status": "failed"},
    )


def test_the_least_perplexity_that_fits_is_recommended(folder: Path) -> None:
    found = recommend((Path("f"), candidates(folder)), Wanted(120_000_000, decode=12))
    assert found.chosen is not None and found.chosen.setting.type == "q8_0" and found.chosen.setting.dense
    assert [o.setting.type for o in found.runners_up] == ["q4_0", "q8_0"]
    behind = found.runners_up[0].behind
    assert behind is not None and behind.value == pytest.approx(2.718281828**0.19, rel=1e-6)
    (lost,) = found.ruled_out
    assert lost.reasons == ["peak memory 200 MB is more than 120 MB", "decodes 10 tokens/s, fewer than 12"]
    fast = recommend((Path("f"), candidates(folder)), Wanted(120_000_000, decode=16, prefill=180))
    assert fast.chosen is not None and str(fast.chosen.setting) == "sola 0.2 q8_0 in llama.cpp"


def test_a_longer_context_takes_more(folder: Path) -> None:
    measured = (Path("f"), candidates(folder))
    short, long = (recommend(measured, Wanted(120_000_000, context=tokens)) for tokens in (50, 12_100))
    assert short.chosen is not None and short.chosen.memory == 110_000_000
    assert long.chosen is not None and long.chosen.setting.type == "q4_0" and long.chosen.memory == 72_000_000


def test_what_fits_nowhere_names_the_nearest_and_fails(folder: Path, tmp_path: Path) -> None:
    write_frontier(candidates(folder), tmp_path / "frontier.json")
    found = recommend((Path("f"), candidates(folder)), Wanted(50_000_000))
    assert found.chosen is None and found.nearest is not None and found.nearest.option.setting.type == "q4_0"
    done = CliRunner().invoke(app, ["recommend", str(tmp_path), "--memory", "50MB"])
    assert (
        done.exit_code == 1 and "Nearest: dense q4_0 in llama.cpp: peak memory 60 MB is more than 50 MB" in done.stdout
    )
    done = CliRunner().invoke(app, ["recommend", str(tmp_path), "--memory", "1GB", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["chosen"]["setting"]["type"] == "f16"


def test_a_model_s_frontier_is_found_by_its_name_and_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(folder / "dense")
    with pytest.raises(UserError, match="no frontier in"):
        frontier_of(model)
    place = tmp_path / "build" / "frontier" / "dense"
    place.mkdir(parents=True)
    write_frontier(candidates(folder), place / "frontier.json")
    assert frontier_of(model)[1] == candidates(folder)
    tiny_checkpoint(tmp_path / "dense", seed=1)
    with pytest.raises(UserError, match="weights differ"):
        frontier_of(str(tmp_path / "dense"))


def test_sizes_and_counts() -> None:
    assert [size(text) for text in ("2GB", "1.5 GiB", "512MiB", "8kB", "8KiB", "7B")] == [
        2 * 10**9, 3 * 2**29, 2**29, 8000, 8192, 7,
    ]  # fmt: skip
    for text in ("2", "GB", "2G", "-1GB", "0MB", "2iB", "1,5GB"):
        with pytest.raises(UserError, match="give a number"):
            size(text)
    assert counts("512, 2048,512", "contexts") == [512, 2048]
    for text in ("512,x", "0", "-3", "1.5", ","):
        with pytest.raises(UserError, match="contexts"):
            counts(text, "contexts")


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    with pytest.raises(UserError, match="no such frontier"):
        read_frontier(path)
    write_frontier(candidates(folder), path)
    assert read_frontier(path) == candidates(folder)
    whole = json.loads(path.read_text())
    lost = {**whole, "cells": whole["cells"][1:]}
    for content, says in (({**whole, "schema_version": 2}, "schema_version"), (lost, "no cell of its reference")):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=says):
            read_frontier(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "fp32,q9_9"], "type 'q9_9' is for none"),
        (["--types", "f16"], "type 'f16' is for none"),
        (["--runtimes", "torch"], "no runtime 'torch'"),
        (["--rates", "0,1.5"], "rate 1.5 is out of range"),
        (["--methods", "sola:wide"], "no option 'wide'"),
        (["--test-windows", "5000"], "too short"),
        (["--rounds", "0"], "rounds 0"),
        (["--calibration", "nowhere.txt"], "cannot read"),
        (["--imatrix", "nowhere.txt"], "cannot read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(module, "measure", None)
    texts = ["--text", str(folder / "test.txt"), "--calibration", str(folder / "calibration.txt"), "--context", "48"]
    asked = [
        "--window",
        "64",
        "--types",
        "fp32",
        "--runtimes",
        "onnxruntime",
        "--test-windows",
        "4",
        *texts,
        *arguments,
    ]
    done = CliRunner().invoke(app, ["check", "frontier", str(folder / "dense"), str(tmp_path / "out"), *asked])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_file_without_figures_says_why(folder: Path) -> None:
    """Logits that are not finite are counted, and a child that fails is one line."""
    export = pytest.importorskip("exporters.onnx").export
    path = folder / "broken-onnx"
    export(folder / "dense", path)
    gauge = Gauge(
        make_protocol(folder / "test.txt", open_checkpoint(folder / "dense").tokenizer(), CONTEXT, 2), 16, 4, 1, 1
    )
    weights = path / "model.onnx.data"
    values = np.fromfile(weights, dtype=np.float32)
    values[:] = np.nan
    values.tofile(weights)
    figures = measure(path, "onnxruntime", "dense", None, gauge)
    assert figures["reason"] == f"{2 * (CONTEXT - 1)} positions have non-finite logits"
    assert figures["perplexity"].value is None and figures["perplexity"].nonfinite == 2 * (CONTEXT - 1)
    weights.unlink()
    figures = measure(path, "onnxruntime", "dense", None, gauge)
    assert list(figures) == ["reason"] and "onnxruntime on" in figures["reason"] and "load failed" in figures["reason"]


# --- real files ------------------------------------------------------------------------------------------------------

TYPES = ("f16", "q4_k_m", "iq1_s", "fp32", "int8-a8")
RUNTIMES = ("llama.cpp", "onnxruntime-genai")


@pytest.fixture(scope="module")
def resumed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, llama_cpp_build: object
) -> tuple[Frontier, Frontier, Path]:
    """(what was there after a Ctrl-C in the first compressed cell, the whole, its folder). Files are kept."""
    out, real = folder / "out", module.measure

    def until_compressed(path: Path, *arguments: Any) -> Any:
        if "sola" in path.name:
            raise KeyboardInterrupt
        return real(path, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "compress"):
            patch.setattr(
                f"sola_edge.{name}.cache_folder", lambda kind: tmp_path_factory.getbasetemp() / "cache" / kind
            )
        with pytest.MonkeyPatch.context() as interrupted:
            interrupted.setattr(module, "measure", until_compressed)
            with pytest.raises(KeyboardInterrupt):
                run(folder, out, TYPES, RUNTIMES, keep=True)
        begun = read_frontier(out / "frontier.json")
        prepare = module.prepare

        def not_again(source: Any, settings: Any, calibration: str) -> Any:
            assert settings.rate == TOO_MUCH, "the checkpoint is there already"
            return prepare(source, settings, calibration)

        with pytest.MonkeyPatch.context() as once:
            once.setattr(module, "prepare", not_again)
            return begun, run(folder, out, TYPES, RUNTIMES, keep=True), out


@pytest.mark.slow
def test_figures_are_those_of_the_files(resumed: tuple[Frontier, Frontier, Path], folder: Path) -> None:
    _, found, out = resumed
    artefacts, text = out / "artefacts", (folder / "test.txt").read_text()
    parameters = open_checkpoint(folder / "dense").parameters()
    for name, label, rate, type, runtime in (
        ("dense-q4_k_m.gguf", "dense", 0.0, "q4_k_m", "llama.cpp"),
        ("sola-0.3-f16.gguf", "sola", RATE, "f16", "llama.cpp"),
        ("sola-0.3-int8-a8-onnx", "sola", RATE, "int8-a8", "onnxruntime-genai"),
    ):
        cell = found.cell(Setting(label=label, rate=rate, type=type, runtime=runtime))
        assert cell is not None and cell.status == "measured" and cell.artefact is not None and cell.ratio is not None
        path = artefacts / name
        again = measure_perplexity(
            path, text, context=CONTEXT, windows=TEST_WINDOWS, threads=1, tokenizer_from=folder / "dense"
        )
        own, whole = cell.perplexity, found.cell(found.reference)
        assert own is not None and own.value is not None and whole is not None and whole.perplexity is not None
        assert own.value == pytest.approx(again.results[0].perplexity.value, rel=1e-3)  # type: ignore[union-attr]
        assert cell.ratio.value == pytest.approx(own.value / whole.perplexity.value)  # type: ignore[operator]
        assert cell.artefact.bytes == size_of(path) and cell.artefact.stored_otherwise == 0
        assert cell.memory is not None and cell.memory.peak > cell.memory.baseline
        assert cell.speed_ratio("decode") is not None and cell.parameters is not None
        assert cell.achieved == pytest.approx(1 - cell.parameters / parameters)
        assert cell.growth is not None and cell.growth >= 2 * 3 * 2 * 64 * 2  # the cache at least


@pytest.mark.slow
def test_every_cell_is_there_and_what_cannot_be_says_why(resumed: tuple[Frontier, Frontier, Path]) -> None:
    _, found, out = resumed
    assert found.reference == REFERENCE and len(found.cells) == 3 * 5
    by_status = {s: {str(c.setting) for c in found.cells if c.status == s} for s in ("failed", "unreachable")}
    assert by_status["failed"] == {"dense iq1_s in llama.cpp", "sola 0.3 iq1_s in llama.cpp"}  # no importance matrix
    assert len(by_status["unreachable"]) == 5 and not found.passed
    page = (out / "frontier.md").read_text()
    assert "sola 0.9: rate 0.9 cannot be reached" in page and "iq1_s in llama.cpp: llama-quantize cannot" in page
    assert page == markdown(found) and "Plain quantization wins" in page
    lines = list(csv.DictReader(io.StringIO((out / "frontier.csv").read_text())))
    assert comma_separated(found) == (out / "frontier.csv").read_text() and len(lines) == len(found.cells)
    assert {line["front_bytes"] for line in lines} == {"0", "1"}
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_frontier_goes_on_and_only_under_its_protocol(
    resumed: tuple[Frontier, Frontier, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, found, out = resumed
    assert [str(c.setting) for c in begun.cells] == [str(c.setting) for c in found.cells if c.setting.dense]
    assert [c for c in begun.cells if c.status == "measured"] == [c for c in found.measured if c.setting.dense]
    copy = Path(shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("artefacts")))
    monkeypatch.setattr(module, "measure", None)
    again = run(folder, copy, ("f16", "int8-a8"), RUNTIMES, (RATE, 0.0))
    assert again.measured == found.measured and not (copy / "artefacts").exists()
    before = (copy / "frontier.json").read_bytes()
    with pytest.raises(UserError, match=r"another protocol \(options: generate 4 there, 5 now\).*--fresh"):
        run(folder, copy, ("f16",), RUNTIMES[:1], generate=5)
    assert (copy / "frontier.json").read_bytes() == before
    with pytest.raises(TypeError):  # measured anew, by what is None here
        run(folder, copy, ("f16",), RUNTIMES[:1], generate=5, fresh=True)
    assert not read_frontier(copy / "frontier.json").cells


@pytest.mark.slow
def test_a_reference_without_figures_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp_build: object
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: {"reason": "it was killed"})
    with pytest.raises(UserError, match=r"dense f16 in llama\.cpp failed: it was killed"):
        run(folder, tmp_path / "out", ("f16",), RUNTIMES[:1], (0.0,))
