"""`sola-edge compare` on a tiny model: real compressions, real perplexities in child processes, interruption and refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import runtime_checks.compare as module
from runtime_checks.compare import Scoring, compare
from runtime_checks.compare_cell import _same_plan
from runtime_checks.compare_schema import Comparison, read_comparison
from runtime_checks.compare_table import markdown
from runtime_checks.estimates import paired_rise
from runtime_checks.perplexity import perplexity
from runtime_checks.study import Common
from runtime_checks.study_schema import Estimate
from runtime_checks.tasks import measure_tasks
from sola_edge.checkpoint import PROVENANCE, open_checkpoint
from sola_edge.cli_compare import add_commands
from sola_edge.errors import UserError
from sola_edge.planning import Plan
from sola_edge.testing import tiny_checkpoint

RATE, TOO_MUCH = 0.15, 0.9
LABELS = ["sola", "sola:no-gradients", "flap"]
COMMON = {"align": 4, "window": 64, "windows": 8, "gradient_windows": 4, "correction_windows": 2}
CONTEXT, TEST_WINDOWS = 48, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two texts."""
    root = tmp_path_factory.mktemp("compare")
    tiny_checkpoint(root / "dense", layers=6)
    (root / "calibration.txt").write_text("".join(f"{i}: the quick brown fox; 12 wizards jump.\n" for i in range(60)))
    (root / "test.txt").write_text("".join(f"{i * 7}, one ring to rule them all. " for i in range(40)))
    return root


def run(
    folder: Path, out: Path, labels: list[str], rates: list[float], keep: bool = False, **values: Any
) -> Comparison:
    common = Common(calibration=str(folder / "calibration.txt"), **{**COMMON, **values})
    scoring = Scoring(text=str(folder / "test.txt"), context=CONTEXT, windows=TEST_WINDOWS, threads=1)
    return compare(folder / "dense", out, labels, rates, common, scoring, keep=keep)


@pytest.fixture(scope="module")
def resumed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Comparison, Path]:
    """(what was there after a Ctrl-C before the second cell, the whole, its folder). Checkpoints are kept."""
    out = folder / "out"
    real, made = module.make_cell, []

    def until_the_second(*arguments: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(real(*arguments))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLA_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with pytest.MonkeyPatch.context() as interrupted:
            interrupted.setattr(module, "make_cell", until_the_second)
            with pytest.raises(KeyboardInterrupt):
                run(folder, out, LABELS, [RATE, TOO_MUCH], keep=True)
        begun = read_comparison(out / "compare.json")
        return begun, run(folder, out, LABELS, [RATE, TOO_MUCH], keep=True), out


def nll_by_window(model: Path, text: str) -> np.ndarray:
    """Mean NLL of each window, straight through transformers."""
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: CONTEXT * TEST_WINDOWS].view(TEST_WINDOWS, CONTEXT)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.array([loaded(w[None], labels=w[None]).loss.item() for w in windows])


def test_figures_are_those_of_the_checkpoints(resumed: tuple[Comparison, Comparison, Path], folder: Path) -> None:
    _, found, out = resumed
    text = (folder / "test.txt").read_text()
    dense = nll_by_window(folder / "dense", text)
    assert found.dense is not None
    assert found.dense.value == pytest.approx(math.exp(dense.mean()), rel=1e-4)
    for label in LABELS:
        cell = found.cell(label, RATE)
        assert cell is not None and cell.ratio is not None and cell.rise is not None and cell.seconds is not None
        checkpoint = out / "checkpoints" / f"{label.replace(':', '-')}-{RATE}"
        difference = nll_by_window(checkpoint, text) - dense
        assert cell.rise.value == pytest.approx(difference.mean(), rel=1e-3)
        assert cell.rise.standard_error == pytest.approx(difference.std(ddof=1) / TEST_WINDOWS**0.5, rel=1e-3)
        assert cell.ratio.value == pytest.approx(math.exp(difference.mean()), rel=1e-3)
        assert cell.ratio.standard_error == pytest.approx(cell.ratio.value * cell.rise.standard_error)
        stored = open_checkpoint(checkpoint).parameters() / open_checkpoint(folder / "dense").parameters()
        assert cell.achieved == pytest.approx(1 - stored)
        assert cell.seconds.measure > 0
        assert json.loads((checkpoint / PROVENANCE).read_text())["settings"] == cell.settings


def test_only_losses_in_nats_are_predictions(resumed: tuple[Comparison, Comparison, Path]) -> None:
    _, found, out = resumed
    plan = json.loads((out / "checkpoints" / f"sola-{RATE}" / PROVENANCE).read_text())["plan"]
    assert [c.label for c, _, _ in found.predictions] == ["sola"]
    assert found.predictions[0][1] == pytest.approx(sum(plan["predicted_loss"].values()))


def test_a_rate_out_of_reach_is_a_cell_and_the_rest_goes_on(resumed: tuple[Comparison, Comparison, Path]) -> None:
    _, found, _ = resumed
    assert [(c.label, c.rate) for c in found.cells] == [(label, rate) for label in LABELS for rate in (RATE, TOO_MUCH)]
    for label in LABELS:
        cell = found.cell(label, TOO_MUCH)
        assert cell is not None and cell.ratio is None and cell.status == "unreachable"
        assert cell.reason is not None and "rate 0.9 cannot be reached" in cell.reason
    assert found.passed


def test_an_interrupted_comparison_goes_on(
    resumed: tuple[Comparison, Comparison, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, found, out = resumed
    assert begun.dense is not None and [c.label for c in begun.cells] == ["sola"]
    assert (found.dense, found.cells[0]) == (begun.dense, begun.cells[0])  # seconds too: nothing was made again
    monkeypatch.setattr(module.Ruler, "measure", None)
    again = run(folder, out, LABELS, [TOO_MUCH, RATE])
    assert again.dense == found.dense and again.cells == found.cells
    fewer = run(folder, out, ["flap"], [RATE])
    assert fewer.cells[0].label == "flap" and len(fewer.cells) == len(found.cells)


def test_the_page_and_the_picture(resumed: tuple[Comparison, Comparison, Path]) -> None:
    _, found, out = resumed
    page = markdown(found)
    cell = found.cell("flap", RATE)
    assert cell is not None and cell.ratio is not None and found.dense is not None and found.dense.value is not None
    lines = page.splitlines()
    assert "| Method | rate 0.15 | rate 0.9 |" in lines
    assert any(line.startswith(f"| flap | {cell.ratio.value:.3f} ± ") and "unreachable" in line for line in lines)
    wanted = (
        "Dense model: perplexity",
        "5 windows × 48 tokens",
        found.protocol.scoring.text_sha256,
        "8 windows × 64 tokens",
    )
    assert all(part in page for part in wanted)
    assert (out / "compare.md").read_text().startswith("# dense, compressed by 3 methods")
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_another_protocol_is_refused_and_nothing_is_lost(
    resumed: tuple[Comparison, Comparison, Path], folder: Path
) -> None:
    _, _, out = resumed
    before = (out / "compare.json").read_bytes()
    with pytest.raises(UserError, match=r"another protocol \(options: align 4 there, 8 now\)"):
        run(folder, out, LABELS, [RATE], align=8)
    assert (out / "compare.json").read_bytes() == before


def test_tasks_are_scored_in_the_same_run_and_added_to_a_comparison(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i} and one more", "choices": ["two", "the end"], "answer": i % 2} for i in range(12)]
    task = tmp_path / "sums.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    common = Common(calibration=str(folder / "calibration.txt"), **COMMON)
    scoring = Scoring(str(folder / "test.txt"), CONTEXT, TEST_WINDOWS, 1)
    arguments = (folder / "dense", tmp_path / "out", ["flap"], [RATE], common)
    without = compare(*arguments, scoring)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Ruler, "measure", None)  # a known perplexity is not measured again
        found = compare(*arguments, replace(scoring, tasks=(task,), questions=10), keep=True)
    assert not without.dense_tasks and found.cells[0] == without.cells[0].model_copy(
        update={"tasks": found.cells[0].tasks}
    )
    own = measure_tasks([folder / "dense", tmp_path / "out" / "checkpoints" / "flap-0.15"], [task], limit=10)
    assert found.dense_tasks[0].chosen == own.results[0].chosen
    assert found.cells[0].tasks[0].chosen == own.results[1].chosen
    assert own.results[1].difference is not None and found.cells[0].tasks[0].difference is not None
    assert found.cells[0].tasks[0].difference.value == own.results[1].difference.value
    assert "10 of 12 questions" in markdown(found)
    with pytest.raises(UserError, match="other tasks or questions"):
        compare(*arguments, replace(scoring, tasks=(task,), questions=9))
    with pytest.raises(UserError, match="nothing without a task"):
        compare(*arguments, replace(scoring, questions=9))
    moved = task.rename(tmp_path / "elsewhere.jsonl").rename(tmp_path / "sums.jsonl")
    task.with_name("long.jsonl").write_text(json.dumps({**rows[0], "question": "again and " * 600}))
    assert compare(*arguments, replace(scoring, tasks=(moved,), questions=10)).cells == found.cells
    with pytest.raises(UserError, match="more than the context"):
        compare(*arguments, replace(scoring, tasks=(task.with_name("long.jsonl"),)))


def test_collapsed_methods_do_not_flatten_the_picture(resumed: tuple[Comparison, Comparison, Path]) -> None:
    from matplotlib.figure import Figure

    from runtime_checks.compare_plot import CEILING, draw_ratios

    _, found, _ = resumed
    far = Estimate(value=2.1e6, standard_error=6e5)
    collapsed = [c.model_copy(update={"ratio": far}) if c.label == "flap" and c.ratio else c for c in found.cells]
    axes = Figure().subplots()
    draw_ratios(axes, found.model_copy(update={"cells": collapsed}))
    assert axes.get_ylim()[1] < 2 * CEILING
    assert [text.get_text() for text in axes.texts] == ["2.1e+06"]


def test_tasks_go_to_the_model_that_was_measured_or_to_a_new_cell(
    resumed: tuple[Comparison, Comparison, Path],
) -> None:
    cell = resumed[1].cell("sola", RATE)
    assert cell is not None and cell.predicted is not None and cell.achieved is not None
    plan = Plan({}, RATE, cell.achieved, 1, 0, predicted_loss={"all": cell.predicted * (1 + 1e-9)})
    assert _same_plan(plan, cell)
    assert not _same_plan(replace(plan, predicted_loss={"all": 2 * cell.predicted}), cell)
    assert not _same_plan(replace(plan, rate=cell.achieved + 1e-6), cell)


def test_checkpoints_go_unless_kept_and_a_gguf_is_measured_too(folder: Path, tmp_path: Path) -> None:
    from exporters.gguf import export

    export(folder / "dense", tmp_path / "dense.gguf", type="f32")
    common = Common(calibration=str(folder / "calibration.txt"), **COMMON)
    scoring = Scoring(text=str(folder / "test.txt"), context=CONTEXT, windows=TEST_WINDOWS, threads=1)
    found = compare(tmp_path / "dense.gguf", tmp_path / "out", ["flap"], [RATE], common, scoring)
    text = (folder / "test.txt").read_text()
    assert found.dense is not None
    assert found.dense.value == pytest.approx(math.exp(nll_by_window(folder / "dense", text).mean()), rel=1e-4)
    assert found.cells[0].status == "measured"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md", "compare.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sola,solar"], "no method 'solar'"),
        (["--methods", "sola:wide"], "no option 'wide'"),
        (["--methods", "sola:plain:pivoted"], "says factors twice"),
        (["--methods", "flap:no-gradients"], "takes no options"),
        (["--methods", ","], "no methods were named"),
        (["--rates", "0.2,1.5"], "rate 1.5 is out of range"),
        (["--rates", "much"], "no number"),
        (["--align", "some"], "align 'some'"),
        (["--device", "cpux"], "device 'cpux'"),
        (["--text", "nowhere.txt"], "cannot read"),
        (["--calibration", "nowhere.txt"], "cannot read"),
        (["--test-windows", "5000"], "too short"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(module, "make_cell", None)
    texts = ["--text", str(folder / "test.txt"), "--calibration", str(folder / "calibration.txt"), "--context", "48"]
    texts += ["--window", "64"]
    app = typer.Typer()
    add_commands(app)
    with pytest.raises(UserError, match=message):
        app(
            ["compare", str(folder / "dense"), str(tmp_path / "out"), "--test-windows", "5", *texts, *arguments],
            standalone_mode=False,
        )
    assert not (tmp_path / "out").exists()


def test_a_stranger_s_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="no earlier output"):
        run(folder, tmp_path, ["flap"], [RATE])
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(UserError, match=r"compare\.json is no comparison"):
        run(folder, tmp_path, ["flap"], [RATE])


def test_what_all_windows_have_in_common_is_no_error() -> None:
    """Windows differ by far more than the models do: pairing takes that out."""
    before = [np.full(7, level) for level in (1.0, 5.0, 3.0)]
    shifted = paired_rise(perplexity(before), perplexity([window + 0.25 for window in before]))
    assert shifted.value == pytest.approx(0.25) and shifted.standard_error == pytest.approx(0.0, abs=1e-12)
    single = paired_rise(perplexity(before[:1]), perplexity([before[0] + 0.25]))
    assert single.value == pytest.approx(0.25) and single.standard_error is None
