"""Gate and up in a hybrid file of Phi-3, of which llama.cpp's own loader has one weight."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp_files import check_adapter, damaged
from llama_cpp_runner import Refused, convertible, llama_cpp_logits, probe

from exporters.gguf import export
from exporters.llama_cpp import Build
from sola_edge.testing import tiny_checkpoint

FFN = 200  # more prime neurons (40) than ranks (32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With factors in layers 1 to 3, and gate and up apart in all."""
    folder = tmp_path_factory.mktemp("fused")
    convertible(tiny_checkpoint(folder / "checkpoint", model_type="phi3", compressed=True, ffn=FFN))
    return export(folder / "checkpoint", folder / "model.gguf", "f32").path


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
def test_a_hybrid_file_has_them_apart_and_a_dense_one_does_not(model: Path, tmp_path: Path) -> None:
    hybrid, dense = shapes(model), shapes(export(model.parent / "checkpoint", tmp_path / "x.gguf", dense=True).path)
    assert hybrid["blk.0.ffn_gate.weight"] == hybrid["blk.0.ffn_up.weight"] == (FFN, 64)
    assert hybrid["blk.1.ffn_gate.prime.weight"] == (40, 64) and hybrid["blk.1.attn_q.lr_a.weight"] == (32, 64)
    assert dense["blk.1.ffn_up.weight"] == (2 * FFN, 64) and dense["blk.1.attn_qkv.weight"] == (128, 64)
    assert not any("ffn_gate" in name or "attn_q." in name for name in dense)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blk.2.ffn_gate.lr_a", "blk.2.ffn_up.prime", "blk.0.ffn_gate", "blk.0.ffn_up"])
@pytest.mark.parametrize("change", ["missing", "a row less", "a column less"])
def test_a_bad_one_is_refused_by_name(
    model: Path, tmp_path: Path, llama_cpp_build: Build, name: str, change: str
) -> None:
    """Without its gate a layer has half of the weight that is asked for, under that weight's name."""
    with pytest.raises(Refused) as error:
        probe(llama_cpp_build, damaged(model, tmp_path / "x.gguf", f"{name}.weight", change))
    named = "blk.0.ffn_" if name == "blk.0.ffn_gate" and change == "missing" else ".".join(name.split(".")[:3])
    assert named in str(error.value)


@pytest.mark.slow
def test_a_saved_model_is_the_model(model: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    saved = tmp_path / "saved.gguf"
    expected = llama_cpp_logits(llama_cpp_build, model, save=str(saved))
    np.testing.assert_array_equal(llama_cpp_logits(llama_cpp_build, saved), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 2])
def test_an_adapter_adds_to_both(model: Path, tmp_path: Path, llama_cpp_build: Build, layer: int) -> None:
    check_adapter(llama_cpp_build, model, {f"blk.{layer}.ffn_up.weight": (2 * FFN, 64)}, FFN, tmp_path)
