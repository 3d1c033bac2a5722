"""Our addition to llama.cpp and its build: the insertions, the cache, and what a model with factors may do there."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp_runner import Refused, llama_cpp_logits, probe, rewritten

from exporters.gguf import export
from exporters.llama_cpp import Build, CompilerMissing, build, edits, find, info, source_tree
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

FILES = {insertion.file for insertion in edits.INSERTIONS}


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
    assert change == "missing file" or insertion.anchor in str(error.value)
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


@pytest.mark.slow
def test_the_addition_fits_the_pinned_source(tmp_path: Path) -> None:
    tree = source_tree() / "vendor" / "llama.cpp"
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / file, tmp_path / file)
    edits.apply(tmp_path)


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with factors, F32."""
    folder = tmp_path_factory.mktemp("factors")
    tiny_checkpoint(folder / "checkpoint", compressed=True)
    return export(folder / "checkpoint", folder / "model.gguf", "f32").path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ffn_gate.prime", "ffn_gate.lr_a", "ffn_down.lr_b", "ffn_down.prime", "attn_q.lr_a", "attn_q.lr_b"]
)
@pytest.mark.parametrize("change", ["missing", "a row less", "a column less", "a row more", "transposed", "one row"])
def test_bad_factors_are_refused_by_name(
    model: Path, tmp_path: Path, llama_cpp_build: Build, name: str, change: str
) -> None:
    wanted = f"blk.2.{name}.weight"

    def damage(found: str, values: np.ndarray) -> np.ndarray | None:
        if found != wanted:
            return values
        damaged = {
            "missing": None,
            "a row less": values[:-1],
            "a column less": values[:, :-1],
            "a row more": np.vstack([values, values[:1]]),
            "transposed": values.T,
            "one row": values[:1],
        }
        return damaged[change]

    path = rewritten(model, tmp_path / "x.gguf", damage)
    with pytest.raises(Refused) as error:
        probe(llama_cpp_build, path)
    matrix = wanted.rsplit(".", 2)[0]
    assert f"{matrix}." in str(error.value), error.value


@pytest.mark.slow
def test_factors_beside_their_dense_matrix_are_refused(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    """The dense matrix is taken, and the file then has more tensors than the model."""
    extra = {"blk.2.ffn_down.weight": np.zeros((64, 160), np.float32)}
    path = rewritten(model, tmp_path / "x.gguf", lambda _, values: values, extra)
    with pytest.raises(Refused, match="wrong number of tensors"):
        probe(llama_cpp_build, path)


@pytest.mark.slow
def test_loading_a_hundred_times_does_not_leak(model: Path, llama_cpp_build: Build) -> None:
    answer = probe(llama_cpp_build, model, loads=100)
    assert answer["growth"] < 3_000_000  # the model alone is 0.9 MB, its vocabulary as much again


@pytest.mark.slow
def test_a_saved_model_is_the_model(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    saved = tmp_path / "saved.gguf"
    expected = llama_cpp_logits(llama_cpp_build, model, save=str(saved))
    np.testing.assert_array_equal(llama_cpp_logits(llama_cpp_build, saved), expected)


def lora_adapter(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """A random rank-4 adapter for weights of these (n_out, n_in)."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, (n_out, n_in) in shapes.items():
        writer.add_tensor(f"{name}.lora_a", rng.normal(size=(4, n_in)).astype(np.float32) / 8)
        writer.add_tensor(f"{name}.lora_b", rng.normal(size=(n_out, 4)).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_lora_adapters_work_on_factored_weights(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    dense = export(model.parent / "checkpoint", tmp_path / "dense.gguf", "f32", dense=True).path
    shapes = {"blk.1.ffn_gate.weight": (160, 64), "blk.2.ffn_down.weight": (64, 160), "blk.2.attn_q.weight": (64, 64)}
    adapter = str(lora_adapter(tmp_path / "lora.gguf", shapes))
    expected = llama_cpp_logits(llama_cpp_build, dense, lora=adapter)
    found = llama_cpp_logits(llama_cpp_build, model, lora=adapter)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(expected - llama_cpp_logits(llama_cpp_build, dense)).max() > 0.1
