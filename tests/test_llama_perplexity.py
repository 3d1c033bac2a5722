"""llama.cpp's own judge: the base file, what it says of real files beside our own check, and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from llama_cpp_runner import rewritten
from typer.testing import CliRunner

from exporters.gguf import export
from exporters.llama_cpp import Build
from exporters.llama_cpp.tools import run_tool
from runtime_checks import check_parity, llama_perplexity
from runtime_checks.llama_perplexity import judge_by_llama_perplexity, packed
from sola_edge.cli import app
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint
from sola_edge.texts import load_text

TEXT = "Numbers and their squares: " + " ".join(f"{n} {n * n}," for n in range(900))


def unpacked(rows: np.ndarray, vocab: int) -> np.ndarray:
    """Log-probabilities as llama.cpp reads them."""
    step, least = rows[:, :4].copy().view("<f4").T
    return step[:, None] * rows[:, 4 : 4 + vocab] + least[:, None]


def test_a_row_by_hand() -> None:
    """Two tokens, 16 nats apart: p = (1, 1.1e-7), and 65,535 steps of 16 / 65,535 between them."""
    (row,) = packed(np.array([[3.0, -13.0]]))
    assert row.shape == (6,) and row[4:].tolist() == [65535, 0]
    step, least = row[:4].view("<f4")
    assert step == np.float32(16 / 65535) and least == np.float32(-16.0 - np.log1p(np.exp(-16.0)))


@pytest.mark.parametrize("vocab", [320, 321])
def test_rows_are_log_probabilities_to_half_a_step(vocab: int) -> None:
    logits = np.random.default_rng(0).normal(size=(7, vocab)) * 4
    rows = packed(logits)
    assert rows.dtype == np.uint16 and rows.shape == (7, 4 + vocab + vocab % 2)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    least = np.maximum(expected, expected.max(1, keepdims=True) - 16)
    np.testing.assert_allclose(unpacked(rows, vocab), least, atol=0.5 * 16 / 65535 + 1e-5)


def test_equal_logits_have_no_step() -> None:
    assert unpacked(packed(np.zeros((1, 4))), 4) == pytest.approx(np.full((1, 4), np.log(0.25)))


@pytest.mark.slow
def test_it_agrees_with_our_own_check(
    smollm2_compressed: Path, smollm2: Path, tmp_path: Path, llama_cpp_build: Build
) -> None:
    """F32 as exact as its digits, F16 and Q8_0 within their tolerances, and a dense file is not the compressed model."""
    files = [export(smollm2_compressed, tmp_path / f"{type}.gguf", type).path for type in ("f32", "f16", "q8_0")]
    dense = export(smollm2, tmp_path / "dense.gguf", "f16").path
    text = load_text("python-reference").joined
    found = judge_by_llama_perplexity(smollm2_compressed, [*files, dense], text, context=256, windows=2)
    exact, half, eighth, other = found.judged
    assert abs(exact.mean_kl) <= 1e-6 and abs(half.mean_kl) <= 2e-5 and 1e-3 < eighth.mean_kl < 1.5e-2 < other.mean_kl
    assert exact.perplexity == pytest.approx(exact.reference_perplexity, rel=1e-4)
    assert exact.top1 == 1.0 and 0.9 < eighth.top1 < 1.0 and 0 < eighth.mean_kl_error < eighth.mean_kl < eighth.max_kl
    ours = check_parity(smollm2_compressed, [files[2]], text, context=256, windows=2).results[1].parity
    assert ours is not None and ours.kl_mean is not None  # of all positions, not of the second halves
    assert eighth.mean_kl == pytest.approx(ours.kl_mean, rel=0.6)


@pytest.mark.slow
def test_the_command_on_a_tokenizer_with_bos(tmp_path: Path, llama_cpp_build: Build) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True)
    model = export(source, tmp_path / "x.gguf", "f32").path
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--text", str(tmp_path / "text.txt"), "--context", "128", "--windows", "3"]
    arguments = ["check", "llama-perplexity", str(source), str(model), *options]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    assert abs(json.loads(found.stdout.splitlines()[-1])["judged"][0]["mean_kl"]) <= 1e-6
    assert not json.loads(found.stdout.splitlines()[-1])["protocol"]["bos"]
    added = {"tokenizer.ggml.add_bos_token": True}
    arguments[3] = str(rewritten(model, tmp_path / "bos.gguf", lambda _, values: values, flags=added))
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output + repr(found.exception)
    judged = json.loads(found.stdout.splitlines()[-1])
    assert judged["protocol"]["bos"] and abs(judged["judged"][0]["mean_kl"]) <= 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_perplexity, "_bos", lambda path, threads: None)  # PyTorch reads what the tool does not
        wrong = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(wrong.stdout.splitlines()[-1])["judged"][0]["mean_kl"] > 1e-4
    assert "mean kl" in CliRunner().invoke(app, arguments).output


def by_the_tool(build: Build, model: Path, text: Path, context: int, windows: int, *options: str) -> float:
    """What llama-perplexity finds by itself: its own ids of the text, its own windows."""
    sizes = ["-c", str(context), "-b", str(context), "--chunks", str(windows), "-t", "1", "-ngl", "0"]
    command = [str(build.tool("llama-perplexity")), "-m", str(model), "-f", str(text), *sizes, *options]
    figure = re.compile(r"Final estimate: PPL = ([\d.]+)")
    done, told = run_tool(command, lambda told: figure.search(told) is not None)
    done.check_returncode()
    found = figure.search(told)
    if found is not None:
        return float(found[1])
    pytest.fail(f"no figure: {done.stderr[-500:]}")


@pytest.mark.slow
def test_our_perplexity_is_the_tools(tmp_path: Path, llama_cpp_build: Build) -> None:
    """Of the same files, to 0.1 %: ours from llama.cpp's logits of our ids, the tool's from the text."""
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True)
    files = {kind: export(source, tmp_path / f"{kind}.gguf", kind).path for kind in ("f32", "q8_0")}
    (tmp_path / "text.txt").write_text(TEXT)
    exact = {"f32": ("-ctk", "f32", "-ctv", "f32", "-fa", "off"), "q8_0": ()}
    for kind, path in files.items():
        found = judge_by_llama_perplexity(path, [path], TEXT, context=128, windows=3, threads=1)
        alone = by_the_tool(llama_cpp_build, path, tmp_path / "text.txt", 128, 3, *exact[kind])
        assert found.perplexity.value == pytest.approx(alone, rel=1e-3), kind
        assert found.judged[0].perplexity == pytest.approx(alone, rel=1e-3) and abs(found.judged[0].mean_kl) < 1e-5


def test_bad_requests_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "none.gguf").write_bytes(b"nothing")
    monkeypatch.setattr(llama_perplexity, "find", lambda: None)
    with pytest.raises(UserError, match="llama-cpp build"):
        judge_by_llama_perplexity(source, [tmp_path / "none.gguf"], TEXT)
    monkeypatch.setattr(llama_perplexity, "find", lambda: Build(tmp_path))
    with pytest.raises(UserError, match=r"is no file"):
        judge_by_llama_perplexity(source, [tmp_path / "missing.gguf"], TEXT)
    with pytest.raises(UserError, match="is no GGUF file"):
        judge_by_llama_perplexity(source, [tmp_path / "none.gguf"], TEXT, context=64, windows=4)
    with pytest.raises(UserError, match="nothing of 93 tokens"):
        judge_by_llama_perplexity(source, [tmp_path / "none.gguf"], TEXT, context=64, windows=3)
