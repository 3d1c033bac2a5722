"""`check parity`: limits of the command line, top-5 agreement, the cost of a compression apart from an export's parity."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from genai_builder import build
from typer.testing import CliRunner

from runtime_checks import check_parity
from runtime_checks.metrics import compare_window
from runtime_checks.parity import COARSE, TOLERANCES, judge, limits, tolerance_of
from runtime_checks.schema import Parity, Tolerance
from sola_edge.cli import app
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while.\n" * 8


def test_top5_by_hand() -> None:
    """Of the reference's tokens 2 to 6 the candidate, who has 3 to 7, has four."""
    reference = np.array([[0, 1, 2, 3, 4, 5, 6]] * 2, dtype=np.float32)
    candidate = np.array([[9, 1, 2, 3, 4, 5, 6]] * 2, dtype=np.float32)
    assert compare_window(reference, candidate, np.array([0, 1])).top5 == pytest.approx([0.8])
    assert compare_window(reference[:, :3], candidate[:, :3], np.array([0, 1])).top5 == [1.0]  # all there are


def perturbed(changes: list[float]) -> list[Any]:
    """Windows whose logits are changed by so much."""
    rng = np.random.default_rng(0)
    found = []
    for change in changes:
        reference = rng.normal(size=(64, 200)).astype(np.float32) * 3
        candidate = reference + change * rng.normal(size=reference.shape).astype(np.float32)
        found.append(compare_window(reference, candidate, rng.integers(0, 200, 64)))
    return found


def test_every_reason_names_its_first_window() -> None:
    found = judge(perturbed([0.0, 0.0, 2.0]), TOLERANCES["f16"], "reference", "torch")
    assert len(found.reasons) == 3 and all("first in window 3" in reason for reason in found.reasons)
    assert " ± " in found.reasons[2] and found.window_top1[:2] == [1.0, 1.0]
    assert found.top5 is not None and found.top1 is not None and found.top1 < found.top5 < 1


def test_limits_stand_before_a_precisions_own() -> None:
    assert tolerance_of("f16", limits(kl_mean=0.5), "export parity") == Tolerance(
        kl_mean=0.5, top1=0.99, ppl_change_percent=0.1
    )
    assert tolerance_of("q4_k", limits(), "export parity") == COARSE
    assert tolerance_of("f16", limits(top1=0.9), "compression cost") == Tolerance(top1=0.9)
    for wrong in ({"top1": 1.1}, {"kl_mean": -1.0}, {"ppl_change_percent": float("nan")}):
        with pytest.raises(UserError, match="out of range"):
            limits(**wrong)


def test_a_report_of_before_these_figures_is_read() -> None:
    found = judge(perturbed([1e-3]), TOLERANCES["f16"], "reference", "torch").model_dump()
    for added in ("top5", "window_top1", "comparison"):
        del found[added]
    old = Parity.model_validate(found)
    assert (old.top5, old.window_top1, old.comparison) == (None, [], "export parity")


def parity(*arguments: str | Path) -> tuple[int, Any]:
    """(exit code, the candidate's result) of the command."""
    done = CliRunner().invoke(
        app, ["check", "parity", *map(str, arguments), "--context", "32", "--windows", "2", "--json"]
    )
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])["results"][1] if done.stdout else done.exception


def test_the_cost_of_a_compression_has_no_limits_but_those_given(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    small = tiny_checkpoint(tmp_path / "small", compressed=True)
    code, found = parity(dense, small)
    assert code == 1 and found["findings"][-1]["what"] == "model"
    assert "small: it is compressed by 0 (random), the reference dense" in found["reasons"][-1]
    code, found = parity(dense, small, "--compression-cost")
    assert code == 0 and found["parity"]["comparison"] == "compression cost" and found["parity"]["kl_mean"] > 1
    assert found["parity"]["tolerance"] == {"kl_mean": None, "top1": None, "ppl_change_percent": None}
    code, found = parity(dense, small, "--compression-cost", "--kl-mean", "1")
    assert code == 1 and ["mean KL" in reason for reason in found["reasons"]] == [True]
    code, error = parity(dense, small, "--top1", "2")
    assert isinstance(error, UserError)


def test_a_folder_of_onnxruntime_genais_own_builder_is_compared(tmp_path: Path) -> None:
    """Its cache has sides without a number; its weights go by other names, so they are not compared."""
    pytest.importorskip("onnxruntime_genai")
    dense = tiny_checkpoint(tmp_path / "dense", heads=2, kv_heads=1, layers=2)
    folder = build(dense, tmp_path / "folder", "fp32")
    report = check_parity(dense, [folder], TEXT, context=32, windows=2, threads=1)
    assert report.passed and len(report.results) == 3, [result.reasons for result in report.results]
    assert [skipped.what for skipped in report.skipped] == [f"weights of {folder}"]
