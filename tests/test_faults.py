"""Fault injection: each fault makes `check parity` fail and name the culprit; the files as they were exported pass."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import gguf_changed, onnx_cache_off_by_one, onnx_changed, onnx_with_bos, scaled, swapped
from typer.testing import CliRunner

from sola_edge.cli import app
from sola_edge.testing import tiny_checkpoint

pytest.importorskip("onnxruntime_genai")
SIZES = ("--context", "48", "--windows", "2", "--threads", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("faults") / "tiny", compressed=True, layers=3)


@pytest.fixture(scope="module")
def onnx_folder(checkpoint: Path) -> Path:
    from exporters.onnx import export

    return export(checkpoint, checkpoint.parent / "onnx").path.parent


@pytest.fixture(scope="module")
def gguf_files(checkpoint: Path, llama_cpp_build: object) -> dict[str, Path]:
    from exporters.gguf import export

    return {kind: export(checkpoint, checkpoint.parent / f"{kind}.gguf", kind).path for kind in ("f32", "q4_0")}


def check(*arguments: str | Path) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """(exit code, results of each candidate by its file name) of `sola-edge check parity --json`."""
    done = CliRunner().invoke(app, ["check", "parity", *map(str, arguments), *SIZES, "--json"])
    assert done.stdout, done.exception
    report = json.loads(done.stdout.splitlines()[-1])
    found: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"][1:]:
        found.setdefault(Path(result["artefact"]).name, []).append(result)
    return done.exit_code, found


def whats(results: list[dict[str, Any]], fails: bool = True) -> set[str]:
    """Kinds of findings of an artefact, of those that fail or do not by themselves."""
    return {finding["what"] for result in results for finding in result["findings"] if finding["fails"] is fails}


def test_faults_of_an_onnx_folder_are_named(checkpoint: Path, onnx_folder: Path, tmp_path: Path) -> None:
    """One run of all, so that the reference is computed once; the sound folder passes among them."""
    weight, single = "model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.B"

    def one_value(values: np.ndarray) -> np.ndarray:
        values[3, 7] *= 1.01
        return values

    def rows_of(table: np.ndarray, wave: Any) -> np.ndarray:
        places, count = np.arange(len(table))[:, None], table.shape[1]
        return wave(places * 20000.0 ** (-np.arange(count) / count)).astype(table.dtype)

    rope = {"cos_cache": lambda table: rows_of(table, np.cos), "sin_cache": lambda table: rows_of(table, np.sin)}
    code, found = check(
        checkpoint,
        onnx_folder,
        onnx_changed(onnx_folder, tmp_path / "scaled", {weight: scaled(1.01)}),
        onnx_changed(onnx_folder, tmp_path / "value", {single: one_value}),
        onnx_changed(onnx_folder, tmp_path / "rope", rope),
        onnx_cache_off_by_one(onnx_folder, tmp_path / "cache"),
        onnx_with_bos(onnx_folder, tmp_path / "bos", "<|im_start|>", 1),
    )
    assert code == 1
    for result in found.pop("onnx"):
        assert result["passed"] and not result["findings"], result["reasons"]
    assert all(not result["passed"] for results in found.values() for result in results)
    assert {result["runtime"] for result in found["scaled"]} == {"onnxruntime", "onnxruntime-genai"}
    told = {name: results[0]["reasons"] for name, results in found.items()}
    assert any(reason.startswith("mean KL") for reason in told["scaled"])
    assert f"weight {weight}: is 1.01 times the checkpoint's in all 160 rows" in told["scaled"]
    assert any(f"weight {single}: 1 of its values differs: row 3, column 7" in reason for reason in told["value"])
    assert "metadata model.onnx: rope theta is 20,000, the reference's 10,000" in told["rope"]
    assert whats(found["cache"]) == {"cache"} and whats(found["cache"], fails=False) == {"graph"}
    for result in found["cache"]:
        assert result["parity"]["passed"]  # read in one go there is nothing to see
        assert any(reason.startswith("cache") and "are off" in reason for reason in result["reasons"])
    assert any("from position 4 on" in reason and "most at position" in reason for reason in told["cache"])
    assert whats(found["bos"]) == {"ids"} and found["bos"][0]["parity"]["passed"]
    assert any("a BOS (id 1) is put before the text, the reference puts nothing" in reason for reason in told["bos"])


@pytest.mark.slow
def test_faults_of_a_gguf_file_are_named(checkpoint: Path, gguf_files: dict[str, Path], tmp_path: Path) -> None:
    sound, coarse = gguf_files["f32"], gguf_files["q4_0"]
    factor, rows = "blk.1.ffn_down.lr_b.weight", {"blk.1.ffn_down.lr_b.weight": swapped(3, 7)}
    code, found = check(
        checkpoint,
        sound,
        coarse,
        gguf_changed(sound, tmp_path / "rows.gguf", rows),
        gguf_changed(coarse, tmp_path / "coarse-rows.gguf", rows),
        gguf_changed(sound, tmp_path / "rope.gguf", keys={"llama.rope.freq_base": 20000.0}),
        gguf_changed(sound, tmp_path / "bos.gguf", keys={"tokenizer.ggml.add_bos_token": True}),
        gguf_changed(coarse, tmp_path / "labelled.gguf", keys={"general.file_type": 1}),
        gguf_changed(coarse, tmp_path / "model-F16.gguf"),
        "--kl-mean",
        "1000",  # rounding to 4 bits ruins a random model; it is not what this is about
        "--top1",
        "0",
        "--ppl-change",
        "1e9",
    )
    assert code == 1
    told = {name: results[0]["reasons"] for name, results in found.items()}
    assert told.pop("f32.gguf") == told.pop("q4_0.gguf") == []
    swap = f"weight {factor}: rows 3 and 7 are each other's"
    assert told["rows.gguf"] == told["coarse-rows.gguf"] == [swap]
    assert told["rope.gguf"] == ["metadata rope.gguf: rope theta is 20,000, the reference's 10,000"]
    bos = "a BOS (id 1) is put before the text, the reference puts nothing"
    assert told["bos.gguf"] == [f"ids llama.cpp f32: {bos}"]
    for name, where in (("labelled.gguf", "general.file_type"), ("model-F16.gguf", "model-F16.gguf")):
        (reason,) = told[name]
        assert reason.startswith(f"precision {where}: the file calls itself F16, but ") and reason.endswith("Q4_0")


@pytest.mark.slow
def test_without_a_checkpoint_logits_ids_cache_and_metadata_are_compared(
    onnx_folder: Path, gguf_files: dict[str, Path], tmp_path: Path
) -> None:
    """The rows swapped are seen in the logits alone: nobody knows what they should be."""
    wrong = gguf_changed(gguf_files["f32"], tmp_path / "wrong.gguf", {"blk.1.ffn_down.lr_b.weight": swapped(3, 7)})
    rope = gguf_changed(gguf_files["f32"], tmp_path / "rope.gguf", keys={"llama.rope.freq_base": 20000.0})
    code, found = check(onnx_folder, gguf_files["f32"], wrong, rope)
    assert code == 1 and found["f32.gguf"][0]["passed"], found["f32.gguf"][0]["reasons"]
    assert whats(found["wrong.gguf"]) == set() and "mean KL" in found["wrong.gguf"][0]["reasons"][0]
    assert whats(found["rope.gguf"]) == {"metadata"} and "mean KL" in found["rope.gguf"][0]["reasons"][0]
