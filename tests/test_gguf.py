"""The GGUF export: names, types and sizes by themselves; values against PyTorch through llama.cpp."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from layouts import (
    EQUALLY_NARROW,
    HIDDEN,
    LAYERS,
    MIXED,
    NARROW,
    NEURONS,
    Layouts,
    checkpoint_with,
    down,
    gate,
    with_biases,
)
from llama_cpp_runner import (
    convertible,
    divergence,
    llama_cpp_logits,
    probe,
    rewritten,
    torch_logits,
    torch_logits_of_halves,
)

from exporters.gguf import export
from exporters.gguf.forms import OURS, choose_form
from exporters.gguf.names import interleave
from exporters.gguf.types import TYPES
from exporters.llama_cpp import Build
from sola_edge.architecture import COMPONENTS, kv_heads, matrix_shape
from sola_edge.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, storage_config
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError
from sola_edge.files import replace_folder
from sola_edge.layers import recompose
from sola_edge.testing import tiny_checkpoint

VARIANTS = {
    "llama": {},
    "llama-untied-biased": {"tied": False, "bias": True},
    "llama-one-kv-head": {"kv_heads": 1},
    "llama-wide-heads": {"head_dim": 32},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "tied": False, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 32},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32},
    "phi3": {"model_type": "phi3"},
}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
# llama.cpp rounds a context up to 256 tokens: longer than the first, and not than the second.
PHI_LONG = {
    **{"model_type": "phi3", "rope_scaling": LONGROPE},
    **{"original_max_position_embeddings": 32, "max_position_embeddings": 64},
}
PHI_SHORT = {**PHI_LONG, "original_max_position_embeddings": 512, "max_position_embeddings": 1024}
PHI_PARTLY = {"model_type": "phi3", "partial_rotary_factor": 0.5, "tied": False}
# Without the biases that few architectures of llama.cpp load.
MIXED_UNBIASED, NARROW_UNBIASED = with_biases(MIXED, ()), with_biases(NARROW, ())
SCALED_GEMMA = {
    **{"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "tied": False},
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


LAYOUTS: dict[str, tuple[Layouts, dict[str, Any]]] = {
    "every-layout": (MIXED, {}),
    "every-layout-biased": (MIXED, {"bias": True, "tied": False}),
    "every-layout-mistral": (MIXED, VARIANTS["mistral"]),
    "every-layout-llama3-rope": (MIXED, VARIANTS["llama3-rope"]),
    "narrow": (NARROW, {}),
    "narrow-biased": (NARROW, {"bias": True, "tied": False}),
    "narrow-wide-heads": (NARROW, {"head_dim": 32}),
    "narrow-mistral": (NARROW, VARIANTS["mistral"]),
    "narrow-llama3-rope": (NARROW, VARIANTS["llama3-rope"]),
    "narrow-linear-rope": (NARROW, VARIANTS["llama-linear-rope"]),
    "equally-narrow": (EQUALLY_NARROW, {}),
    "every-layout-qwen2": (MIXED_UNBIASED, VARIANTS["qwen2"]),
    "every-layout-gemma3": (MIXED_UNBIASED, SCALED_GEMMA),
    "every-layout-phi3": (MIXED_UNBIASED, PHI_LONG),
    "narrow-phi3": (NARROW_UNBIASED, PHI_SHORT),
    "narrow-phi3-partly-rotated": (NARROW_UNBIASED, PHI_PARTLY),
}
# Written larger than they are, for their gather or because llama.cpp wants q's and k's rows in another order.
EXPANDED = {
    *("blk.1.attn_k", "blk.1.attn_v", "blk.1.attn_output", "blk.2.attn_q", "blk.2.attn_k", "blk.2.attn_output"),
    *("blk.3.attn_q", "blk.3.ffn_up", "blk.3.ffn_down", "blk.5.ffn_up"),
}
EXPANDED_TO_WHOLE = {"blk.2.attn_k", "blk.2.attn_output", "blk.3.attn_q"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with(tmp_path_factory.mktemp("gguf") / "mixed", MIXED)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with(tmp_path_factory.mktemp("gguf") / "narrow", NARROW)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "compressed", compressed=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "dense")


def reader_of(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def fully_factored(source: Path, folder: Path) -> Path:
    """The same model with every matrix as factors of full rank, some neurons prime: B A is the rest of W exactly."""
    checkpoint = open_checkpoint(source)
    prime = 32
    with replace_folder(folder) as partial:
        writer, layouts = CheckpointWriter(partial), {}
        for name in checkpoint.names():
            module, _, kind = name.rpartition(".")
            component = checkpoint.architecture.component_of(module)
            weight = checkpoint.tensor(name)
            if component is None or kind != "weight":
                writer.add(name, weight)
                continue
            n_out, n_in = weight.shape
            p = prime if component in ("gate", "up", "down") else 0
            split = "in" if component == "down" else "out"
            kept, rest = weight.split([p, n_out - p]) if split == "out" else weight.split([p, n_in - p], dim=1)
            rotation = torch.linalg.qr(torch.randn(rest.shape[1], rest.shape[1], dtype=torch.float64))[0]
            layouts[module] = MatrixLayout(n_out, n_in, p, rest.shape[1], split)
            writer.add(f"{module}.A", rotation.T.float())
            writer.add(f"{module}.B", (rest.double() @ rotation).float())
            if p:
                writer.add(f"{module}.prime", kept)
        writer.finish(storage_config(checkpoint), None, layouts)
        for path in source.glob("*token*"):
            (partial / path.name).write_bytes(path.read_bytes())
    return folder


def test_interleave_makes_pairs_of_halves() -> None:
    rows = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])  # two heads of four: x0 x1 y0 y1
    assert interleave(rows, 2).ravel().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_factor_tensors_have_the_names_and_shapes_of_the_design(compressed: Path, tmp_path: Path) -> None:
    export(compressed, tmp_path / "x.gguf", "f16")
    reader = reader_of(tmp_path / "x.gguf")
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}  # GGUF order: columns first
    checkpoint = open_checkpoint(compressed)
    layout = checkpoint.layout[checkpoint.architecture.module(1, "down")]
    assert shapes["blk.1.ffn_down.prime.weight"] == (layout.prime, layout.n_out)
    assert shapes["blk.1.ffn_down.lr_a.weight"] == (layout.n_in - layout.prime, layout.rank)
    assert shapes["blk.1.ffn_down.lr_b.weight"] == (layout.rank, layout.n_out)
    assert "blk.1.ffn_down.weight" not in shapes and "blk.0.ffn_down.weight" in shapes
    assert "output.weight" not in shapes
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16
    assert reader.fields["sola.method"].contents() == open_checkpoint(compressed).provenance["method"]


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_in_a_folder_the_file_is_named_by_convention(dense: Path, tmp_path: Path, type: str) -> None:
    result = export(dense, tmp_path, type)
    assert result.path.parent == tmp_path and result.path == next(tmp_path.iterdir())
    assert re.fullmatch(rf"[\w.-]+-\d+[KM](-[\w.-]+)?-{type.upper()}\.gguf", result.path.name)
    fields = reader_of(result.path).fields
    assert f"-{fields['general.size_label'].contents()}" in result.path.name
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_dense_export_read_back_is_the_checkpoint(dense: Path, tmp_path: Path) -> None:
    export(dense, tmp_path / "x.gguf", "f32")
    original, back = open_checkpoint(dense), open_checkpoint(tmp_path / "x.gguf")
    assert sorted(back.names()) == sorted(original.names())
    for name in original.names():
        torch.testing.assert_close(back.tensor(name), original.tensor(name), rtol=0, atol=0)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_size_is_what_the_parameter_count_says(compressed: Path, tmp_path: Path, type: str) -> None:
    checkpoint = open_checkpoint(compressed)
    vectors = sum(checkpoint.shape(n)[0] for n in checkpoint.names() if len(checkpoint.shape(n)) == 1)
    result = export(compressed, tmp_path / "x.gguf", type)
    width = 4 if type == "f32" else 2
    assert result.tensor_bytes == 4 * vectors + width * (checkpoint.parameters() - vectors)
    assert result.bytes == (tmp_path / "x.gguf").stat().st_size >= result.tensor_bytes
    assert result.fallbacks == ()


def test_rows_that_are_no_whole_blocks_fall_back_to_f16_and_are_counted(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", compressed=True, kv_heads=1)  # k: 16 rows, so rank 8
    result = export(folder, tmp_path / "x.gguf", "q8_0")
    assert {name.rpartition("attn_k.")[2] for name in result.fallbacks} == {"lr_b.weight"}
    assert result.type_counts["F16"] == len(result.fallbacks) == 3
    types = {t.name: t.tensor_type.name for t in reader_of(tmp_path / "x.gguf").tensors}
    assert {name for name, type in types.items() if type == "F16"} == set(result.fallbacks)


@pytest.mark.parametrize("type", TYPES)
def test_every_type_stores_values_that_read_back(dense: Path, tmp_path: Path, type: str) -> None:
    export(dense, tmp_path / "x.gguf", type)
    original, back = open_checkpoint(dense), open_checkpoint(tmp_path / "x.gguf")
    name = original.architecture.module(2, "gate") + ".weight"
    error = (back.tensor(name) - original.tensor(name)).norm() / original.tensor(name).norm()
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7, "q5_0": 4, "q5_1": 4, "q4_0": 3, "q4_1": 3}[type]
    assert error < 2.0**-bits


@pytest.mark.parametrize(("type", "more"), [("q4_0", "Q5_0"), ("q4_1", "Q5_1")])
def test_in_four_bits_b_factors_have_five(compressed: Path, tmp_path: Path, type: str, more: str) -> None:
    export(compressed, tmp_path / "x.gguf", type)
    stored = {t.name: t.tensor_type.name for t in reader_of(tmp_path / "x.gguf").tensors if t.shape[0] % 32 == 0}
    ends = ("lr_a.weight", "lr_b.weight", "prime.weight")
    found = {end: {kind for name, kind in stored.items() if name.endswith(end)} for end in ends}
    assert found == {"lr_a.weight": {type.upper()}, "lr_b.weight": {more}, "prime.weight": {type.upper()}}


def test_values_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    checkpoint = open_checkpoint(folder)
    with replace_folder(tmp_path / "large") as partial:
        writer = CheckpointWriter(partial)
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name) * (1e6 if "up_proj" in name else 1))
        writer.finish(storage_config(checkpoint), None, {})
        for path in folder.glob("*token*"):
            (partial / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight.*bf16"):
        export(tmp_path / "large", tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()


def test_bad_requests_are_one_line_and_leave_nothing(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q9_9"):
        export(dense, tmp_path / "x.gguf", "q9_9")
    with pytest.raises(UserError, match="missing"):
        export(tmp_path / "missing", tmp_path / "x.gguf", "f16")
    bare = tiny_checkpoint(tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        export(bare, tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()


def test_an_unknown_vocabulary_is_recognised_by_its_rule(dense: Path, tmp_path: Path) -> None:
    export(dense, tmp_path / "x.gguf", "f16")
    assert reader_of(tmp_path / "x.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"
    folder = tiny_checkpoint(tmp_path / "odd")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer"):
        export(folder, tmp_path / "odd.gguf", "f16")


def matrix_in_file(tensors: dict[str, np.ndarray], base: str, n_out: int, n_in: int) -> np.ndarray:
    """W (n_out, n_in) of a matrix in a hybrid file, told from the shapes of its tensors as llama_cpp.md says."""
    if f"{base}.weight" in tensors:
        return tensors[f"{base}.weight"]
    kept, a, b = (tensors.get(f"{base}.{suffix}.weight") for suffix in ("prime", "lr_a", "lr_b"))
    if a is None or b is None:
        assert kept is not None
        return kept
    split_in = kept is not None and a.shape[1] < n_in
    rest = n_out - (0 if kept is None or split_in else len(kept))
    product = b @ a if len(b) == rest else np.vstack([a, b @ a])
    return product if kept is None else np.concatenate([kept, product], axis=int(split_in))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data).reshape(tuple(int(n) for n in reversed(t.shape))) for t in reader_of(path).tensors}


def recomposed(checkpoint: Checkpoint, module: str) -> np.ndarray:
    """The module's matrix, rows of q and k in the order of the file."""
    layout = checkpoint.layout[module]
    weight = recompose(layout, {part: checkpoint.tensor(f"{module}.{part}") for part in layout.shapes}).numpy()
    heads = {"q": checkpoint.config.num_attention_heads, "k": kv_heads(checkpoint.config)}
    component = checkpoint.architecture.component_of(module) or ""
    return interleave(weight, heads[component]) if component in heads else weight


GGUF_NAMES = dict(
    zip(COMPONENTS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
)


def test_a_hybrid_file_holds_every_layout(mixed: Path, tmp_path: Path) -> None:
    result = export(mixed, tmp_path / "x.gguf", "f32")
    tensors, checkpoint = tensors_of(tmp_path / "x.gguf"), open_checkpoint(mixed)
    for (layer, component), layout in MIXED.items():
        module, base = checkpoint.architecture.module(layer, component), f"blk.{layer}.{GGUF_NAMES[component]}"
        found = matrix_in_file(tensors, base, layout.n_out, layout.n_in)
        np.testing.assert_allclose(found, recomposed(checkpoint, module), atol=1e-5, err_msg=base)
        stored = {name.removeprefix(f"{base}.") for name in tensors if name.startswith(f"{base}.")}
        dense_size = (layout.n_out, layout.n_in) == matrix_shape(checkpoint.config, component)
        if layout.rank == 0 or base in EXPANDED_TO_WHOLE:
            assert stored - {"bias"} == {"weight" if dense_size else "prime.weight"}
        else:
            assert {"lr_a.weight", "lr_b.weight"} <= stored and "weight" not in stored
        pivoted = layout.pivot and base not in EXPANDED
        assert not pivoted or len(tensors[f"{base}.lr_b.weight"]) == layout.low_rank_shape[0] - layout.rank
        assert layout.bias == ("bias" in stored)
    assert set(result.expanded) == EXPANDED and len(result.expanded) == len(EXPANDED)
    assert not result.stock
    assert reader_of(tmp_path / "x.gguf").fields["llama.feed_forward_length"].contents() == NEURONS


def test_what_is_expanded_is_never_larger_than_dense(mixed: Path, tmp_path: Path) -> None:
    result = export(mixed, tmp_path / "x.gguf", "f32")
    tensors = tensors_of(tmp_path / "x.gguf")
    of_base = {f"blk.{layer}.{GGUF_NAMES[component]}": row for (layer, component), row in MIXED.items()}
    for base in result.expanded:
        size = sum(
            tensor.size for name, tensor in tensors.items() if name.startswith(f"{base}.") and "bias" not in name
        )
        assert size <= of_base[base].n_out * of_base[base].n_in


def test_a_narrow_file_is_what_any_llama_cpp_loads(narrow: Path, tmp_path: Path) -> None:
    result = export(narrow, tmp_path / "x.gguf", "f32")
    fields = {key: field.contents() for key, field in reader_of(tmp_path / "x.gguf").fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [NEURONS, 96, 40, NEURONS, 128, NEURONS]
    assert fields["deci.attention.head_count_kv"] == 2
    assert not [key for key in fields if key.startswith("llama.")]
    shapes = {name: tensor.shape for name, tensor in tensors_of(tmp_path / "x.gguf").items()}
    assert shapes["blk.2.ffn_gate.weight"] == (40, HIDDEN) and shapes["blk.2.ffn_down.weight"] == (HIDDEN, 40)
    assert shapes["blk.1.ffn_down.bias"] == (HIDDEN,)
    assert not [name for name in shapes if name.endswith(OURS)]
    assert result.stock and result.expanded == ()
    assert result.tensor_bytes == 4 * open_checkpoint(narrow).parameters()


def test_a_narrow_file_keeps_the_architecture_where_layers_are_alike(tmp_path: Path) -> None:
    source = checkpoint_with(tmp_path / "checkpoint", EQUALLY_NARROW)
    result = export(source, tmp_path / "x.gguf", "f32")
    fields = {key: field.contents() for key, field in reader_of(tmp_path / "x.gguf").fields.items()}
    assert (fields["general.architecture"], fields["llama.feed_forward_length"]) == ("llama", 96)
    assert result.stock and open_checkpoint(result.path).config.intermediate_size == 96


def test_a_narrow_model_whose_architecture_has_one_width_is_hybrid(narrow: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj gained a bias.*qwen2"):
        choose_form(open_checkpoint(narrow), "qwen2", dense=False)
    checkpoint = open_checkpoint(checkpoint_with(narrow.parent / "unbiased", NARROW_UNBIASED))
    assert choose_form(checkpoint, "qwen2", dense=False).kind == "hybrid"
    assert choose_form(checkpoint, "llama", dense=False).kind == "narrow"


@pytest.mark.parametrize("kind", ["mixed", "narrow"])
def test_dense_puts_zeros_where_neurons_were(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(kind)
    result = export(source, tmp_path / "x.gguf", "f32", dense=True)
    checkpoint, back = open_checkpoint(source), open_checkpoint(result.path)
    assert result.stock and result.expanded == () and not back.layout
    for module, layout in checkpoint.layout.items():
        component = checkpoint.architecture.component_of(module) or ""
        expected = torch.zeros(matrix_shape(checkpoint.config, component))
        parts = {part: checkpoint.tensor(f"{module}.{part}") for part in layout.shapes}
        expected[: layout.n_out, : layout.n_in] = recompose(layout, parts)
        torch.testing.assert_close(back.tensor(f"{module}.weight"), expected)
        if layout.bias:
            found = back.tensor(f"{module}.bias")
            torch.testing.assert_close(found[: layout.n_out], checkpoint.tensor(f"{module}.bias"))
            assert not found[layout.n_out :].any()


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_llama_cpp_computes_every_layout(case: str, tmp_path: Path, llama_cpp_build: Build) -> None:
    layouts, values = LAYOUTS[case]
    folder = convertible(checkpoint_with(tmp_path / "checkpoint", layouts, **values))
    expected = torch_logits(folder)
    for type, dense, limit in (("f32", False, 1e-6), ("f32", True, 1e-6), ("f16", False, 2e-3)):
        export(folder, tmp_path / "x.gguf", type, dense=dense)
        assert divergence(expected, llama_cpp_logits(llama_cpp_build, tmp_path / "x.gguf")) < limit, (type, dense)


OVER_FLOOR = 1.5  # PyTorch with the same roundings; measured 0.6 to 1.07


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_pytorch_does(variant: str, tmp_path: Path, llama_cpp_build: Build) -> None:
    """Dense, factored and recomposed, in F32 (summation order alone differs); in F16 what rounding costs, and no more."""
    for name, is_compressed in (("dense", False), ("compressed", True)):
        folder = convertible(tiny_checkpoint(tmp_path / name, compressed=is_compressed, **VARIANTS[variant]))
        expected = torch_logits(folder)
        floor = divergence(expected, torch_logits_of_halves(folder))
        for type, recomposed, limit in (("f32", False, 1e-6), ("f32", True, 1e-6), ("f16", False, OVER_FLOOR * floor)):
            export(folder, tmp_path / "x.gguf", type, dense=recomposed)
            found = llama_cpp_logits(llama_cpp_build, tmp_path / "x.gguf")
            assert divergence(expected, found) < limit, (name, type, recomposed)


@pytest.mark.slow
def test_factors_of_full_rank_are_the_dense_model(dense: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    folder = fully_factored(dense, tmp_path / "full")
    assert len(open_checkpoint(folder).layout) == 5 * len(COMPONENTS)
    export(folder, tmp_path / "x.gguf", "f32")
    found = llama_cpp_logits(llama_cpp_build, tmp_path / "x.gguf")
    assert divergence(torch_logits(dense), found) < 1e-6


WHOLE_BLOCKS: Layouts = {
    (layer, component): layout
    for layer in range(1, LAYERS - 1)
    for component, layout in (
        ("gate", gate(96, 32, 32, pivot=True)),
        ("up", gate(96, 32, 32, pivot=True, gather=True)),
        ("down", down(96, 32, 32, pivot=True)),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factors", "pivots"])
@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_quantized_factors_run(compressed: Path, tmp_path: Path, llama_cpp_build: Build, type: str, kind: str) -> None:
    """Against the same values in F32: only the rounding of activations is left, which is the dense model's too."""
    errors = []
    source = compressed if kind == "factors" else checkpoint_with(tmp_path / "checkpoint", WHOLE_BLOCKS)
    for dense in (False, True):
        quantized = export(source, tmp_path / "x.gguf", type, dense=dense).path
        values = rewritten(quantized, tmp_path / "f32.gguf", lambda _, values: values)
        expected = llama_cpp_logits(llama_cpp_build, values)
        errors.append(divergence(expected, llama_cpp_logits(llama_cpp_build, quantized)))
    factored, multiplied_out = errors
    assert factored < 3 * multiplied_out < 1


@pytest.mark.slow
def test_mmap_changes_nothing(compressed: Path, tmp_path: Path, llama_cpp_build: Build) -> None:
    export(compressed, tmp_path / "x.gguf", "f16")
    mapped = llama_cpp_logits(llama_cpp_build, tmp_path / "x.gguf")
    read = llama_cpp_logits(llama_cpp_build, tmp_path / "x.gguf", mmap=False)
    np.testing.assert_array_equal(mapped, read)


@pytest.mark.slow
def test_llama_cpp_splits_text_as_the_checkpoints_tokenizer(
    smollm2: Path, tmp_path: Path, llama_cpp_build: Build
) -> None:
    """On a model whose BOS transformers does not prepend either."""
    export(smollm2, tmp_path / "x.gguf", "q4_0")
    text = "It's 12345 tokens:\n\n  naïve café — 日本語 <|im_start|>user\nHi!<|im_end|>\r\n\tdef f(x):\n        return x ** 2"
    expected = open_checkpoint(smollm2).tokenizer()(text)["input_ids"]
    assert probe(llama_cpp_build, tmp_path / "x.gguf", text=text)["tokens"] == expected
