"""Speed over a grid: what is counted follows from the shapes, and every runtime is timed by the same rule."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shapes_by_hand import SHAPES
from typer.testing import CliRunner

from runtime_checks.artefacts import open_artefact
from runtime_checks.limits import Limits, array_bytes, last_caches, machine_limits
from runtime_checks.process import Child
from runtime_checks.runtimes import runtimes_for
from runtime_checks.runtimes.greedy import Rows, timed_batch
from runtime_checks.shapes import shapes_of
from runtime_checks.throughput_grid import Grid, SpeedTest, ThroughputPoint, ThroughputReport, throughput_curves
from runtime_checks.throughput_table import print_throughput
from sola_edge.cli import app
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

LIMITS = Limits(threads=1, array=64, bandwidth={"sum": 50.0, "triad": 100.0}, gemm=1000.0)
POINT = ThroughputPoint(
    test=SpeedTest(threads=1, batch=2, prompt=10, generate=4),
    first_token=[2.0, 4.0, 5.0],
    decode=[1.0, 2.0, 8.0],
    step_bytes=25,
    prompt_flops=800,
)


@pytest.fixture(scope="module")
def hybrid(dense: Path) -> Path:
    return tiny_checkpoint(dense.parent / "hybrid", compressed=True)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_operations_and_bytes_by_hand() -> None:
    attention = 4 * 2 * 6 * 4 * (1 + 2 + 3)  # of three tokens, each with those before it
    assert SHAPES.flops(3, 1) == 2 * 3 * 300 + 2 * 11 * 5 + attention
    assert SHAPES.flops(3, 3) - SHAPES.flops(3, 1) == 2 * 2 * 11 * 5
    assert replace(SHAPES, shared=False).step_bytes == 900
    assert SHAPES.step_bytes == 1000


def test_speeds_and_shares_by_hand() -> None:
    assert POINT.seconds_to_first == 4.0
    assert POINT.prefill_speeds == [10.0, 5.0, 4.0] and POINT.decode_speeds == [8.0, 4.0, 1.0]
    assert POINT.bandwidth_share(LIMITS) == 25 * 4 / 2.0 / 100  # the faster kernel is the limit
    assert POINT.gemm_share(LIMITS) == 800 / 4.0 / 1000


def test_a_batch_is_a_prompt_and_so_many_greedy_steps() -> None:
    asked: list[Rows] = []

    def step(rows: Rows) -> np.ndarray:
        asked.append(rows)
        return np.eye(9, dtype=np.float32)[rows[:, -1] + 1]  # the next token is the last one + 1

    first, decode, chosen = timed_batch(step, [1, 2, 3], 2, 2)
    assert chosen == [[4, 5, 6]] * 2
    assert [rows.tolist() for rows in asked] == [[[1, 2, 3]] * 2, [[4]] * 2, [[5]] * 2]
    assert first > 0 and decode > 0


def test_the_machine_s_limits_are_measured() -> None:
    found = machine_limits(1)
    assert found.threads == 1 and 0 < found.array <= 2 * array_bytes()
    assert set(found.bandwidth) == {"sum", "matrix × vector", "triad"}
    assert min(found.bandwidth.values()) > 1e8 and found.gemm > 1e8
    assert found.memory == max(found.bandwidth.values())


def test_caches_of_several_cores_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(6):
        for level, size, shared in ((1, "32K", str(core)), (3, "32M", "0-1" if core < 2 else "2-5")):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    for cores, caches in (({0, 1}, 1), ({1, 2, 5}, 2), ({9}, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        assert last_caches(tmp_path) == caches * 32 * 2**20


# --- shapes of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("graph", ["genai", "portable"])
def test_graphs_multiply_by_what_the_checkpoint_has(tmp_path: Path, tied: bool, graph: str) -> None:
    onnx = pytest.importorskip("exporters.onnx")
    for compressed in (False, True):
        checkpoint = tiny_checkpoint(tmp_path / f"hybrid-{compressed}", tied=tied, compressed=compressed)
        folder = tmp_path / f"onnx-{compressed}"
        onnx.export(checkpoint, folder, graph=graph)
        asked, found = shapes_of(open_artefact(checkpoint)), shapes_of(open_artefact(folder))
        assert found.matrices == asked.matrices
        assert found.shared == asked.shared == tied
        assert found.embedding == asked.embedding == 320 * found.hidden * 4


# --- what a batch computes -------------------------------------------------------------------------------------------


def chosen_by(path: Path, runtime: str) -> None:
    """Every sequence of a batch, whether or not another batch was there before, has the tokens that greedy search has."""
    artefact = open_artefact(path)
    (row,) = (row for row in runtimes_for(artefact.kind, path) if row.name == runtime)
    with Child(row, path, 1, 40) as child:
        for ids in ([5, 9, 33, 2, 7], [8, 1, 60]):
            alone = child.ask("generate", ids=ids, count=6, eos=[], out=None)["ids"]
            for sequences in (1, 3, 3):
                chosen = child.ask("batch", prompt=ids, generate=5, sequences=sequences)["chosen"]
                assert chosen == [alone] * sequences


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai", "torch"])
def test_a_batch_chooses_what_greedy_search_does(dense: Path, onnx_folder: Path, runtime: str) -> None:
    chosen_by(dense if runtime == "torch" else onnx_folder, runtime)


@pytest.mark.slow
def test_a_batch_in_llama_cpp_chooses_what_greedy_search_does(
    hybrid: Path, llama_cpp_build: object, tmp_path: Path
) -> None:
    pytest.importorskip("exporters.gguf").export(hybrid, tmp_path / "hybrid.gguf", "f32")
    chosen_by(tmp_path / "hybrid.gguf", "llama.cpp")


# --- the command -----------------------------------------------------------------------------------------------------


def test_every_runtime_is_timed_over_the_grid(dense: Path, hybrid: Path, onnx_folder: Path) -> None:
    grid = Grid(prompts=(8, 16), generate=3, batches=(1, 2), threads=(1,), rounds=2)
    report = throughput_curves([hybrid, onnx_folder], grid, baseline=dense)
    assert report.passed, [curve.reasons for curve in report.curves]
    assert [c.runtime for c in report.curves] == ["torch", "torch", "onnxruntime", "onnxruntime-genai"]
    for curve in report.curves:
        assert [(p.test.batch, p.test.prompt) for p in curve.points] == [(1, 8), (1, 16), (2, 8), (2, 16)]
        assert all(len(p.first_token) == len(p.decode) == 2 and min(p.decode) > 0 for p in curve.points)
    first, second, *others = report.curves
    assert report.reference(first) is None and report.reference(second) == first
    assert all(report.reference(curve) is None for curve in others)  # the baseline does not run there
    assert second.points[0].step_bytes < first.points[0].step_bytes
    print_throughput(report)
    assert ThroughputReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.slow
def test_llama_cpp_is_timed_over_the_grid(dense: Path, hybrid: Path, llama_cpp_build: object, tmp_path: Path) -> None:
    gguf = pytest.importorskip("exporters.gguf")
    files = [tmp_path / "dense.gguf", tmp_path / "hybrid.gguf"]
    for checkpoint, file in zip((dense, hybrid), files, strict=True):
        gguf.export(checkpoint, file, "f16")
        asked, found = shapes_of(open_artefact(checkpoint)), shapes_of(open_artefact(file))
        assert found.matrices == asked.matrices and found.shared == asked.shared
    output = tmp_path / "speed.json"
    sizes = ["--prompts", "8", "--generate", "3", "--batches", "1,3", "--threads", "1", "--rounds", "2"]
    command = ["check", "throughput", str(files[1]), "--baseline", str(files[0]), *sizes, "-o", str(output)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = ThroughputReport.model_validate_json(output.read_text())
    assert [len(curve.points) for curve in report.curves] == [2, 2]
    assert report.reference(report.curves[1]) == report.curves[0]
    assert "÷ baseline" in done.output and "GFLOP/s" in done.output


def test_bad_input_is_refused(dense: Path, tmp_path: Path) -> None:
    for grid, message in ((Grid(rounds=0), "rounds 0"), (Grid(generate=0), "generate 0"), (Grid((0,)), "prompt 0")):
        with pytest.raises(UserError, match=message):
            throughput_curves([dense], grid)
    with pytest.raises(UserError, match="threads 9999 is out of range"):
        throughput_curves([dense], Grid(threads=(9999,)))
    with pytest.raises(UserError, match="no such file"):
        throughput_curves([tmp_path / "none"], Grid())
    with pytest.raises(UserError, match="there is no runtime"):
        throughput_curves([dense], Grid(), runtimes=["x"])
    with pytest.raises(UserError, match="no runtime that was named"):
        throughput_curves([dense], Grid(), runtimes=["llama.cpp"])


def test_a_runtime_that_fails_is_a_reason(dense: Path, onnx_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in onnx_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.onnx.data").write_bytes(b"")
    grid = Grid(prompts=(8,), generate=2, threads=(1,), rounds=1)
    report = throughput_curves([damaged], grid, runtimes=["onnxruntime"])
    assert not report.passed and report.curves[0].reasons and not report.curves[0].points
    print_throughput(report)
