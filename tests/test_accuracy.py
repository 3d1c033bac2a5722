"""Accuracy by lm-evaluation-harness: its own back end and our adapters say the same of one model, and so does check tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from runtime_checks.accuracy import measure_accuracy, paired, share
from runtime_checks.accuracy_schema import AccuracyReport, AccuracyResult
from runtime_checks.accuracy_table import print_accuracy
from runtime_checks.tasks import measure_tasks
from sola_edge.cli import app
from sola_edge.errors import UserError

SENTENCE = "the cat sat on a mat and saw two red birds in old trees by our river while rain fell over blue hills"
QUESTIONS = 40


@pytest.fixture(scope="module")
def tasks(dense: Path) -> list[Path]:
    """Questions with answers of several words and lengths, and sentences with a blank."""
    draw = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(SENTENCE.split(), count))

    asked = [
        {"question": f"{words(6)}?", "choices": [words(1 + i) for i in range(4)], "answer": int(draw.integers(4))}
        for _ in range(QUESTIONS)
    ]
    filled = [
        {"question": f"{words(3)} _ {words(4)}.", "choices": [words(1), words(2)], "answer": int(draw.integers(2))}
        for _ in range(QUESTIONS)
    ]
    files = []
    for name, rows in (("asked", asked), ("filled", filled)):
        files.append(dense.parent / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def same(report: AccuracyReport, dense: Path, tasks: list[Path]) -> None:
    """Every runtime answers every question as the harness's own back end does, and so does check tasks."""
    ours = measure_tasks([dense], tasks, threads=1)
    for task in tasks:
        found = [result for result in report.results if result.task == task.stem]
        for result in found:
            assert result.n == QUESTIONS and result.values == found[0].values, result.runtime
            expected = ours.result(dense.name, task.stem)
            assert result.metric == expected.metric
            assert result.metrics["acc"].value == pytest.approx(expected.acc.value)
            assert result.metrics[result.metric].value == pytest.approx(expected.accuracy.value)
        assert 0 < sum(found[0].values) < QUESTIONS


def test_runtimes_answer_as_the_harness_s_own_back_end(dense: Path, onnx_folder: Path, tasks: list[Path]) -> None:
    report = measure_accuracy([dense, onnx_folder], list(map(str, tasks)), threads=1)
    assert report.passed, report.reasons
    assert [r.runtime for r in report.results[::2]] == ["torch", "onnxruntime", "onnxruntime-genai"]
    assert report.packages["lm-eval"]
    same(report, dense, tasks)
    first, *others = report.results[::2]
    assert first.difference is None and all(r.difference and r.difference.value == 0 for r in others)


@pytest.mark.slow
def test_llama_cpp_answers_as_the_harness_s_own_back_end(
    dense: Path, tasks: list[Path], llama_cpp_build: object, tmp_path: Path
) -> None:
    file, output = tmp_path / "dense.gguf", tmp_path / "accuracy.json"
    pytest.importorskip("exporters.gguf").export(dense, file, "f32")
    command = ["check", "accuracy", str(dense), str(file), "--tasks", ",".join(map(str, tasks)), "--threads", "1"]
    done = CliRunner().invoke(app, [*command, "-o", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    same(AccuracyReport.model_validate_json(output.read_text()), dense, tasks)
    assert "llama.cpp" in done.output and "acc_norm" in done.output


def test_errors_by_hand() -> None:
    assert share([1, 0, 1, 0]).value == 0.5 and share([1]).standard_error == 0
    assert share([1, 0, 1, 0]).standard_error == pytest.approx((1 / 3) ** 0.5 / 2)
    before, after = (
        AccuracyResult(
            artefact=name,
            kind="gguf",
            precision="f16",
            runtime="llama.cpp",
            version="",
            task="t",
            n=4,
            metric="acc",
            metrics={"acc": share(values)},
            values=values,
            difference=None,
            seconds=1.0,
        )
        for name, values in (("a", [1.0, 0.0, 1.0, 0.0]), ("b", [1.0, 1.0, 1.0, 1.0]))
    )
    found = paired(before, after)
    assert (found.baseline, found.value) == ("a", 0.5)
    assert found.standard_error == pytest.approx((1 / 3) ** 0.5 / 2)


def test_a_limit_asks_the_first_questions(dense: Path, tasks: list[Path]) -> None:
    report = measure_accuracy([dense], [str(tasks[0])], limit=5, threads=1)
    whole = measure_accuracy([dense], [str(tasks[0])], threads=1)
    assert report.results[0].values == whole.results[0].values[:5] and report.tasks[0].questions == 5


def test_bad_input_is_refused(dense: Path, tasks: list[Path], tmp_path: Path) -> None:
    for asked, message in (
        ([], "no task was named"),
        (["no_such_task"], "no task 'no_such_task'"),
        ([str(tmp_path / "x.jsonl")], "no such task file"),
        ([str(tasks[0]), str(tasks[0])], "called"),
    ):
        with pytest.raises(UserError, match=message):
            measure_accuracy([dense], asked)
    with pytest.raises(UserError, match="limit 0"):
        measure_accuracy([dense], [str(tasks[0])], limit=0)
    with pytest.raises(UserError, match="no runtime that was named"):
        measure_accuracy([dense], [str(tasks[0])], runtimes=["llama.cpp"])


def test_a_runtime_that_fails_is_a_reason(onnx_folder: Path, dense: Path, tasks: list[Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in onnx_folder.iterdir():
        (damaged / file.name).write_bytes(b"" if file.name.endswith(".data") else file.read_bytes())
    report = measure_accuracy([dense, damaged], [str(tasks[0])], limit=3, runtimes=["torch", "onnxruntime"], threads=1)
    assert not report.passed and len(report.results) == 1
    print_accuracy(report)
