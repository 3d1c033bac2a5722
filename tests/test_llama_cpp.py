"""Our addition to llama.cpp and its build: the insertions, the cache, and what a model with factors may do there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from layouts import HIDDEN, MIXED, NEURONS, checkpoint_with
from llama_cpp_files import DAMAGES, check_adapter, damaged
from llama_cpp_runner import Refused, llama_cpp_logits, probe, rewritten

from exporters.gguf import export
from exporters.llama_cpp import Build, CompilerMissing, build, edits, find, info, source, source_tree
from runtime_checks.runtimes import RUNTIMES
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

FILES = {insertion.file for insertion in edits.INSERTIONS}
HEADERS = ("src", "include", "ggml/include")


def skeleton(folder: Path) -> Path:
    """A source folder with nothing but the anchors, in the table's order."""
    (folder / "src").mkdir(parents=True)
    for file in FILES:
        anchors = dict.fromkeys(i.anchor for i in edits.INSERTIONS if i.file == file)
        (folder / file).write_text("// start\n" + "// next\n".join(anchors) + "\n// end\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_every_insertion_is_beside_its_anchor_and_nothing_else_changes(tmp_path: Path) -> None:
    folder = skeleton(tmp_path)
    before = contents(folder)
    edits.apply(folder)
    after = contents(folder)
    for file in FILES:
        text = after[file]
        for insertion in (i for i in edits.INSERTIONS if i.file == file):
            pair = (insertion.text, insertion.anchor)
            joined = "".join(pair if insertion.where == "before" else pair[::-1])
            assert text.count(joined) == 1
            text = text.replace(joined, insertion.anchor)
        assert text == before[file]
    assert set(after) - set(before) == {f"src/{name}" for name in edits.OUR_FILES}


@pytest.mark.parametrize("change", ["removed", "doubled", "missing file"])
def test_a_changed_source_is_refused_untouched(tmp_path: Path, change: str) -> None:
    folder, insertion = skeleton(tmp_path), edits.INSERTIONS[-1]
    path = folder / insertion.file
    if change == "missing file":
        path.unlink()
    else:
        path.write_text(path.read_text().replace(insertion.anchor, insertion.anchor * 2 if change == "doubled" else ""))
    before = contents(folder)
    with pytest.raises(UserError) as error:
        edits.apply(folder)
    assert insertion.file in str(error.value)
    assert change == "missing file" or insertion.anchor.strip() in str(error.value)
    assert contents(folder) == before


def test_the_addition_is_not_applied_twice(tmp_path: Path) -> None:
    edits.apply(skeleton(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UserError):
        edits.apply(tmp_path)
    assert contents(tmp_path) == before


def test_no_compiler_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CompilerMissing, match=r"no C\+\+ compiler"):
        build()


def test_only_a_finished_build_of_this_addition_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path))
    assert find() is None and not info()["built"]
    other = tmp_path / "llama-cpp" / "build-other"
    (other / "bin").mkdir(parents=True)
    assert find() is None  # no manifest: interrupted
    (other / "build.json").write_text(json.dumps({"version": "0.0.1", "addition": edits.fingerprint()}))
    assert find() is None  # another version
    manifest = sys.modules["exporters.llama_cpp.build"]._manifest(())
    (other / "build.json").write_text(json.dumps(manifest | {"targets": ["llama"]}))
    assert find() is None  # without tools
    (other / "build.json").write_text(json.dumps(manifest))
    assert find() == Build(other)


def test_a_checkout_of_ones_own_is_built_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each state of it; the pinned version's build is not taken for it, nor it for the pinned one's."""
    compiled: list[Path] = []

    def compile_(patched: Path, work: Path, cmake_args: list[str], jobs: int, targets: tuple[str, ...]) -> None:
        compiled.append(patched)
        assert all((patched / "src" / name).is_file() for name in edits.OUR_FILES)
        assert not (patched / ".git").exists() and not (patched / "build-old").exists()
        assert "-DGGML_VULKAN=ON" in cmake_args
        (work / "build" / "bin").mkdir(parents=True)

    monkeypatch.setattr(sys.modules["exporters.llama_cpp.build"], "_compile", compile_)
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path / "cache"))
    checkout = skeleton(tmp_path / "checkout")
    for name in (".git", "build-old"):
        (checkout / name).mkdir()
    before = contents(checkout)
    first = build(cmake_args=("-DGGML_VULKAN=ON",), checkout=checkout)
    assert first.manifest()["version"] == "own" and not first.python.exists()
    assert build(cmake_args=("-DGGML_VULKAN=ON",), checkout=checkout) == first and len(compiled) == 1
    assert contents(checkout) == before and find() is None
    (checkout / "src" / "new.cpp").write_text("int x;")
    assert build(cmake_args=("-DGGML_VULKAN=ON",), checkout=checkout) != first and len(compiled) == 2


def test_a_stock_build_has_no_addition_and_is_used_only_when_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(patched: Path, work: Path, cmake_args: list[str], jobs: int, targets: tuple[str, ...]) -> None:
        assert not any((patched / "src" / name).exists() for name in edits.OUR_FILES)
        (work / "build" / "bin").mkdir(parents=True)

    monkeypatch.setattr(sys.modules["exporters.llama_cpp.build"], "_compile", compile_)
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path / "cache"))
    stock = build(checkout=skeleton(tmp_path / "checkout"), addition=False)
    assert stock.manifest()["addition"] is None and find() is None
    monkeypatch.setenv("SOLA_EDGE_LLAMA_CPP", str(stock.folder))
    assert find() == stock
    missing = RUNTIMES["llama.cpp"].missing()
    assert missing is not None and "no Python bindings" in missing
    monkeypatch.setenv("SOLA_EDGE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match=r"is no build of `sola-edge llama-cpp build`"):
        find()


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no llama\.cpp checkout"):
        build(checkout=tmp_path / "empty")


@pytest.mark.slow
def test_the_addition_fits_the_pinned_source(tmp_path: Path) -> None:
    tree = source_tree() / "vendor" / "llama.cpp"
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / file, tmp_path / file)
    edits.apply(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", source.EARLIER)
def test_the_addition_fits_earlier_releases(tmp_path: Path, version: str) -> None:
    """What it calls is there too: the files that have it are compiled, as far as their meaning goes."""
    root = f"llama_cpp_python-{version}/vendor/llama.cpp"
    with tarfile.open(source.sdist(version, source.EARLIER[version])) as archive:
        wanted = [m for m in archive if m.name.startswith(tuple(f"{root}/{name}/" for name in HEADERS))]
        archive.extractall(tmp_path, wanted, filter="data")
    edits.apply(tmp_path / root)
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", *(f"-I{name}" for name in HEADERS)]
    for file in sorted({*FILES, *(f"src/{name}" for name in edits.OUR_FILES)}):
        if file.endswith(".cpp"):
            done = subprocess.run([*compiler, file], cwd=tmp_path / root, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.slow
def test_a_second_build_builds_nothing(llama_cpp_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # nor needs a compiler
    assert build() == llama_cpp_build
    assert find() is not None
    for name in (
        "llama-perplexity",
        "llama-bench",
        "llama-quantize",
        "llama-completion",
        "llama-imatrix",
        "llama-server",
    ):
        assert llama_cpp_build.tool(name).is_file()
    with pytest.raises(KeyError):
        llama_cpp_build.tool("llama-nothing")
    assert llama_cpp_build.converter.is_file()


FFN = 200  # so that there are more prime neurons (40) than ranks (32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with factors, F32."""
    folder = tmp_path_factory.mktemp("factors")
    tiny_checkpoint(folder / "checkpoint", compressed=True, ffn=FFN)
    return export(folder / "checkpoint", folder / "model.gguf", "f32").path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with every layout, F32."""
    folder = tmp_path_factory.mktemp("mixed")
    checkpoint_with(folder / "checkpoint", MIXED)
    return export(folder / "checkpoint", folder / "model.gguf", "f32").path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ffn_gate.prime", "ffn_gate.lr_a", "ffn_down.lr_b", "ffn_down.prime", "attn_q.lr_a", "attn_q.lr_b"]
)
@pytest.mark.parametrize("change", DAMAGES)
def test_bad_factors_are_refused_by_name(
    model: Path, tmp_path: Path, llama_cpp_build: Build, name: str, change: str
) -> None:
    with pytest.raises(Refused) as error:
        probe(llama_cpp_build, damaged(model, tmp_path / "x.gguf", f"blk.2.{name}.weight", change))
    matrix = name.rsplit(".", 1)[0]
    assert f"blk.2.{matrix}." in str(error.value), error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("blk.1.ffn_gate.prime", "blk.1.ffn_down.prime"),  # whole
        *("blk.3.ffn_gate.lr_a", "blk.3.attn_output.lr_b", "blk.4.ffn_gate.lr_b"),  # pivoted
        *("blk.4.ffn_up.prime", "blk.4.ffn_down.lr_a"),
    ],
)
@pytest.mark.parametrize("change", DAMAGES)
def test_tensors_of_a_narrower_layer_must_agree(
    mixed: Path, tmp_path: Path, llama_cpp_build: Build, name: str, change: str
) -> None:
    with pytest.raises(Refused) as error:
        probe(llama_cpp_build, damaged(mixed, tmp_path / "x.gguf", f"{name}.weight", change))
    assert re.search(
        rf"tensor '{name[:6]}[a-z_.]+' (has wrong shape|not found)|missing tensor '{name[:6]}", str(error.value)
    )


@pytest.mark.slow
def test_a_bias_of_a_narrower_layer_must_agree(mixed: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    path = damaged(mixed, tmp_path / "x.gguf", "blk.1.ffn_up.bias", "a row less")
    with pytest.raises(
        Refused, match=r"'blk\.1\.ffn_up\.bias' has wrong shape.*ffn_down\.weight the layer has 104 of 160"
    ):
        probe(llama_cpp_build, path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [104, NEURONS])
def test_an_ordinary_matrix_fits_a_narrower_layer_if_it_is_as_wide(
    mixed: Path, tmp_path: Path, llama_cpp_build: Build, width: int
) -> None:
    reader = gguf.GGUFReader(mixed)
    prime = next(np.array(tensor.data) for tensor in reader.tensors if tensor.name == "blk.1.ffn_gate.prime.weight")
    without = damaged(mixed, tmp_path / "without.gguf", "blk.1.ffn_gate.prime.weight", "missing")
    extra = {"blk.1.ffn_gate.weight": np.resize(prime, (width, HIDDEN))}
    path = rewritten(without, tmp_path / "x.gguf", lambda _, values: values, extra)
    if width == NEURONS:
        with pytest.raises(Refused, match=r"'blk\.1\.ffn_gate\.weight' has wrong shape"):
            probe(llama_cpp_build, path)
    else:
        expected = llama_cpp_logits(llama_cpp_build, mixed)
        np.testing.assert_array_equal(llama_cpp_logits(llama_cpp_build, path), expected)


@pytest.mark.slow
def test_factors_beside_their_dense_matrix_are_refused(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    """The dense matrix is taken, and the file then has more tensors than the model."""
    extra = {"blk.2.ffn_down.weight": np.zeros((64, FFN), np.float32)}
    path = rewritten(model, tmp_path / "x.gguf", lambda _, values: values, extra)
    with pytest.raises(Refused, match="wrong number of tensors"):
        probe(llama_cpp_build, path)


@pytest.mark.slow
def test_loading_a_hundred_times_does_not_leak(model: Path, llama_cpp_build: Build) -> None:
    answer = probe(llama_cpp_build, model, loads=100)
    assert answer["growth"] < 3_000_000  # the model alone is 0.9 MB, its vocabulary as much again


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "mixed"])
def test_a_saved_model_is_the_model(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, llama_cpp_build: Build
) -> None:
    model, saved = request.getfixturevalue(kind), tmp_path / "saved.gguf"
    expected = llama_cpp_logits(llama_cpp_build, model, save=str(saved))
    np.testing.assert_array_equal(llama_cpp_logits(llama_cpp_build, saved), expected)


@pytest.mark.slow
def test_lora_adapters_work_on_factored_weights(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    shapes = {"blk.1.ffn_gate.weight": (FFN, 64), "blk.2.ffn_down.weight": (64, FFN), "blk.2.attn_q.weight": (64, 64)}
    check_adapter(llama_cpp_build, model, shapes, FFN, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_out", "n_in"),
    [("blk.1.ffn_down", HIDDEN, 104), ("blk.4.ffn_down", HIDDEN, 80), ("blk.5.ffn_gate", NEURONS, HIDDEN)],
)
def test_lora_adapters_work_on_narrower_and_pivoted_weights(
    mixed: Path, tmp_path: Path, llama_cpp_build: Build, name: str, n_out: int, n_in: int
) -> None:
    check_adapter(llama_cpp_build, mixed, {f"{name}.weight": (n_out, n_in)}, NEURONS, tmp_path)
