"""The benchmarks' functions run end to end on tiny shapes; what they measure is not looked at."""

import argparse
import json
import math
from pathlib import Path

import compression
import factor_bits
import fuzz_llama_cpp
import llama_cpp_speed
import lora_residual
import onnx_export
import pytest
from genai_builder import BuilderError, build
from gguf_mutations import MUTATIONS, anatomy
from onnx_speed import Models, against_builder, against_dense, parse, run
from random_models import KINDS, Shape, achieved_rate, layouts_of, write_model
from rich.console import Console
from speed import Load, Row, Spread

from exporters.gguf import export
from exporters.llama_cpp import Build, edits
from runtime_checks import check_parity
from sola_edge.checkpoint import open_checkpoint
from sola_edge.config import RATE_TOLERANCE, rate_of
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

TINY = Shape(hidden=64, ffn=192, layers=3, heads=4, kv_heads=2, vocab=320, context=512)
BRIEF = Load(prompt=8, generate=3, rounds=2, threads=1)
UNKNOWN = "int3"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_have_the_rate(models: Models, kind: str) -> None:
    """Counted in the written files; and the full size is planned, not written."""
    dense, found = (open_checkpoint(models.random(name)).parameters() for name in ("dense", kind))
    assert dense == TINY.parameters()
    assert rate_of(dense - found, dense) == achieved_rate(TINY, layouts_of(kind, TINY, 0.3))
    for shape in (TINY, Shape()):
        assert abs(achieved_rate(shape, layouts_of(kind, shape, 0.3)) - 0.3) <= RATE_TOLERANCE * 0.3


def test_an_unreachable_rate_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(UserError, match="beyond what a model of this shape can lose"):
            layouts_of(kind, TINY, 0.9)


def test_our_graph_against_the_builders(models: Models) -> None:
    """The builder runs without a network; a precision that our exporter lacks is a row that says so."""
    prefill, decode, missing = against_builder(models, "1b", ["fp32", UNKNOWN], BRIEF)
    for row, test in ((prefill, "pp8"), (decode, "tg3")):
        assert row.test == test and row.wanted == 0.98 and row.reached is not None, row.reason
        assert row.ratio is not None and 0 < row.ratio.minimum <= row.ratio.median <= row.ratio.maximum
        assert len(row.ratio.runs) == 2 * BRIEF.rounds  # in either order
    assert missing.ratio is None and missing.reached is None and f"no {UNKNOWN} yet" in missing.reason


def test_both_graphs_compute_the_same(models: Models) -> None:
    """Otherwise their speeds would say nothing."""
    dense = models.random("dense")
    text = "The same text for both graphs. " * 20
    report = check_parity(models.ours(dense, "fp32"), [models.builders(dense, "fp32")], text, context=32, windows=1)
    parity = next(result.parity for result in report.results[1:] if result.runtime == "onnxruntime-genai")
    assert parity is not None and parity.max_logit_difference is not None and parity.max_logit_difference < 1e-3


def test_a_builder_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(BuilderError, match="builder failed for fp32: ") as failed:
        build(tmp_path / "empty", tmp_path / "out", "fp32")
    assert "\n" not in str(failed.value) and not (tmp_path / "out").exists()


def test_compressed_against_dense_as_the_command_does(models: Models, tmp_path: Path) -> None:
    """Speed of every kind and memory of one; the second run finds the first one's folders."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    load = [f"--{name}={value}" for name, value in vars(BRIEF).items()]
    common = [*sizes, *load, f"--work={models.folder}", "--precision=fp32"]
    console = Console(quiet=True)
    rows = run(parse(["hybrid", *common, f"--out={tmp_path / 'speed.json'}"]), console)
    assert [(r.candidate, r.test) for r in rows] == [(kind, test) for kind in KINDS for test in ("pp8", "tg3")]
    for row in rows:
        assert row.bytes and row.baseline_bytes and row.wanted, row.reason
        share = 0.98 if row.candidate == "narrow" else 0.95
        assert row.wanted == pytest.approx(share * row.baseline_bytes / row.bytes)
    written = {path: path.stat().st_mtime_ns for path in models.folder.rglob("model.onnx")}
    (peak,) = run(parse(["memory", *common, "--kinds=narrow", f"--out={tmp_path / 'memory.json'}"]), console)
    assert peak.figures and peak.figures.minimum > 10e6 and peak.wanted and peak.wanted < 1
    assert {path: path.stat().st_mtime_ns for path in written} == written
    recorded = json.loads((tmp_path / "speed.json").read_text())
    assert recorded["models"]["hybrid"]["rate"] == achieved_rate(TINY, layouts_of("hybrid", TINY, 0.3))
    assert len(recorded["rows"]) == len(rows) and recorded["load"]["threads"] == 1


def test_a_kind_that_there_is_not_is_refused(tmp_path: Path) -> None:
    asked: argparse.Namespace = parse(["hybrid", "--kinds=wide", f"--work={tmp_path}"])
    with pytest.raises(UserError, match="no kind 'wide'"):
        run(asked, Console(quiet=True))


def test_failures_are_rows(models: Models) -> None:
    (row,) = against_dense(models, ["narrow"], [UNKNOWN], BRIEF)
    assert row == Row("narrow", "dense", UNKNOWN, "", reason=row.reason) and UNKNOWN in row.reason


def test_reached_looks_at_the_right_side() -> None:
    ratio = Spread.of([0.9, 1.1, 1.0])
    assert ratio == Spread(1.0, 0.9, 1.1, (0.9, 1.1, 1.0))
    for test, wanted, reached in (("tg8", 0.98, True), ("tg8", 1.2, False), ("peak", 0.98, False), ("peak", 1.2, True)):
        assert Row("a", "b", "fp32", test, ratio=ratio, wanted=wanted).reached is reached


@pytest.mark.slow
def test_gguf_files_in_llama_cpp_as_the_command_does(tmp_path: Path, llama_cpp_build: Build) -> None:
    """Speed, memory, and the graph's operations: two networks instead of one, and nothing is joined or copied."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    load = [f"--{name}={value}" for name, value in vars(BRIEF).items()]
    out = tmp_path / "found.json"
    asked = ["hybrid", "memory", "nodes", *sizes, *load, "--types=f16,q8_0", f"--work={tmp_path}", f"--out={out}"]
    rows = llama_cpp_speed.run(llama_cpp_speed.parse(asked), Console(quiet=True))
    tests = ("pp8", "tg3", "peak, mapped", "buffer, mapped", "peak, read", "buffer, read")
    found = [(row.precision, row.test) for row in rows]
    assert sorted(found) == sorted((type, test) for type in ("f16", "q8_0") for test in tests)
    for row in rows:
        assert row.ratio and row.wanted and row.bytes and row.baseline_bytes, row.reason
        share = 1 / 1.02 if row.sized else 0.97
        assert row.wanted == pytest.approx((share * row.baseline_bytes / row.bytes) ** (-1 if row.sized else 1))
        if row.test == "buffer, read":
            assert row.figures and row.figures.median == pytest.approx(
                row.bytes, rel=0.15
            )  # told in hundredths of a MiB
    recorded = json.loads(out.read_text())
    assert (
        8.5 < recorded["models"]["hybrid"]["q8_0"]["bits_per_weight"] < 16
    )  # with norms, and ranks that are no whole blocks
    dense, hybrid = (recorded["nodes"][kind] for kind in ("dense", "hybrid"))
    assert dense["MUL_MAT"] == 7 and dense["SWIGLU"] == 1
    assert hybrid["MUL_MAT"] == 7 + 2 + 6 and hybrid["SWIGLU"] == 2  # q and o in two; gate, up and down in three each
    assert not {"CONCAT", "CONT", "CPY"} & hybrid.keys()


def test_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="no benchmark 'speed'"):
        llama_cpp_speed.run(llama_cpp_speed.parse(["speed"]), Console(quiet=True))


def test_an_export_beside_a_copy(tmp_path: Path) -> None:
    """In a process of its own; nothing is left but the checkpoint."""
    checkpoint = write_model(tmp_path / "checkpoint", TINY, {})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = onnx_export.measure(checkpoint, scratch, "fp16", rounds=2)
    assert found["bytes"] > 0 and found["exported_bytes"] >= 2 * TINY.parameters()
    assert len(found["exports"]) == len(found["copies"]) == 2 and found["peak"] > 1e7
    assert not list(scratch.iterdir())
    console = Console(width=100, record=True)
    onnx_export.print_found(found, console)
    assert "resident peak" in console.export_text()


def test_a_failed_export_is_one_line(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint", TINY, {})
    with pytest.raises(UserError, match=r"the export failed: .*fp12"):
        onnx_export.export(checkpoint, tmp_path / "onnx", "fp12")


@pytest.mark.slow
def test_damaged_files_in_llama_cpp(tmp_path: Path, llama_cpp_build: Build) -> None:
    """One of each kind, and the loader goes on after the end of its worker."""
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, hidden=32, ffn=64, layers=3, vocab=288)
    model = export(source, tmp_path / "model.gguf", "f16").path
    loader = fuzz_llama_cpp.Loader(llama_cpp_build.environment(), tmp_path / "log")
    assert loader.outcome(model)[0] == "ran"
    (tmp_path / "work").mkdir()
    outcomes, _ = fuzz_llama_cpp.measured(anatomy(model), len(MUTATIONS), loader, tmp_path / "work")
    assert sum(outcomes.values()) == len(MUTATIONS) and outcomes["refused"] > 0 and outcomes["hung"] == 0
    loader.close()
    assert loader.outcome(model)[0] == "ran"
    loader.close()


def test_a_stack_tells_who_is_to_blame() -> None:
    stack = """    #0 0x7f in __interceptor_memcpy ../../src/libsanitizer/sanitizer_common.inc:827
    #1 0x7f in ggml_abort /x/llama.cpp/ggml/src/ggml.c:250
    #2 0x7f in llama_factors::create(llama_model&, int) /x/llama.cpp/src/llama-factors.cpp:77
    #3 0x7f in main /x/main.cpp:3"""
    assert (
        fuzz_llama_cpp.OURS in stack and fuzz_llama_cpp.blamed(stack) == "llama_factors::create (llama-factors.cpp:77)"
    )
    assert fuzz_llama_cpp.blamed("") == "unknown ()"


def test_kinds_of_parts_are_rounded_alone(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "hybrid", compressed=True)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the birds in the old tree. " * 8)
    rows = factor_bits.measure(checkpoint, str(text), 32, 2, ["q8_0", "q4_0"])
    assert [row["kind"] for row in rows] == ["whole", "prime", "A", "B", "all"] * 2
    sizes = {row["kind"]: row["parameters"] for row in rows[:5]}
    found = open_checkpoint(checkpoint)
    matrices = sum(math.prod(found.shape(n)) for n in found.names() if len(found.shape(n)) == 2 and "embed" not in n)
    assert sum(sizes.values()) == 2 * sizes["all"] == 2 * matrices
    for fine, coarse in zip(rows[:5], rows[5:], strict=True):
        assert 0 < fine["kl"] < coarse["kl"] and fine["bytes"] > coarse["bytes"]


def test_an_adapter_of_full_rank_leaves_nothing_to_round(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the birds in the old tree. " * 8)
    rows = lora_residual.measure(dense, str(text), 32, 2, ["q4_0"], [8, 64])
    found = {(row["way"], row["type"], row["rank"]): row for row in rows}
    plain = found["plain", "q4_0", 0]
    for way in lora_residual.WAYS:
        small, whole = found[way, "q4_0", 8], found[way, "q4_0", 64]
        assert plain["bytes"] < small["bytes"] < whole["bytes"]
        assert whole["kl"] < 1e-3 * plain["kl"]
    assert found["error", "q4_0", 8]["kl"] < plain["kl"]


def test_a_compression_of_the_scaling_benchmark_runs(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", hidden=128, ffn=384, layers=4)
    found = compression.compressed("layers", model, 4, 64, 32, compression.full(64, 32))
    assert found.seconds > 0 and found.peak > 50e6


def test_the_joined_form_is_ours_without_one_insertion(monkeypatch: pytest.MonkeyPatch) -> None:
    every = edits.INSERTIONS
    seen: list[tuple[edits.Insertion, ...]] = []
    monkeypatch.setattr(llama_cpp_speed, "build", lambda **_: seen.append(edits.INSERTIONS))
    llama_cpp_speed._joined()
    (left,) = set(every) - set(seen[0])
    assert left.file == "src/llama-graph.cpp" and edits.INSERTIONS is every
