"""Results of earlier runs are used again for the same files, runtime and question, and for no others."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime_checks.artefacts import open_artefact
from runtime_checks.checks import check_parity, measure_perplexity
from runtime_checks.kept import Kept
from runtime_checks.memory_curve import memory_curves
from runtime_checks.process import Child
from runtime_checks.schema import Tolerance
from sola_edge.cli import app
from sola_edge.testing import tiny_checkpoint

TEXT = "The cat sat on the mat and looked at the birds in the old tree. " * 8


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The artefacts that a child process was started for."""
    paths: list[Path] = []
    begin = Child.__init__

    def noted(self: Child, row: object, path: Path, *arguments: object, **named: object) -> None:
        paths.append(path)
        begin(self, row, path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Child, "__init__", noted)
    return paths


def test_a_place_is_of_files_runtime_and_question(dense: Path, tmp_path: Path) -> None:
    def place(path: Path = dense, runtime: str = "torch", threads: int = 1, **asked: object) -> Path:
        return Kept().place(open_artefact(path), runtime, threads, **asked)

    shutil.copytree(dense, tmp_path / "same")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert place() == place() == place(tmp_path / "same")
    places = {place(), place(other), place(runtime="x"), place(threads=2), place(context=1), place(context=2)}
    assert len(places) == 6


def test_perplexity_is_measured_once(dense: Path, started: list[Path]) -> None:
    def measure(text: str = TEXT, fresh: bool = False) -> tuple[float | None, str | None]:
        report = measure_perplexity(dense, text, context=32, windows=2, threads=1, kept=Kept(fresh=fresh))
        (result,) = report.results
        assert result.perplexity is not None and result.artefact == str(dense)
        return result.perplexity.value, result.measured

    first, again = measure(), measure()
    assert first[0] == again[0] and first[1] is None and again[1] is not None and len(started) == 1
    assert measure(TEXT[5:])[0] != first[0] and len(started) == 2  # another question
    assert measure(fresh=True) == first and len(started) == 3
    config = dense / "generation_config.json"
    config.write_text("{}")  # other files
    assert measure()[1] is None and len(started) == 4


def test_parity_is_measured_of_what_is_new(dense: Path, started: list[Path], tmp_path: Path) -> None:
    def check(*candidates: Path, asked: Tolerance | None = None) -> list[str | None]:
        report = check_parity(dense, list(candidates), TEXT, context=32, windows=2, threads=1, asked=asked, kept=Kept())
        assert all(result.passed for result in report.results)
        return [result.measured for result in report.results]

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(dense, folder)
        (folder / "note.txt").write_text(folder.name)
    same = tmp_path / "elsewhere" / dense.name
    shutil.copytree(dense, same)
    assert check(same) == [None, None]
    assert None not in check(same) and len(started) == 2  # the reference's own result is not taken for a candidate's
    started.clear()
    assert check(one) == [None, None] and len(started) == 2  # the reference's logits are needed again
    assert None not in check(one) and len(started) == 2
    reference, again, new = check(one, two)
    assert reference is None and again and new is None and started[2:] == [dense, two]
    assert check(one, asked=Tolerance(kl_mean=1.0)) == [None, None]


def test_a_runtime_that_failed_is_asked_again(
    dense: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime_checks.process import CheckError
    from runtime_checks.subject import Subject

    score = Subject.score

    def failing(self: Subject, protocol: object) -> None:
        raise CheckError("it was killed")

    monkeypatch.setattr(Subject, "score", failing)
    assert not measure_perplexity(dense, TEXT, context=32, threads=1, kept=Kept()).passed
    monkeypatch.setattr(Subject, "score", score)
    report = measure_perplexity(dense, TEXT, context=32, threads=1, kept=Kept())
    assert report.passed and report.results[0].measured is None and len(started) == 2


def test_memory_is_measured_of_lengths_that_are_new(dense: Path, started: list[Path]) -> None:
    def moments(contexts: list[int]) -> list[str | None]:
        (curve,) = memory_curves([dense], contexts, threads=1, rounds=1, tolerance=0.9, kept=Kept()).curves
        assert curve.version.startswith("torch")
        return [point.measured for point in curve.points]

    assert moments([32]) == [None]
    first, second = moments([32, 64])
    assert first is not None and second is None and len(started) == 2


def test_the_command_says_so(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["check", "perplexity", str(dense), "--text", str(text), "--context", "32", "--windows", "2"]
    said = [CliRunner().invoke(app, [*command, *more], catch_exceptions=False) for more in ([], [], ["--fresh"])]
    assert [done.exit_code for done in said] == [0, 0, 0]
    assert ["kept of earlier runs" in " ".join(done.output.split()) for done in said] == [False, True, False]


def test_what_is_damaged_is_measured_anew(dense: Path, tmp_path: Path) -> None:
    kept = Kept()
    place = kept.place(open_artefact(dense), "torch", 1)
    report = measure_perplexity(dense, TEXT, context=32, threads=1)
    kept.keep(report.results[0], place)
    assert kept.find(type(report.results[0]), place) == report.results[0]
    place.write_text(place.read_text()[:-20])
    assert kept.find(type(report.results[0]), place) is None
