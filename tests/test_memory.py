"""Memory: the system's count and our own are one figure, and the shapes in a file explain it."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from rich.console import Console
from shapes_by_hand import SHAPES
from typer.testing import CliRunner

from runtime_checks.artefacts import Artefact, open_artefact
from runtime_checks.grids import print_grid
from runtime_checks.launcher import launched, peak_told
from runtime_checks.memory import library_pages
from runtime_checks.memory_curve import MemoryPoint, MemoryReport, memory_curves
from runtime_checks.memory_model import LIBRARIES, expected_memory, growth
from runtime_checks.memory_table import HEADS, PART_HEADS, PARTS, parts, print_memory, row
from runtime_checks.process import Child
from runtime_checks.runtimes import RUNTIMES
from runtime_checks.schema import Memory
from runtime_checks.shapes import BlockMatrix, Shapes, shapes_of
from runtime_checks.throughput import random_prompt
from sola_edge.cli import app
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

MB = 1_000_000
TIME = Path("/usr/bin/time")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights outweigh a runtime's libraries: 140 MB in fp32."""
    folder = tmp_path_factory.mktemp("memory") / "dense"
    return tiny_checkpoint(folder, hidden=512, ffn=2048, layers=8, heads=8, kv_heads=4, vocab=8000)


# --- the system's count ----------------------------------------------------------------------------------------------


def test_the_system_s_peak_is_the_program_s_own(tmp_path: Path) -> None:
    ballast = np.ones(300 * MB, dtype=np.uint8)  # of this process: a child's ru_maxrss would begin with it
    told = tmp_path / "peak"
    subprocess.run(launched([sys.executable, "-S", "-c", f"b'x' * {90 * MB}"], told), check=True)
    peak = peak_told(told)
    assert peak is not None and 90 * MB < peak < 130 * MB < ballast.nbytes


@pytest.mark.parametrize(("code", "ends"), [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_a_launched_program_ends_as_it_ends(tmp_path: Path, code: str, ends: int) -> None:
    done = subprocess.run(launched([sys.executable, "-S", "-c", code], tmp_path / "peak"), check=False)
    assert done.returncode == ends and peak_told(tmp_path / "peak") is not None
    assert peak_told(tmp_path / "never") is None


def test_pages_of_libraries_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapping(resident: int, own: int, path: str) -> str:
        head = f"7f00-7f01 r-xp 00000000 fe:00 12 {path}".rstrip()
        return f"{head}\nSize: 90000 kB\nRss: {resident} kB\nPss: 7 kB\nAnonymous: {own} kB\nVmFlags: rd ex\n"

    counted = ["/usr/lib/libm.so.6", "/with space/a.cpython-311-x86_64-linux-gnu.so", "/tmp/gone.so.1.2 (deleted)"]
    others = [
        "",
        "[heap]",
        "[vdso]",
        "[anon:a/b.so]",
        "/bin/python3.11",
        "/m/small.sola.gguf",
        "/m.so/f32.gguf",
        "/m/x.soup",
    ]
    mappings = [mapping(100, 30, path) for path in counted] + [mapping(1000, 0, path) for path in others]
    (tmp_path / "smaps").write_bytes("".join(mappings).encode() + b"1-2 r-xp 0 0 1 /m/\xff\x0c.gguf\nRss: 5 kB\n")
    monkeypatch.setattr("runtime_checks.memory.MAPPINGS", tmp_path / "smaps")
    assert library_pages() == 3 * (100 - 30) * 1024
    monkeypatch.setattr("runtime_checks.memory.MAPPINGS", tmp_path / "none")
    assert library_pages() is None


@pytest.mark.skipif(library_pages() is None, reason="the system does not tell")
def test_pages_of_libraries_are_part_of_what_is_resident() -> None:
    code = """
from runtime_checks.memory import library_pages, resident
before = library_pages()
import onnxruntime
print(before, library_pages(), resident()["now"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, now = map(int, done.stdout.split())
    assert 0 < before < after < now and after - before > 5 * MB


@pytest.mark.skipif(not TIME.exists(), reason="no /usr/bin/time here")
def test_our_peak_is_that_of_time_v(onnx_folder: Path, tmp_path: Path) -> None:
    command = [
        str(TIME),
        "-v",
        "-o",
        str(tmp_path / "time"),
        sys.executable,
        "-m",
        "runtime_checks.child",
        "onnxruntime_",
    ]
    requests = [
        {"do": "load", "path": str(onnx_folder), "threads": 1, "context": 64, "device": "cpu"},
        {"do": "use", "prompt": random_prompt(56, 256), "decode": 8},
    ]
    asked = "".join(json.dumps(request) + "\n" for request in requests)
    root = Path(__file__).parent.parent
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, cwd=root)
    own = json.loads(done.stdout.splitlines()[-1])["ok"]["peak"]
    (line,) = [row for row in (tmp_path / "time").read_text().splitlines() if "Maximum resident" in row]
    assert own == pytest.approx(int(line.split()[-1]) * 1024, rel=0.03)


# --- what it should be -----------------------------------------------------------------------------------------------


def measured(libraries: int | None = None, parts: dict[str, int] | None = None) -> Memory:
    return Memory(
        covers="",
        baseline=50,
        after_load=0,
        peak=0,
        anonymous=None,
        file_backed=None,
        libraries=libraries,
        parts=parts or {},
    )


def test_the_model_by_hand() -> None:
    def parts(runtime: str, precision: str, told: dict[str, int] | None = None) -> dict[str, int]:
        artefact = Artefact(Path("x"), "gguf", precision, 0)
        return expected_memory(runtime, artefact, SHAPES, 600, 592, measured(libraries=7, parts=told or {}))

    cache, living = 2 * 2 * 3 * 4, (2 * 5 + 4 * 7) * 4
    assert parts("llama.cpp", "q4_0", {"weights": 1400}) == {
        "runtime": 50,
        "libraries": 7,
        "session": 2_300_000,
        "weights": 1000,
        "copies": 400,
        "vocabulary": 11 * 300,
        "kv": cache * 2 * 768,
        "logits": 11 * 4,
        "activations": 512 * living + 768 * 512 * 6,
    }
    assert parts("llama.cpp", "f32", {"weights": 1001})["kv"] == cache * 4 * 768
    kept = (4 * 5 + 6 * 7) * 4
    graph = {
        "runtime": 50,
        "libraries": 7,
        "weights": 1000,
        "copies": 100,
        "logits": 592 * 11 * 4,
        "activations": 592 * kept,
    }
    assert parts("onnxruntime", "fp32") == {**graph, "session": 2 * MB, "kv": 2 * cache * 4 * 600}
    assert parts("onnxruntime-genai", "fp32") == {**graph, "session": 9 * MB, "kv": cache * 4 * 600}
    untold = expected_memory("torch", Artefact(Path("x"), "gguf", "fp32", 0), SHAPES, 600, 592, measured())
    assert untold["libraries"] == LIBRARIES["torch"]
    assert parts("torch", "bf16")["kv"] == parts("torch", "fp32")["kv"] == cache * 4 * 600  # run in fp32
    assert parts("torch", "bf16")["copies"] == 500 and parts("torch", "fp32")["copies"] == 0


def test_the_model_of_blocks_by_hand() -> None:
    def copies(*rows: tuple[int, bool]) -> int:
        """Of two matrices, (bits, integers) each; tokens are looked up in the second one."""
        head, layer = rows[-1], rows[0]
        blocks = (BlockMatrix(*layer, 50, 500, 10, False), BlockMatrix(*head, 70, 100, 30, True))
        artefact = Artefact(Path("x"), "onnx", "int4", 0)
        found = expected_memory("onnxruntime-genai", artefact, replace(SHAPES, blocks=blocks), 600, 592, measured())
        return found["copies"]

    assert copies((8, False)) == 40 + 70 * 4
    assert copies((4, False)) == 100
    assert (
        copies((4, True)) == copies((8, True)) == 100 + 100
    )  # 2.5 times the scales; the values of a looked-up one stay
    assert copies((4, True), (8, False)) == 25 + 30 + 70 * 4
    assert expected_memory("onnxruntime", Artefact(Path("x"), "onnx", "fp16", 0), SHAPES, 600, 592, measured()) == {}


def test_shapes_of_blocks_are_read_from_the_file(dense: Path, tmp_path: Path) -> None:
    export = pytest.importorskip("exporters.onnx").export
    export(dense, tmp_path / "int8", precision="int8")
    export(dense, tmp_path / "int4", precision="int4")
    parameters = 8000 * 512 + 8 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)
    found = {bits: shapes_of(open_artefact(tmp_path / bits)).blocks for bits in ("int8", "int4")}
    for name, bits, block, integers in (("int8", 8, 16, False), ("int4", 4, 32, True)):
        blocks = found[name]
        assert sum(m.elements for m in blocks) == parameters
        assert sum(m.values for m in blocks) == parameters * bits // 8
        assert sum(m.scales for m in blocks) == parameters // block * 4
        assert {(m.bits, m.integers) for m in blocks} == {(bits, integers)}
        assert [m.elements for m in blocks if m.looked_up] == [8000 * 512]


def test_growth_is_what_a_longer_prompt_takes(dense: Path, onnx_folder: Path) -> None:
    cache, living, kept = 2 * 8 * 4 * 64 * 4, (2 * 512 + 4 * 2048) * 4, (4 * 512 + 6 * 2048) * 4
    assert growth("torch", open_artefact(dense)) == cache + living
    assert growth("onnxruntime-genai", open_artefact(onnx_folder)) == cache + 8000 * 4 + kept


def test_shapes_are_read_from_the_files(dense: Path, onnx_folder: Path) -> None:
    found = shapes_of(open_artefact(dense))
    matrices = 8 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)
    parameters = 8000 * 512 + 512 + matrices + 8 * 2 * 512
    assert found == Shapes(parameters * 4, 8000 * 512 * 4, True, 0, matrices, 8, 8, 4, 64, 512, 2048, 8000)
    onnx = shapes_of(open_artefact(onnx_folder))
    assert 0 <= onnx.weights - found.weights < MB  # and tables of the rotation
    assert onnx == replace(found, weights=onnx.weights, rotations=onnx.rotations)
    assert onnx.rotations > 0 and onnx.step_bytes - found.step_bytes < 5000  # constants
    whole = replace(SHAPES, rotations=30, shared=False)
    assert (whole.step_bytes, replace(whole, shared=True).step_bytes) == (870, 970)


def check(report: MemoryReport, runtimes: set[str]) -> None:
    """The system agrees, the shapes explain 95 % of the peak, and 85 % of what is not libraries."""
    assert {curve.runtime for curve in report.curves} == runtimes
    assert report.passed, [reason for curve in report.curves for reason in curve.reasons]
    for curve in report.curves:
        for point in curve.points:
            assert point.peaks == sorted(point.peaks) and len(point.peaks) == report.rounds
            assert point.peaks[0] == point.memory.peak
            libraries = point.expected["runtime"] + point.expected["libraries"]
            own = point.memory.peak - libraries
            assert point.system_peak == pytest.approx(point.memory.peak, rel=0.03)
            assert sum(point.expected.values()) == pytest.approx(point.memory.peak, rel=0.05)
            assert sum(point.expected.values()) - libraries == pytest.approx(own, rel=0.15)
        short, long = curve.points
        assert long.memory.peak > short.memory.peak


@pytest.mark.parametrize(("precision", "activations"), [("int8", True), ("int4", True), ("int4", False)])
def test_shapes_explain_the_peak_of_blocks(dense: Path, tmp_path: Path, precision: str, activations: bool) -> None:
    onnx = pytest.importorskip("exporters.onnx")
    chosen = onnx.Quantization(int8_activations=activations)
    onnx.export(dense, tmp_path / "onnx", precision=precision, quantization=chosen)
    # at 256 the shapes say 4.3 % too much of ONNX Runtime, which is too near to what is allowed
    check(memory_curves([tmp_path / "onnx"], [64, 128], threads=1, rounds=2), {"onnxruntime", "onnxruntime-genai"})


def test_nothing_is_expected_of_a_graph_for_gpus(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("exporters.onnx").export(dense, tmp_path / "onnx", precision="fp16")
    report = memory_curves([tmp_path / "onnx"], [64], threads=1, rounds=1, runtimes=["onnxruntime"])
    assert report.passed and report.curves[0].points[0].expected == {}
    print_memory(report)


def test_shapes_explain_the_peak_in_onnx_runtime(onnx_folder: Path) -> None:
    check(memory_curves([onnx_folder], [64, 256], threads=1, rounds=2), {"onnxruntime", "onnxruntime-genai"})


def test_shapes_explain_the_peak_in_pytorch(dense: Path) -> None:
    check(memory_curves([dense], [64, 256], threads=1, rounds=2), {"torch"})


@pytest.mark.slow
def test_shapes_explain_the_peak_in_llama_cpp(dense: Path, llama_cpp_build: object) -> None:
    from exporters.gguf import export

    paths = [dense.parent / f"{type}.gguf" for type in ("f32", "q4_0")]  # q4_0 is in memory twice where it is repacked
    for path in paths:
        export(dense, path, type=path.stem)
    found = shapes_of(open_artefact(paths[0]))
    assert found == shapes_of(open_artefact(dense))
    check(memory_curves(paths, [64, 256], threads=1, rounds=2), {"llama.cpp"})


def test_what_is_off_is_said_and_fails(onnx_folder: Path, tmp_path: Path) -> None:
    asked = [
        "check",
        "memory",
        str(onnx_folder),
        "--contexts",
        "32",
        "--runtime",
        "onnxruntime",
        "--threads",
        "1",
        "--rounds",
        "1",
    ]
    done = CliRunner().invoke(app, [*asked, "--tolerance", "0.000001", "-o", str(tmp_path / "memory.json")])
    assert done.exit_code == 1 and "32 tokens: the shapes say" in done.stdout
    report = MemoryReport.model_validate_json((tmp_path / "memory.json").read_text())
    assert not report.passed and report.curves[0].points[0].expected["weights"] > 100 * MB
    (onnx_folder / "model.onnx.data").rename(tmp_path / "data")
    try:
        lost = memory_curves([onnx_folder], [32], threads=1, rounds=1, runtimes=["onnxruntime"])
    finally:
        (tmp_path / "data").rename(onnx_folder / "model.onnx.data")
    assert not lost.passed and "32 tokens: onnxruntime on" in lost.curves[0].reasons[0]


def test_the_least_of_several_processes_is_judged(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(subject: object, context: int, threads: int) -> SimpleNamespace:
        peak, system, gpu = next(peaks)
        memory = measured(libraries=0).model_copy(update={"peak": peak})
        off = None if system is None else peak / system - 1
        return SimpleNamespace(memory=memory, system_peak=system, system_off=off, gpu=gpu, version="1")

    def point(*found: tuple[int, int | None, int | None]) -> tuple[MemoryPoint, list[str]]:
        nonlocal peaks
        peaks = iter(found)
        (curve,) = memory_curves([onnx_folder], [64], rounds=3, tolerance=0.999, runtimes=["onnxruntime"]).curves
        return curve.points[0], curve.reasons

    peaks = iter([])
    monkeypatch.setattr("runtime_checks.memory_curve._process", process)
    found, reasons = point((990, 991, None), (900, 900, 5), (1000, 1050, 9))
    assert (found.memory.peak, found.peaks, found.system_peak, found.gpu) == (900, [900, 990, 1000], 900, 9)
    assert found.system_off == pytest.approx(1000 / 1050 - 1)
    assert any("a process's peak is -4.8 % off the system's own" in reason for reason in reasons)
    assert any("of the least peak that was measured" in reason for reason in reasons)  # 900 bytes are none
    found, reasons = point((990, None, None), (900, None, None), (1000, None, None))
    assert (found.system_off, found.gpu) == (None, None) and not any("off the system's" in one for one in reasons)


def test_the_tables_fit_eighty_columns() -> None:
    memory = measured(libraries=11 * MB, parts={}).model_copy(
        update={"peak": 1180 * MB, "anonymous": 1111 * MB, "file_backed": 99 * MB}
    )
    expected = dict.fromkeys(PARTS, 123 * MB)
    kept = {"memory": memory, "peaks": [memory.peak, 1346 * MB], "system_peak": memory.peak, "system_off": 0.0}
    point = MemoryPoint(context=2048, gpu=9 * MB, expected=expected, **kept)
    console = Console(width=80, file=StringIO(), record=True)
    for heads, cells in ((HEADS, row), (PART_HEADS, parts)):
        found = cells(point)
        print_grid(console, heads, [found, cells(point.model_copy(update={"expected": {}}))])
        text = console.export_text()
        assert all(word in text for word in (*heads, *found)) and len(found) == len(heads)  # none is broken


def test_a_process_that_is_counted_is_killed_with_its_launcher(onnx_folder: Path) -> None:
    row = RUNTIMES["onnxruntime"]
    with pytest.raises(KeyError), Child(row, onnx_folder, 1, 64, counted=True) as child:
        process = psutil.Process(child.pid)
        assert "runtime_checks.child" in process.cmdline() and "-S" not in process.cmdline()
        raise KeyError
    with suppress(psutil.NoSuchProcess):
        for _ in range(50):
            if process.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)
        pytest.fail("it lives on")


def test_what_is_interrupted_while_it_loads_is_killed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(child: Child, request: str, **arguments: object) -> None:
        raise KeyboardInterrupt

    busy = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr("runtime_checks.process.launched", lambda command, told: launched(busy, told))
    monkeypatch.setattr(Child, "ask", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Child(RUNTIMES["onnxruntime"], tmp_path, 1, 64, counted=True)
    assert time.monotonic() - start < 9  # without, it is given ten seconds to end


def test_bad_input_is_refused(onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context 8 is out of range"):
        memory_curves([onnx_folder], [64, 8])
    with pytest.raises(UserError, match="rounds 0 is out of range"):
        memory_curves([onnx_folder], [64], rounds=0)
    with pytest.raises(UserError, match="tolerance 0 is out of range"):
        memory_curves([onnx_folder], [64], tolerance=0)
    with pytest.raises(UserError, match="nothing can be run"):
        memory_curves([onnx_folder], [64], runtimes=["llama.cpp"])
    with pytest.raises(UserError, match="there is no runtime 'onnxruntme'"):
        memory_curves([onnx_folder], [64], runtimes=["onnxruntime", "onnxruntme"])
    with pytest.raises(UserError, match="no such file"):
        memory_curves([tmp_path / "missing"], [64])
