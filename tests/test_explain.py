"""`sola-edge explain`: its figures are those of the layouts and of the plan, its page opens offline."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from layouts import LAYERS, MIXED, NEURONS, checkpoint_with
from rich.console import Console

from runtime_checks.checks import new_report
from runtime_checks.compare_schema import Cell, Comparison, write_comparison
from runtime_checks.explain import explain
from runtime_checks.explain_page import page, write_page
from runtime_checks.explain_schema import Explanation
from runtime_checks.explain_table import print_explanation, totals
from runtime_checks.schema import ProtocolRecord
from runtime_checks.study_schema import CalibrationRecord, StudyProtocol
from sola_edge.architecture import COMPONENTS
from sola_edge.checkpoint import PROVENANCE, open_checkpoint
from sola_edge.cli_compare import add_commands
from sola_edge.compress import Compressed, compress
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Compressed]]:
    """A tiny model compressed by sola with and without gradients, and by a method that predicts nothing."""
    root = tmp_path_factory.mktemp("explain")
    dense = tiny_checkpoint(root / "dense", layers=6, bias=True)
    text = root / "text.txt"
    text.write_text("".join(f"{i}: the quick brown fox; 12 wizards jump.\n" for i in range(60)))
    asked = {"sola": {}, "blind": {"gradient_windows": 0}, "svd-llm": {"method": "svd-llm"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLA_EDGE_CACHE", str(root / "cache"))
        yield {
            name: compress(
                dense,
                root / name,
                CompressionSettings(rate=0.2, align=4, window=64, max_windows=8, correction_windows=0, **values),
                str(text),
            )
            for name, values in asked.items()
        }


@pytest.fixture(scope="module")
def sola(made: dict[str, Compressed]) -> Explanation:
    return explain(made["sola"].path)


@pytest.mark.parametrize("method", ["sola", "blind", "svd-llm"])
def test_figures_are_those_of_the_plan(made: dict[str, Compressed], method: str) -> None:
    found, plan = explain(made[method].path), made[method].plan
    checkpoint = open_checkpoint(made[method].path)
    assert (found.parameters_dense, found.rate) == (plan.parameters_dense, pytest.approx(plan.rate))
    assert found.parameters_dense - found.parameters == plan.parameters_removed
    assert len(found.layers) == checkpoint.layers
    for row in found.layers:
        for component in COMPONENTS:
            matrix = row.matrices[component]
            module = checkpoint.architecture.module(row.layer, component)
            layout = plan.layouts.get(module)
            form = "whole" if layout is None or layout.rank == 0 else "pivoted" if layout.pivot else "plain"
            assert (matrix.form, matrix.rank or 0) == (form, layout.rank if layout else 0)
            stored = [n for n in checkpoint.names() if n.rpartition(".")[0] == module]
            assert matrix.parameters == sum(checkpoint.tensor(name).numel() for name in stored)
            assert matrix.retained == plan.retained_energy.get(module)
    assert found.predicted == (pytest.approx(sum(plan.predicted_loss.values())) if plan.predicted_loss else None)
    parts = [v for row in found.layers for v in (row.predicted_attention, row.predicted_ffn) if v is not None]
    assert sum(parts) == pytest.approx(found.predicted or 0.0)
    assert len(parts) == (2 * len(found.layers) if plan.predicted_loss else 0)


def test_only_with_gradients_are_losses_nats(made: dict[str, Compressed], sola: Explanation) -> None:
    assert sola.unit == "nats"
    assert explain(made["blind"].path).unit == "share of the output's energy"
    assert explain(made["svd-llm"].path).unit is None


def test_neurons_and_norms(made: dict[str, Compressed], sola: Explanation) -> None:
    down = [open_checkpoint(made["sola"].path).layout.get(f"model.layers.{i}.mlp.down_proj") for i in range(6)]
    assert [row.neurons for row in sola.layers] == [layout.n_in if layout else NEURONS for layout in down]
    assert any(row.neurons < row.neurons_dense for row in sola.layers)
    curve = json.loads((made["sola"].path / PROVENANCE).read_text())["norm_curve"]
    carried = sorted(row[curve["neurons"].index(0.15)] for row in curve["norm"])
    norm = sola.norm_share
    assert norm is not None
    assert (norm.minimum, norm.median, norm.maximum) == (carried[0], (carried[2] + carried[3]) / 2, carried[5])
    assert f"{norm.minimum:.0%} / {norm.median:.0%} / {norm.maximum:.0%} of the norm" in totals(sola)[-1]


def test_every_form_of_layout_is_told(tmp_path: Path) -> None:
    found = explain(checkpoint_with(tmp_path / "mixed", MIXED))
    assert found.norm_share is None and found.predicted is None
    assert len(found.layers) == LAYERS
    for (layer, component), layout in MIXED.items():
        matrix = found.layers[layer].matrices[component]
        assert (matrix.n_out, matrix.n_in, matrix.prime) == (layout.n_out, layout.n_in, layout.prime)
        assert matrix.parameters == layout.parameters
    assert found.layers[0].matrices["q"].text == "whole" and found.layers[0].share == 1.0
    assert found.layers[1].matrices["k"].text == "pivoted 16"
    assert (found.layers[1].neurons, found.layers[2].prime) == (104, 32)
    stream = io.StringIO()
    print_explanation(found, Console(file=stream, width=100))
    found_rows = [line.split() for line in stream.getvalue().splitlines()]
    assert ["2", "128", "32", "p24", "p24", "r16", "p40", "r24", "r16", "r24"] in found_rows


@pytest.mark.parametrize("width", [80, 120])
def test_table(sola: Explanation, width: int) -> None:
    stream = io.StringIO()
    print_explanation(sola, Console(file=stream, width=width))
    text = stream.getvalue()
    assert f"{sola.parameters:,} of {sola.parameters_dense:,}" in " ".join(text.split())
    rows = [line.split()[:3] for line in text.splitlines()]
    for row in sola.layers:
        assert [str(row.layer), str(row.neurons), str(row.prime or "–")] in rows
    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("method", ["sola", "blind", "svd-llm"])
def test_page_opens_offline(made: dict[str, Compressed], method: str) -> None:
    found = explain(made[method].path)
    text = page(found)
    assert not re.search(r"""(src|href)=["'](?!#|data:)|@import|url\((?!#)""", text)
    defined = re.findall(r' id="([^"]+)"', text)
    assert len(defined) == len(set(defined))
    assert ("Predicted rise of the loss" in text) == (method != "svd-llm")
    assert ("Energy that the factors keep, %" in text) == (method == "svd-llm")
    assert text.count("<svg") == 5
    for wanted in (
        "Parameters kept, %",
        "Ranks, and their share of full rank",
        "FFN neurons, % of the dense model's",
        "Norm carried by the largest neurons",
        "SoLA's premise",
        "prefers-color-scheme",
    ):
        assert wanted in text.replace("&#39;", "'")
    row = found.layers[2]
    assert f"<td>{row.neurons} of 160</td>" in text and f"<td>{row.matrices['q'].text}</td>" in text


def sample_comparison(cells: list[Cell]) -> Comparison:
    where = new_report(1)
    scoring = ProtocolRecord(
        text="t", text_sha256="0", ids_sha256="1", context=8, windows=2, stride=8, bos=False, tokens_scored=14
    )
    calibration = CalibrationRecord(text="c", sha256="2", windows=8, window=64, tokens=512)
    protocol = StudyProtocol(
        model="m", weights_sha256={}, scoring=scoring, calibration=calibration, options={}, versions={}
    )
    about = {"created": where.created, "command": where.command, "machine": where.machine}
    return Comparison(**about, protocol=protocol, dense=None, cells=cells)


def test_predictions_of_a_comparison(sola: Explanation, tmp_path: Path) -> None:
    figures = {"status": "measured", "predicted": 0.41, "rise": {"value": 0.52, "standard_error": 0.01}}
    own = Cell.model_validate({"label": "sola", "rate": 0.21, "settings": sola.settings, **figures})
    other = own.model_copy(update={"settings": {**sola.settings, "rate": 0.37}})
    assert "measured rise, nats" not in page(sola)
    circled, plain = page(sola, sample_comparison([own])), page(sola, sample_comparison([other]))
    assert "measured rise, nats" in circled and ">0.21<" in circled and ">0.21<" in plain
    assert circled.count("<use") == plain.count("<use") + 1  # the circle
    write_comparison(sample_comparison([own]), tmp_path / "compare.json")
    written = write_page(sola, tmp_path / "page.html", tmp_path / "compare.json")
    assert ">0.21<" in written.read_text()
    with pytest.raises(UserError, match="no such comparison"):
        write_page(sola, tmp_path / "other.html", tmp_path / "nowhere.json")
    assert not (tmp_path / "other.html").exists()


def test_text_from_a_checkpoint_is_escaped(sola: Explanation) -> None:
    text = page(sola.model_copy(update={"checkpoint": "<script>alert(1)</script>"}))
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_dense_and_damaged_checkpoints_are_one_line(made: dict[str, Compressed], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a dense model"):
        explain(made["sola"].path.parent / "dense")
    damaged = tmp_path / "damaged"
    shutil.copytree(made["sola"].path, damaged)
    content = json.loads((damaged / PROVENANCE).read_text())
    for change in ({"norm_curve": {"neurons": [0.15], "norm": [[0.3]]}}, {"plan": {"predicted_loss": {"x": "much"}}}):
        (damaged / PROVENANCE).write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=r"sola\.json is damaged"):
            explain(damaged)


def test_command(made: dict[str, Compressed], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    add_commands(app)
    path = tmp_path / "page.html"
    app(["explain", str(made["sola"].path), "--json", "-o", str(path)], standalone_mode=False)
    assert Explanation.model_validate_json(capsys.readouterr().out) == explain(made["sola"].path)
    assert "<html" in path.read_text()
    with pytest.raises(UserError, match="-o page"):
        app(["explain", str(made["sola"].path), "--compare", "x.json"], standalone_mode=False)
