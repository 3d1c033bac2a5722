"""Runtime checks: hand-worked figures, tolerances that fail when they should, the protocol, the child processes."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime_checks import bench, check_parity, measure_models, measure_perplexity
from runtime_checks.artefacts import open_artefact
from runtime_checks.generation import Continuation, compare, first_difference
from runtime_checks.machine import checked_threads, physical_cores
from runtime_checks.metrics import compare_window, window_nll
from runtime_checks.parity import TOLERANCES, judge, tolerance_for
from runtime_checks.perplexity import mean_and_error, perplexity
from runtime_checks.process import CheckError, Child
from runtime_checks.protocol import make_protocol, read_text
from runtime_checks.reference import check_space
from runtime_checks.runtimes import RUNTIMES, RuntimeRow, torch_
from runtime_checks.schema import Speed
from runtime_checks.throughput import interleave, random_prompt
from sola_edge.errors import UserError
from sola_edge.testing import byte_tokenizer, tiny_checkpoint
from sola_edge.texts import load_text

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while.\n" * 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checks") / "tiny", compressed=True)


def logits_of(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


# --- hand-worked figures ---------------------------------------------------------------------------------------------


def test_nll_is_minus_log_probability_of_the_next_token() -> None:
    logits = logits_of([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]) + 7  # a shift changes nothing
    nll = window_nll(logits, np.array([2, 1, 0]))
    assert nll == pytest.approx([-math.log(0.25), -math.log(0.1)], rel=1e-6)


def test_pytorchs_nll_is_what_its_logits_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, and NaN where a logit of the position is not finite; the last position scores nothing."""
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0))
    logits[7, 3], logits[300], logits[-1] = math.inf, math.nan, math.nan
    runtime = object.__new__(torch_.Runtime)
    monkeypatch.setattr(runtime, "_logits", lambda ids: logits)
    ids = torch.randint(50, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    found = runtime.nll(ids)
    np.testing.assert_allclose(found, window_nll(logits.numpy(), np.array(ids)), rtol=1e-12)
    assert np.flatnonzero(np.isnan(found)).tolist() == [7, 300]


def test_perplexity_and_its_standard_error_by_hand() -> None:
    # Two windows with means ln 2 and ln 8: mean ln 4, standard deviation ln 2 * sqrt 2, error of the mean ln 2.
    found = perplexity([np.full(3, math.log(2)), np.full(3, math.log(8))])
    assert found.value == pytest.approx(4)
    assert found.standard_error == pytest.approx(4 * math.log(2))
    assert (found.tokens, found.nonfinite) == (6, 0)


def test_one_window_takes_its_error_over_tokens() -> None:
    mean, error = mean_and_error([np.array([1.0, 3.0])])
    assert mean == 2 and error == pytest.approx(1)


def test_kl_divergence_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    found = compare_window(logits_of([p, p]), logits_of([q, q]), np.array([0, 1]))
    assert found.kl == pytest.approx([0.25 * math.log(2)], rel=1e-6)  # 0.5 ln 2 - 0.25 ln 2
    assert not found.same_top1[0]
    assert found.logit_difference == pytest.approx([math.log(2)], rel=1e-6)
    assert (found.nll_reference[0], found.nll_candidate[0]) == pytest.approx((math.log(4), math.log(2)), rel=1e-6)


def test_kl_of_equal_logits_is_zero_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 50)).astype(np.float32) * 10
    found = compare_window(logits, logits, rng.integers(0, 50, 9))
    assert (found.kl == 0).all() and found.same_top1.all() and found.kl.shape == (8,)


# --- tolerances fail when they should --------------------------------------------------------------------------------


def compared(change: float, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(3):
        reference = rng.normal(size=(64, 200)).astype(np.float32) * 3
        candidate = reference + change * rng.normal(size=reference.shape).astype(np.float32)
        found.append(compare_window(reference, candidate, rng.integers(0, 200, 64)))
    return found


@pytest.mark.parametrize(("change", "precision", "passes"), [
    (0.0, "fp32", True), (1e-5, "fp32", True), (1e-2, "fp32", False), (1e-3, "f16", True), (0.1, "f16", False),
])  # fmt: skip
def test_perturbed_logits_are_judged_by_precision(change: float, precision: str, passes: bool) -> None:
    found = judge(compared(change), tolerance_for(precision), "reference", "torch")
    assert found.passed is passes
    assert bool(found.reasons) is not passes
    if not passes:
        assert "mean KL" in found.reasons[0] and "window 1" in found.reasons[0]


def test_top1_and_perplexity_have_limits_of_their_own() -> None:
    reference = logits_of([[0.5, 0.3, 0.2]] * 40)
    swapped = logits_of([[0.3, 0.5, 0.2]] * 40)
    found = judge([compare_window(reference, swapped, np.zeros(40, dtype=int))], tolerance_for("f16"), "r", "torch")
    assert found.top1 == 0 and len(found.reasons) == 3
    assert found.ppl_change_percent == pytest.approx(100 * (0.5 / 0.3 - 1), rel=1e-5)


def test_finer_precisions_have_tighter_tolerances() -> None:
    order = [tolerance_for(name) for name in ("f32", "f16", "q8_0", "q6_k", "q4_k")]
    assert [t.kl_mean for t in order] == sorted(t.kl_mean for t in order)
    assert [t.top1 for t in order] == sorted((t.top1 for t in order), reverse=True)
    assert tolerance_for("fp32") == TOLERANCES["f32"]


def test_nonfinite_logits_are_counted_and_fail() -> None:
    logits = logits_of([[0.5, 0.5]] * 5)
    broken = logits.copy()
    broken[1, 0] = np.nan
    broken[3, 1] = np.inf
    broken[4, 1] = np.inf  # the last row scores nothing
    ids = np.zeros(5, dtype=int)
    found = compare_window(logits, broken, ids)
    assert found.nonfinite == 2
    parity = judge([compare_window(logits, logits, ids), found], tolerance_for("q4_k"), "r", "torch")
    assert not parity.passed and parity.kl_mean is None
    assert parity.reasons == ["2 positions have non-finite logits, the first in window 2"]
    score = perplexity([window_nll(broken, ids)])
    assert (score.value, score.nonfinite) == (None, 2)


# --- continuations ---------------------------------------------------------------------------------------------------


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_a_different_token_passes_only_where_rounding_explains_it() -> None:
    steps = np.array([[0, 9, 0], [0, 1.0, 0.9]], dtype=np.float32)
    reference = Continuation([1, 1], steps)

    def judged(precision: str, allowed: float | None, ids: list[int]) -> bool | None:
        return compare("p", "t", ids, reference, precision, allowed).passed

    assert judged("fp32", 1.0, [1, 1]) is True
    assert judged("fp32", 1.0, [1, 2]) is False
    assert judged("f16", 0.2, [1, 2]) is True
    assert judged("f16", 0.05, [1, 2]) is False
    assert judged("f16", None, [1, 2]) is None
    assert judged("q8_0", 0.2, [1]) is False  # it stopped where PyTorch went on


# --- protocol --------------------------------------------------------------------------------------------------------


def test_protocol_adds_no_bos_keeps_line_endings_and_cuts_windows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab\r\ncd\nef")
    assert read_text(path) == ("text.txt", "ab\r\ncd\nef")
    protocol = make_protocol(path, tokenizer, 4, None)
    assert protocol.ids.shape == (2, 4) and protocol.tokens_scored == 6 and protocol.stride == 4 and not protocol.bos
    assert tokenizer.bos_token_id not in protocol.ids
    assert tokenizer.decode(protocol.ids.ravel()) == "ab\r\ncd\ne"
    path.write_bytes(b"ab\ncd\nef")
    assert make_protocol(path, tokenizer, 4, 2).ids_sha256 != protocol.ids_sha256


def test_protocol_of_some_windows_is_that_of_the_whole_text_cut_short() -> None:
    tokenizer = byte_tokenizer()
    some, whole = make_protocol(TEXT, tokenizer, 16, 2), make_protocol(TEXT, tokenizer, 16, None)
    assert (some.ids == whole.ids[:2]).all() and some.text_sha256 == whole.text_sha256
    assert some.record().model_dump()["tokens_scored"] == 30


@pytest.mark.parametrize(("text", "context", "windows", "says"), [
    ("", 8, 1, "empty"), (" \n", 8, 1, "empty"), ("abc", 8, 1, "too short"), ("abcdefghij", 5, 3, "too short"),
    ("abc", 1, 1, "context 1"), ("abc", 2, 0, "windows 0"), (Path("/nowhere/text"), 8, 1, "no such text file"),
])  # fmt: skip
def test_protocol_refuses(text: str | Path, context: int, windows: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_protocol(text, byte_tokenizer(), context, windows)


# --- artefacts, sizes, threads ---------------------------------------------------------------------------------------


def test_artefacts_are_recognised_or_refused(tiny: Path, tmp_path: Path) -> None:
    found = open_artefact(tiny)
    assert (found.kind, found.precision) == ("checkpoint", "fp32")
    assert found.expected_bytes(10) == 40
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "cut.gguf", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=path.name):
            open_artefact(path)


def test_too_little_disk_space_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer or shorter windows"):
        check_space(tmp_path, 1 << 60)


def test_threads_never_exceed_the_cores() -> None:
    assert checked_threads(None) == checked_threads(10_000) == physical_cores()
    assert checked_threads(1) == 1


# --- speed -----------------------------------------------------------------------------------------------------------


def test_members_take_turns_and_a_failing_one_is_reported() -> None:
    calls: list[str] = []

    def member(name: str, seconds: float) -> tuple[float, float]:
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise CheckError("b broke")
        return seconds, 2 * seconds

    members = {"a": lambda _: member("a", 0.5), "b": lambda _: member("b", 1.0), "c": lambda _: member("c", 2.0)}
    found, failed = interleave(members, 3, 100, 10, 1, "test", "turns")
    assert calls == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert failed == {"b": "b broke"} and set(found) == {"a", "c"}
    assert found["a"].prefill.median == 200 and found["a"].decode.median == 10 and found["a"].rounds == 3


def test_speed_summary_by_hand() -> None:
    speed = Speed.of("pp8", 8, [3.0, 1.0, 2.0])
    assert (speed.median, speed.minimum, speed.maximum) == (2, 1, 3)
    assert random_prompt(5, 100) == random_prompt(5, 100)


# --- child processes -------------------------------------------------------------------------------------------------


def fake_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> RuntimeRow:
    """A row whose runtime is a module of the test's own."""
    package = folder / "fakes"
    package.mkdir()
    base = "class Runtime:\n    version = 'fake'\n    def __init__(self, *a): pass\n    def load(self): pass\n"
    (package / "sitecustomize.py").write_text(
        "import sys, importlib.util as u\n"
        f"s = u.spec_from_file_location('runtime_checks.runtimes.fake', {str(package / 'fake.py')!r})\n"
        "m = u.module_from_spec(s); sys.modules[s.name] = m; s.loader.exec_module(m)\n"
    )
    (package / "fake.py").write_text("import os, sys\n" + base + body)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), *sys.path]))
    return RuntimeRow("fake", "fake", "checkpoint", lambda: None)


def test_a_killed_child_gives_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "    def logits(self, ids):\n        print('the last words', file=sys.stderr); os.kill(os.getpid(), 9)\n"
    row = fake_runtime(tmp_path, monkeypatch, body)
    with Child(row, tmp_path, 1, 8) as child, pytest.raises(CheckError, match=r"fake on .*SIGKILL.*the last words"):
        child.ask("nll", ids=[1, 2])


def test_an_error_in_a_child_names_runtime_and_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = fake_runtime(tmp_path, monkeypatch, "    def logits(self, ids):\n        raise ValueError('bad\\nlines')\n")
    with Child(row, tmp_path, 1, 8) as child:
        with pytest.raises(CheckError, match=r"^fake on .*: nll failed: ValueError: bad$"):
            child.ask("nll", ids=[1, 2])
        assert child.loaded["version"] == "fake"


def test_a_library_that_prints_does_not_disturb_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = fake_runtime(
        tmp_path,
        monkeypatch,
        "    def logits(self, ids):\n"
        "        import numpy as np; print('noise'); os.system('echo more noise')\n"
        "        return np.zeros((len(ids), 4), np.float32)\n",
    )
    with Child(row, tmp_path, 1, 8) as child:
        assert child.ask("nll", ids=[1, 2, 3])["nll"] == pytest.approx([math.log(4)] * 2)


def test_memory_of_a_child_is_its_own_and_not_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = np.ones(200_000_000, dtype=np.uint8)  # a parent with 200 MB
    body = (
        "    def reset(self): pass\n    def prefill(self, ids): self.x = bytearray(b'x') * (64 << 20)\n"
        "    def decode(self, n): pass\n    def parts(self): return {}\n"
    )
    row = fake_runtime(tmp_path, monkeypatch, body)
    with Child(row, tmp_path, 1, 8) as child:
        used = child.ask("use", prompt=[1], decode=1)
        grown = used["peak"] - child.loaded["after_load"]
    assert 60 << 20 < grown < 80 << 20
    assert used["peak"] < 190e6 < ballast.nbytes


def test_an_onnxruntime_child_imports_no_torch() -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys, runtime_checks.child, runtime_checks.runtimes.onnxruntime_\n"
        "found = {'torch', 'transformers', 'pydantic', 'sola_edge'} & set(sys.modules); assert not found, found"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# --- whole checks on a tiny model ------------------------------------------------------------------------------------


def test_torch_parity_of_a_checkpoint_with_itself_is_exact(tiny: Path) -> None:
    report = check_parity(tiny, [tiny], TEXT, context=32, windows=2, threads=1)
    reference, same = report.results
    assert report.passed and same.parity is not None and same.parity.passed
    assert same.parity.kl_max == 0 and same.parity.top1 == 1 and same.parity.max_logit_difference == 0
    assert reference.perplexity == same.perplexity
    alone = measure_perplexity(tiny, TEXT, context=32, windows=2, threads=1)
    assert alone.results[0].perplexity == reference.perplexity


def test_one_scaled_weight_fails_parity(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith("v_proj.weight"))
    weights[name] = weights[name] * 1.01
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    report = check_parity(tiny, [broken], TEXT, context=32, windows=2, threads=1)
    assert not report.passed and "mean KL" in report.results[1].reasons[0]


def test_parity_refuses_bad_input(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        check_parity(tiny, [tmp_path / "missing"], TEXT, context=32, windows=1)
    with pytest.raises(UserError, match="too short"):
        check_parity(tiny, [tiny], "short", context=32, windows=1)
    with pytest.raises(UserError, match="rounds 0"):
        bench([tiny], rounds=0)
    with pytest.raises(UserError, match="checkpoint folder"):
        measure_models({"dense": []}, TEXT)


@pytest.fixture(scope="module")
def onnx_folder(tiny: Path) -> Path:
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("exporters.onnx").export(tiny, tiny.parent / "onnx")
    return tiny.parent / "onnx"


def test_two_models_in_torch_and_onnx_make_one_report(tiny: Path, onnx_folder: Path) -> None:
    models = {"dense": [tiny, onnx_folder], "again": [tiny, onnx_folder]}
    sizes = {"context": 32, "windows": 2, "prompt": 16, "generate": 4, "rounds": 2, "continuation": 8}
    report = measure_models(models, TEXT, **sizes, threads=1, skipped=[("f16.gguf", "no C++ compiler was found")])
    assert report.passed, [r.reasons for r in report.results]
    assert {r.runtime for r in report.results} == {"torch", "onnxruntime", "onnxruntime-genai"}
    for result in report.results:
        assert result.throughput is not None and result.throughput.rounds == 2
        assert result.memory is not None and result.memory.baseline < result.memory.peak
        assert result.generation is not None and result.perplexity is not None
    assert len(report.costs) == 3 and all(c.perplexity_ratio == pytest.approx(1) for c in report.costs)
    assert report.skipped[0].reason == "no C++ compiler was found"
    assert report.models[0].explained and report.models[0].parameters


def test_an_onnx_graph_with_one_weight_scaled_fails(tiny: Path, onnx_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "onnx"
    shutil.copytree(onnx_folder, broken)
    data = next(broken.glob("*.data"))
    values = np.fromfile(data, dtype=np.float32)
    values[len(values) // 2 : len(values) // 2 + 2048] *= 1.05
    values.tofile(data)
    report = check_parity(tiny, [broken], TEXT, context=32, windows=2, threads=1)
    assert not report.passed
    assert [r.runtime for r in report.results if not r.passed] == ["onnxruntime", "onnxruntime-genai"]


def test_a_runtime_that_cannot_load_is_a_failed_result(tiny: Path, onnx_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "onnx"
    shutil.copytree(onnx_folder, broken)
    next(broken.glob("*.data")).unlink()
    report = check_parity(tiny, [broken], TEXT, context=32, windows=1, threads=1)
    assert not report.passed
    assert all("load failed" in r.reasons[0] and r.runtime in r.reasons[0] for r in report.results[1:])


def test_every_runtime_has_a_module_and_a_class() -> None:
    import importlib.util

    for row in RUNTIMES.values():
        assert importlib.util.find_spec(f"runtime_checks.runtimes.{row.module}")


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_files(tiny: Path, llama_cpp_build: object) -> dict[str, Path]:
    from exporters.gguf import export

    files = {kind: tiny.parent / f"{kind}.gguf" for kind in ("f32", "f16")}
    for kind, path in files.items():
        export(tiny, path, type=kind)
    return files


@pytest.mark.slow
def test_llama_cpp_computes_what_pytorch_computes(tiny: Path, gguf_files: dict[str, Path]) -> None:
    report = check_parity(tiny, [gguf_files["f32"]], TEXT, context=64, windows=2)
    found = report.results[1]
    assert found.runtime == "llama.cpp" and found.precision == "f32"
    assert found.parity is not None and found.parity.kl_mean is not None
    assert report.passed and found.parity.kl_mean < 1e-8, found.parity


@pytest.mark.slow
def test_a_gguf_type_is_read_from_the_file_not_from_its_name(gguf_files: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copy(gguf_files["f16"], tmp_path / "model-f32.gguf")
    assert open_artefact(tmp_path / "model-f32.gguf").precision == "f16"


@pytest.mark.slow
def test_llama_bench_and_memory(tiny: Path, gguf_files: dict[str, Path]) -> None:
    report = bench([gguf_files["f16"]], gguf_files["f32"], prompt=64, generate=8, rounds=2)
    assert report.passed and len(report.costs) == 1 and report.costs[0].bytes_ratio < 0.6
    for result in report.results:
        assert result.throughput is not None and result.throughput.tool == "llama-bench"
        assert result.memory is not None and result.memory.parts["weights"] > 0 and result.memory.parts["kv"] > 0


@pytest.mark.slow
def test_a_broken_gguf_is_a_failed_result_with_llama_cpps_own_line(
    tiny: Path, gguf_files: dict[str, Path], tmp_path: Path
) -> None:
    whole = gguf_files["f16"].read_bytes()
    (tmp_path / "swapped.gguf").write_bytes(whole.replace(b"blk.1.ffn_gate.lr_a.weight", b"blk.1.ffn_gate.lr_z.weight"))
    report = check_parity(tiny, [tmp_path / "swapped.gguf"], TEXT, context=64, windows=1)
    assert not report.passed and "load failed" in report.results[1].reasons[0]
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        check_parity(tiny, [tmp_path / "cut.gguf"], TEXT, context=64, windows=1)


@pytest.mark.slow
def test_compressed_smollm2_is_the_same_in_every_runtime(
    smollm2_compressed: Path, llama_cpp_build: object, tmp_path: Path
) -> None:
    """What the product promises: one model, four runtimes, the same figures on the same ids."""
    from exporters.gguf import export as export_gguf
    from exporters.onnx import export as export_onnx

    paths = [smollm2_compressed, tmp_path / "onnx", tmp_path / "f16.gguf", tmp_path / "q8_0.gguf"]
    export_onnx(smollm2_compressed, paths[1])
    export_gguf(smollm2_compressed, paths[2], type="f16")
    export_gguf(smollm2_compressed, paths[3], type="q8_0")
    sizes = {"context": 256, "windows": 4, "prompt": 64, "generate": 8, "rounds": 1, "continuation": 64}
    report = measure_models({"compressed": paths}, load_text("python-reference").joined, **sizes)
    assert report.passed, [r.reasons for r in report.results]
    found = {(r.runtime, r.precision): r for r in report.results}
    reference = found["torch", "fp32"].perplexity
    for key, change in (
        (("onnxruntime", "fp32"), 1e-3),
        (("onnxruntime-genai", "fp32"), 1e-3),
        (("llama.cpp", "f16"), 1e-3),
    ):
        ppl = found[key].perplexity
        assert ppl is not None and reference is not None and ppl.value == pytest.approx(reference.value, rel=change)
    assert found["onnxruntime-genai", "fp32"].generation.first_difference is None  # type: ignore[union-attr]
    for result in report.results:
        if result.kind == "gguf":
            assert result.expected_bytes is not None and result.bytes / result.expected_bytes < 1.03
