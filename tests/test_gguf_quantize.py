"""K- and I-quants by llama.cpp's own tool: blocks that fit, importance, pivots, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from layouts import MIXED, checkpoint_with
from llama_cpp_runner import convertible, divergence, llama_cpp_logits, rewritten
from random_models import Shape, layouts_of, write_model
from typer.testing import CliRunner

from exporters.gguf import BLOCKS, Importance, export, llama_quantize
from exporters.gguf.forms import whole_name
from exporters.llama_cpp import Build
from sola_edge.checkpoint import open_checkpoint
from sola_edge.cli import app
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

WIDE: dict[str, Any] = {"hidden": 256, "ffn": 512, "layers": 2}
TEXT = "Words and numbers, " + " ".join(str(n * n) for n in range(3000))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose rows are whole blocks of 256."""
    return tiny_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", **WIDE)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def activations_error(path: Path, build: Build) -> float:
    """What llama.cpp computes from what the file's values say: activations in 8 bits, which these random models enlarge."""
    values = llama_cpp_logits(build, rewritten(path, path.with_name("values.gguf"), lambda _, values: values))
    return divergence(values, llama_cpp_logits(build, path))


def assert_only_activations_differ(path: Path, build: Build) -> None:
    assert activations_error(path, build) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("type", "limit"), [("q6_k", 0.02), ("q4_k_m", 0.1), ("iq4_xs", 0.1), ("iq4_nl", 0.1)])
def test_a_quantized_file_computes_the_model(
    type: str, limit: float, wide: Path, tmp_path: Path, llama_cpp_build: Build
) -> None:
    result = export(wide, tmp_path / "x.gguf", type)
    assert result.fallbacks == () and result.files == (tmp_path / "x.gguf",)
    assert result.bytes == result.path.stat().st_size < export(wide, tmp_path / "f16.gguf").bytes / 2
    assert sum(result.type_counts.values()) == len(types_of(result.path))
    stored = next(t for t in gguf.GGUFReader(result.path).tensors if t.name == "blk.1.ffn_up.weight")
    expected = open_checkpoint(wide).tensor("model.layers.1.mlp.up_proj.weight").numpy()
    error = dequantize(stored.data, stored.tensor_type).reshape(expected.shape) - expected
    assert np.square(error).mean() < limit**2 * np.square(expected).mean()
    assert_only_activations_differ(result.path, llama_cpp_build)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # the F16 file is gone


@pytest.mark.slow
def test_importance_changes_the_rounding_and_is_recorded(wide: Path, text: Path, tmp_path: Path) -> None:
    without = export(wide, tmp_path / "without.gguf", "q2_k").path
    with_it = export(wide, tmp_path / "with.gguf", "q2_k", importance=Importance(str(text), windows=4)).path
    assert without.read_bytes() != with_it.read_bytes()
    keys = gguf.GGUFReader(with_it).fields
    assert keys["quantize.imatrix.chunks_count"].contents() == 4
    assert not any(key.startswith("quantize.imatrix") for key in gguf.GGUFReader(without).fields)


@pytest.mark.slow
def test_rows_that_are_no_whole_blocks_are_named(tmp_path: Path) -> None:
    """A rank of 32 or a hidden size of 64 is no block of 256; the provenance is in the file all the same."""
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True)
    result = export(source, tmp_path / "x.gguf", "q4_k_m")
    columns = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(result.path).tensors if len(t.shape) > 1}
    assert set(result.fallbacks) == {name for name, count in columns.items() if count % 256}
    stored = types_of(result.path)
    assert all("_K" not in stored[name] for name in result.fallbacks)


@pytest.mark.slow
def test_aligned_factors_fall_back_nowhere(tmp_path: Path, llama_cpp_build: Build) -> None:
    """Ranks and prime counts that `--align auto` gives a model of ordinary width."""
    shape = Shape(hidden=1024, ffn=2048, layers=4, heads=8, kv_heads=4, vocab=320, context=128)
    rows = MatrixLayout(1024, 1024, 0, 256)
    layouts = {(i, component): rows for i in range(4) for component in "qo"}
    layouts |= {(i, c): MatrixLayout(1536, 1024, 512, 256) for i in range(4) for c in ("gate", "up")}
    layouts |= {(i, "down"): MatrixLayout(1024, 1536, 512, 256, "in") for i in (0, 2, 3)}
    layouts |= {(1, "down"): MatrixLayout(1024, 1536, 0, 0, "in")}
    source = write_model(tmp_path / "checkpoint", shape, layouts)
    assert layouts_of("dense", shape, 0.3) == {}
    result = export(source, tmp_path / "x.gguf", "q4_k_m")
    assert result.fallbacks == () and not result.stock
    assert set(result.type_counts) == {"F32", "Q4_K", "Q6_K"}
    dense = types_of(export(source, tmp_path / "dense.gguf", "q4_k_m", dense=True).path)
    assert {dense[f"blk.{i}.ffn_down.weight"] for i in range(4)} == {"Q4_K", "Q6_K"}
    for part, kind in types_of(result.path).items():
        assert kind == dense[whole_name(part)], part  # every part has as many bits as the whole would have
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert_only_activations_differ(result.path, llama_cpp_build)


@pytest.mark.slow
def test_matrices_that_phi3_fuses_are_rounded_by_themselves(tmp_path: Path, llama_cpp_build: Build) -> None:
    sizes = {"hidden": 512, "ffn": 1280, "layers": 3, "kv_heads": 4}  # ranks and prime neurons are whole blocks
    source = convertible(tiny_checkpoint(tmp_path / "checkpoint", model_type="phi3", compressed=True, **sizes))
    result = export(source, tmp_path / "x.gguf", "q4_k_m")
    assert result.fallbacks == () and not result.stock
    stored = types_of(result.path)
    assert stored["blk.1.ffn_gate.prime.weight"] == stored["blk.1.attn_q.lr_a.weight"] == "Q4_K"
    more_bits = {name for name, kind in stored.items() if kind == "Q6_K"} - {"token_embd.weight"}
    assert more_bits == {"blk.2.attn_v.weight", "blk.2.ffn_down.weight"}  # as of any model of three layers
    dense = export(source, tmp_path / "dense.gguf", "q4_k_m", dense=True).path
    assert activations_error(result.path, llama_cpp_build) < 3 * activations_error(dense, llama_cpp_build) < 1


@pytest.mark.slow
def test_pivots_are_gone_before_anything_is_rounded(tmp_path: Path) -> None:
    """What the file names as expanded is what a type rounded in Python names too."""
    source = checkpoint_with(tmp_path / "checkpoint", MIXED)
    ours = export(source, tmp_path / "ours.gguf", "q8_0")
    theirs = export(source, tmp_path / "theirs.gguf", "iq4_nl")
    assert any(row.pivot for row in open_checkpoint(source).layout.values())
    assert theirs.expanded == ours.expanded
    assert set(types_of(theirs.path)) == set(types_of(ours.path))


@pytest.mark.slow
def test_a_dense_export_runs_on_any_llama_cpp(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True)
    assert export(source, tmp_path / "x.gguf", "iq4_nl", dense=True).stock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type", "importance", "words"),
    [
        ("iq1_s", None, "llama-quantize cannot make iq1_s: .*importance matrix"),
        ("q4_k_m", "short", "too short|cannot read"),
    ],
)
def test_what_the_tools_refuse_is_one_line(
    type: str, importance: str | None, words: str, wide: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("hello")
    asked = Importance(str(tmp_path / f"{importance}.txt")) if importance else None
    with pytest.raises(UserError, match=words) as error:
        export(wide, tmp_path / "x.gguf", type, importance=asked)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if "short" not in path.name] == []


def test_bad_requests_are_one_line(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not rounded by importance"):
        export(wide, tmp_path / "x.gguf", "q8_0", importance=Importance())
    with pytest.raises(UserError, match="windows 0"):
        replace(Importance(), windows=0)
    with pytest.raises(UserError, match="q4_k_m"):
        export(wide, tmp_path / "x.gguf", "q4_k_x")
    monkeypatch.setattr(llama_quantize, "find", lambda: None)
    for type in BLOCKS:
        with pytest.raises(UserError, match="llama-cpp build"):
            export(wide, tmp_path / "x.gguf", type)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(wide: Path, text: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    arguments = ["export", "gguf", str(wide), str(tmp_path / "x.gguf"), "--type", "Q3_K_M", "--windows", "2"]
    found = CliRunner().invoke(app, [*arguments, "--imatrix", str(text)])
    assert found.exit_code == 0 and "Q3_K" in found.output
    assert CliRunner().invoke(app, arguments).exit_code != 0  # windows of nothing
