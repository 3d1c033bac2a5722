"""Every subcommand on a tiny model, in this process: exit codes, JSON, one clear line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from sola_edge.cli import main
from sola_edge.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny dense and compressed checkpoints, the latter's ONNX export, and a text."""
    root = tmp_path_factory.mktemp("cli")
    tiny_checkpoint(root / "dense")
    tiny_checkpoint(root / "small", compressed=True)
    (root / "text.txt").write_text("One ring to rule them all. " * 40)
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path):
    """Run a command line in the folder: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["sola-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


WINDOWS = ("--text", "text.txt", "--context", 64, "--windows", 2)


def test_export_check_and_report(run, folder: Path) -> None:
    code, out, err = run("export", "onnx", "small", "small-onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] > 0
    code, out, err = run("check", "parity", "small", "small-onnx", *WINDOWS, "--json", "-o", "parity.json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [r["runtime"] for r in results] == ["torch", "onnxruntime", "onnxruntime-genai"]
    assert all(r["parity"]["kl_mean"] < 1e-6 for r in results[1:])
    code, out, err = run("check", "perplexity", "small-onnx", *WINDOWS)
    assert code == 0, err
    assert "onnxruntime" in out
    code, out, err = run("report", "parity.json", "-o", "page.html")
    assert code == 0, err
    assert out.strip().endswith("report: page.html")
    assert "<html" in (folder / "page.html").read_text()


def test_tasks(run, folder: Path) -> None:
    row = {"question": "Which ring?", "choices": ["the one", "another"], "answer": 0}
    (folder / "rings.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = run("check", "tasks", "dense", "small", "--task", "rings.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)


def test_other_weights_are_a_failed_check(run) -> None:
    code, out, _ = run("check", "parity", "dense", "small", *WINDOWS)
    assert code == 1
    assert "FAIL" in out


def test_bench(run) -> None:
    sizes = ("--prompt", 16, "--generate", 4, "--rounds", 2)
    code, out, err = run("check", "bench", "small", "--baseline", "dense", *sizes, "--json")
    assert code == 0, err
    first = json.loads(out)["results"][0]["throughput"]
    assert first["prefill"]["test"] == "pp16"
    assert len(first["decode"]["runs"]) == 2


def test_a_runtime_that_fails_is_a_failed_check_or_one_clear_line(run, folder: Path) -> None:
    run("export", "onnx", "small", "broken")
    (folder / "broken" / "model.onnx.data").unlink()
    code, out, err = run("check", "perplexity", "broken", *WINDOWS)
    assert code == 1, err
    assert "broken" in out
    code, _, err = run("check", "parity", "broken", "small", *WINDOWS)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("sola-edge: the reference cannot be run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "onnx", "small", "dense"], "no earlier output"),
        (["export", "onnx", "small", "x", "--precision", "fp7"], "'fp7' is not available"),
        (["export", "onnx", "small", "x", "--graph", "stitched"], "'stitched' is not available"),
        (["export", "gguf", "small", "x.gguf", "--type", "q9"], "q9"),
        (["export", "gguf", "nowhere.gguf", "x.gguf"], "does not exist"),
        (["check", "parity", "small", "nowhere", *WINDOWS], "no such file"),
        (["check", "parity", "small", "small", "--text", "text.txt", "--context", 9999], "too short"),
        (["check", "perplexity", "small", "--text", "nowhere.txt"], "cannot read"),
        (["check", "bench", "small", "--rounds", 0], "out of range"),
        (["report", "nowhere.json"], "no such result file"),
        (["check", "tasks", "small", "--task", "nowhere.jsonl"], "no such task file"),
        (["compare", "dense", "compared", "--rates", "2", "--text", "text.txt"], "rate 2 is out of range"),
        (["explain", "dense"], "dense"),
        (["compress", "dense", "dense", "--rate", 0.1], "no earlier output"),
        (["compress", "dense", "small-2", "--rate", 0.1, "--align", 200], "align 200 is out of range"),
        (["compress", "dense", "small-2", "--rate", 0.1, "--device", "cpux"], "device 'cpux'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, folder: Path, arguments: list, message: str) -> None:
    before = sorted(folder.iterdir())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("sola-edge: ")
    assert message in last
    assert sorted(folder.iterdir()) == before


def test_a_stranger_s_model_is_never_replaced(run, folder: Path) -> None:
    shutil.copytree(folder / "dense", folder / "strange", dirs_exist_ok=True)
    (folder / "strange" / "notes.md").write_text("mine")
    code, _, err = run("compress", "dense", "strange", "--rate", 0.1, "--calibration", "text.txt", "--window", 64)
    assert (code, "no earlier output" in err) == (2, True)
    assert (folder / "strange" / "notes.md").read_text() == "mine"
    code, _, err = run("compress", "dense", ".", "--rate", 0.1)
    assert code == 2
