"""What llama.cpp would compute otherwise than the checkpoint asks is refused, or said in the result."""

from pathlib import Path
from typing import Any

import pytest
from layouts import NARROW, checkpoint_with, with_biases

from exporters.gguf.forms import choose_form
from exporters.gguf.rows import ROWS, check_biases, check_computed, ignored_window, sliding_period
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

GEMMA2 = {"model_type": "gemma2", "query_pre_attn_scalar": 32}
GEMMA3 = {"model_type": "gemma3_text", "query_pre_attn_scalar": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scale of scores": ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 24}, r"by another number than 32\^-0\.5"),
    "scale of the large model": ("gemma2", {**GEMMA2, "layers": 46}, r"by another number than 16\^-0\.5"),
    "head of its own": ("gemma2", {**GEMMA2, "tied": False}, "its head is not the embedding"),
    "no caps": ("gemma2", {**GEMMA2, "attn_logit_softcapping": None}, "no caps"),
    "mixture": (
        "gemma3",
        {
            **GEMMA3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] + ["full_attention"] * 2,
        },
        "not every n-th one",
    ),
    "activation": ("qwen3", {"model_type": "qwen3", "hidden_act": "gelu"}, "activation 'gelu' instead of 'silu'"),
    "rope": ("llama", {"rope_scaling": DYNAMIC}, "RoPE scaling 'dynamic'"),
    "rope of another": ("qwen2", {"model_type": "qwen2", "rope_scaling": LLAMA3}, "RoPE scaling 'llama3'"),
    "unknown name": ("gpt2", {}, "the architecture 'gpt2' is not known"),
}


def tiny(folder: Path, **values: Any) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(folder, **values))


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    architecture, values, message = REFUSED[case]
    checkpoint = tiny(tmp_path / "model", **values)
    with pytest.raises(
        UserError, match=rf"model: llama\.cpp cannot compute this .*{message}.*with transformers"
    ) as raised:
        check_computed(checkpoint, architecture)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("architecture", "values"), [("gemma2", GEMMA2), ("gemma3", GEMMA3), ("llama", {})])
def test_what_it_computes_is_not(architecture: str, values: dict[str, Any], tmp_path: Path) -> None:
    check_computed(tiny(tmp_path / "model", **values), architecture)


def test_a_bias_that_would_not_be_loaded_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", model_type="qwen3", attention_bias=True)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.o_proj has a bias.* 'qwen3'; export to ONNX"):
        check_biases(checkpoint, "qwen3")


@pytest.mark.parametrize(
    ("values", "period"),
    [
        ({"model_type": "gemma2"}, 2),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, 3),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 1}, 1),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 6}, 0),  # of its 5 layers
        ({"model_type": "llama"}, 1),
    ],
)
def test_the_period_of_full_attention(values: dict[str, Any], period: int, tmp_path: Path) -> None:
    assert sliding_period(tiny(tmp_path / "model", **values).config) == period


@pytest.mark.parametrize(
    ("values", "architecture", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, "llama", 16),
        ({"model_type": "phi3", "sliding_window": 16}, "phi3", 16),
        ({"model_type": "phi3", "sliding_window": 600}, "phi3", None),  # more than the model's context
        ({"model_type": "phi3"}, "phi3", None),
        ({"model_type": "gemma2"}, "gemma2", None),
    ],
)
def test_a_window_that_llama_cpp_ignores_is_named(
    values: dict[str, Any], architecture: str, window: int | None, tmp_path: Path
) -> None:
    assert ignored_window(tiny(tmp_path / "model", **values).config, architecture) == window


def test_a_fused_matrix_is_whole_in_a_dense_file_and_apart_in_others(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_with(tmp_path / "model", with_biases(NARROW, ()), model_type="phi3"))
    dense, narrow = (choose_form(checkpoint, "phi3", dense=dense) for dense in (True, False))
    assert (dense.kind, dense.architecture, dense.fused) == ("dense", "phi3", True)
    assert (narrow.kind, narrow.architecture, narrow.fused) == ("narrow", "deci", False)


def test_every_name_that_stands_for_another_has_a_row() -> None:
    assert {row.per_layer or "deci" for row in ROWS.values()} | {
        row.unfused or "llama" for row in ROWS.values()
    } <= set(ROWS)
