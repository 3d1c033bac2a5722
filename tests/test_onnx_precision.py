"""Quantized ONNX exports: blocks by hand and by hypothesis, and graphs against the weights that their blocks stand for."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import MIXED, NARROW, Layouts, checkpoint_with
from test_onnx import Runner, empty_cache, session_of
from test_onnx_graphs import MODELS, checkpoint_of, reference

import exporters.onnx
from exporters.onnx import Quantization, slow
from exporters.onnx.blocks import Blocks, dequantized, lookup_blocks, quantized
from exporters.onnx.precision import DEFAULTS
from runtime_checks.artefacts import open_artefact
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.factorize import orthonormal
from sola_edge.plain import plain
from sola_edge.testing import tiny_checkpoint

TOLERANCE = 1e-4  # of the logits' standard deviation
TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


# --- blocks ----------------------------------------------------------------------------------------------------------


of_any_blocks = given(
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([16, 32, 128]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    seed=st.integers(0, 99),
)


def test_a_symmetric_block_by_hand() -> None:
    """Steps of 1: the value furthest from zero, -8, is the lowest of the 16 levels."""
    row = torch.tensor([[-8.0, 7.0, 0.0, 1.0, -1.0, 3.4, 3.6, *[0.0] * 9]])
    found = quantized(row, Blocks(4, size=16))
    assert found.zeros is None and np.abs(found.scales) == pytest.approx(1.0)
    assert dequantized(found, Blocks(4, size=16), 16)[0, :7].tolist() == [-8, 7, 0, 1, -1, 3, 4]


@of_any_blocks
def test_blocks_have_their_shapes_and_are_within_a_step(
    bits: int, size: int, symmetric: bool, rows: int, columns: int, seed: int
) -> None:
    blocks = Blocks(bits, size, symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = quantized(weight, blocks)
    parts = {"values": found.values, "scales": found.scales} | ({} if symmetric else {"zeros": found.zeros})
    assert {name: part.shape for name, part in parts.items()} == blocks.shapes(rows, columns)
    step = np.abs(found.scales).repeat(size, axis=1)[:, :columns]
    # a symmetric block has one level less on one side; an asymmetric one rounds its zero point as well
    assert (np.abs(dequantized(found, blocks, columns) - weight.numpy()) <= 1.01 * step + 1e-6).all()


def test_blocks_that_can_be_looked_up() -> None:
    """None cut short, and no zero points in 4 bits, which the lookup packs in another way than the product."""
    assert lookup_blocks(Blocks(8, 128, symmetric=False), 576) == Blocks(8, 64, symmetric=False)
    assert lookup_blocks(Blocks(4, 32, symmetric=False), 64) == Blocks(4, 32)
    assert lookup_blocks(Blocks(4, 32), 40) is None


# --- graphs ----------------------------------------------------------------------------------------------------------


def rounded_logits(
    source: Path, folder: Path, matrices: Blocks, head: Blocks | None, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Of the fp32 export of the same model with every matrix replaced by what its blocks stand for."""
    read = Checkpoint.tensor

    def rounded(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if tensor.dim() != 2:
            return tensor
        ends = ("embed_tokens.weight", "lm_head.weight")
        blocks = head if name.endswith(ends) else matrices
        if name.endswith(ends[0]) and not self.tied:
            blocks = None
        if blocks is None:
            return tensor
        return torch.from_numpy(dequantized(quantized(tensor, blocks), blocks, tensor.shape[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", rounded)
        patch.setattr(
            sys.modules["exporters.onnx.export"], "open_checkpoint", lambda path: plain(open_checkpoint(path))
        )
        return Runner(exporters.onnx.export(source, folder).path, 2)(TOKENS)


CASES: dict[str, tuple[Layouts | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "untied": (None, {"tied": False, "bias": True}),
    "every-layout": (MIXED, {}),
    "narrow": (NARROW, {"tied": False}),
}
CHOICES = {
    "int8": ("int8", Quantization()),
    "int4": ("int4", Quantization(int8_activations=False)),
    "int4-asymmetric-16": ("int4", Quantization(size=16, symmetric=False, int8_activations=False)),
    "int4-head-int8": ("int4", Quantization(head="int8", int8_activations=False)),
    "int8-head-fp32": ("int8", Quantization(size=32, head="fp32")),
    "int4-blocks-of-128": ("int4", Quantization(size=128, int8_activations=False)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_quantized_graph_computes_what_its_blocks_stand_for(
    case: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts, values = CASES[case]
    folder = tmp_path / "checkpoint"
    source = checkpoint_with(folder, layouts, **values) if layouts else tiny_checkpoint(folder, layers=2, **values)
    precision, quantization = CHOICES[choice]
    made = exporters.onnx.precision.weights(precision, quantization)
    assert made.matrices is not None
    tied = open_checkpoint(source).tied
    head = lookup_blocks(made.head, 64) if tied and made.head else made.head
    expected = rounded_logits(source, tmp_path / "rounded", made.matrices, head, monkeypatch)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision=precision, quantization=quantization)
    found = Runner(result.path, 2)(TOKENS)
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    onnx.checker.check_model(str(result.path), full_check=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_of_every_architecture(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_of(tmp_path / "checkpoint", f"{name}, compressed")
    choices = Quantization(int8_activations=False)
    made, tied = exporters.onnx.precision.weights(precision, choices), open_checkpoint(source).tied
    assert made.matrices is not None
    head = lookup_blocks(made.matrices, 64) if tied else made.head
    expected = rounded_logits(source, tmp_path / "rounded", made.matrices, head, monkeypatch)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision=precision, quantization=choices)
    assert np.abs(Runner(result.path, 2)(TOKENS) - expected).max() <= TOLERANCE * expected.std()


def test_the_data_file_holds_the_blocks_once(tmp_path: Path) -> None:
    """A tied embedding is the head's own blocks; norms and tables are fp32."""
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=2)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision="int4")
    checkpoint, blocks = open_checkpoint(source), DEFAULTS[4]
    expected = 0
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) == 1:
            expected += 4 * shape[0]
        else:
            parts = blocks.shapes(*shape)
            expected += int(np.prod(parts["values"])) + 4 * int(np.prod(parts["scales"]))
    graph = onnx.load(result.path, load_external_data=False).graph
    tables = sum(int(np.prod(row.dims)) for row in graph.initializer if row.name in ("cos_cache", "sin_cache"))
    assert result.path.with_name("model.onnx.data").stat().st_size == expected + 4 * tables


def test_metadata_say_how_it_was_rounded(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    asked = Quantization(size=64, head="int8")
    result = exporters.onnx.export(source, tmp_path / "onnx", precision="int4", quantization=asked)
    found = {row.key: row.value for row in onnx.load(result.path, load_external_data=False).metadata_props}
    assert found["precision"] == "int4"
    assert json.loads(found["matrices"]) == {"bits": 4, "size": 64, "symmetric": True, "int8_activations": True}
    assert json.loads(found["head"])["bits"] == 8


def test_metadata_say_what_a_tied_head_could_be(tmp_path: Path) -> None:
    """Smaller blocks without zero points where its rows are looked up; whole where no size of block fits them."""
    asked = Quantization(size=128, symmetric=False)
    for hidden, size in ((64, 64), (40, None)):
        source = tiny_checkpoint(tmp_path / f"{hidden}", layers=1, hidden=hidden, heads=1, kv_heads=1, head_dim=32)
        result = exporters.onnx.export(source, tmp_path / f"{hidden}-onnx", precision="int4", quantization=asked)
        model = onnx.load(result.path, load_external_data=False)
        head = {row.key: row.value for row in model.metadata_props}["head"]
        if size is None:
            assert head == "fp32" and not any(
                "embed" in row.name and ".values" in row.name for row in model.graph.initializer
            )
        else:
            assert json.loads(head) == {"bits": 4, "size": size, "symmetric": True, "int8_activations": True}


def test_parts_of_a_plain_matrix_are_of_one_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks read all A before any B: each matrix is made plain once, not once for each part."""
    from sola_edge import plain as module

    made: list[int] = []
    monkeypatch.setattr(module, "orthonormal", lambda b, a: made.append(1) or orthonormal(b, a))
    source = checkpoint_with(tmp_path / "checkpoint", MIXED)
    exporters.onnx.export(source, tmp_path / "onnx", precision="int8")
    layouts = open_checkpoint(source).layout.values()
    assert len(made) == sum(layout.pivot and module.plain_layout(layout).rank > 0 for layout in layouts)


@pytest.mark.parametrize("precision", exporters.onnx.PRECISIONS)
@pytest.mark.parametrize("rounded", [None, True, False])
def test_checks_see_how_it_is_stored(precision: str, rounded: bool | None, tmp_path: Path) -> None:
    """In the file, whatever the metadata say; activations in 8 bits have a tolerance of their own."""
    bits = exporters.onnx.PRECISIONS[precision].bits
    asked = Quantization(int8_activations=rounded) if bits else None
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision=precision, quantization=asked)
    eight = bits > 0 and (DEFAULTS[bits].int8_activations if rounded is None else rounded)
    assert open_artefact(result.path.parent).precision == (f"{precision}-a8" if eight else precision)


@pytest.mark.parametrize(("choice", "level"), [(None, 4), (True, 4), (False, 1)])
def test_activations_are_rounded_as_asked(choice: bool | None, level: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    asked = Quantization(int8_activations=choice)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision="int4", quantization=asked)
    nodes = [n for n in onnx.load(result.path, load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    assert len(nodes) == 6 and levels == {level}  # q, k, v are one product


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_genai_generates_in_every_precision_of_a_cpu(precision: str, tmp_path: Path) -> None:
    """Its first greedy token is that of onnxruntime's logits."""
    genai = pytest.importorskip("onnxruntime_genai")
    source = checkpoint_with(tmp_path / "checkpoint", MIXED)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision=precision)
    model = genai.Model(str(result.path.parent))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=32, min_length=32, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(TOKENS[:1].numpy().astype(np.int32))
    expected = Runner(result.path, 2)(TOKENS)[0, -1].argmax()
    generator.generate_next_token()
    assert generator.get_sequence(0)[TOKENS.shape[1]] == expected


@pytest.mark.parametrize(
    ("precision", "choices", "words"),
    [
        ("int4", {"size": 20}, "block 20"),
        ("int4", {"head": "int3"}, "int3"),
        ("fp32", {"size": 32}, "no blocks"),
        ("int8", {"head": "fp16"}, "give fp32, int8, int4"),
    ],
)
def test_impossible_choices_are_refused(precision: str, choices: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    with pytest.raises(UserError, match=words):
        exporters.onnx.export(source, tmp_path / "onnx", precision=precision, quantization=Quantization(**choices))
    assert not (tmp_path / "onnx").exists()


# --- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("graph", exporters.onnx.GRAPHS)
def test_fp16_is_fp32_but_for_rounding(name: str, graph: str, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "checkpoint", f"{name}, compressed")
    result = exporters.onnx.export(source, tmp_path / "onnx", graph=graph, precision="fp16")
    with torch.no_grad():
        expected = reference(source)(TOKENS).logits.numpy()
    error = Runner(result.path, 2)(TOKENS).astype(np.float32) - expected
    assert np.sqrt((error**2).mean()) <= 0.02 * expected.std()
    onnx.checker.check_model(str(result.path), full_check=True)


@pytest.mark.parametrize("graph", exporters.onnx.GRAPHS)
def test_a_stream_beyond_fp16_stays_finite_where_the_architecture_has_such(
    graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", model_type="gemma2", layers=2)
    read = Checkpoint.tensor

    def enlarged(self: Checkpoint, name: str) -> torch.Tensor:
        return read(self, name) * (2e4 if "embed" in name else 1)

    monkeypatch.setattr(Checkpoint, "tensor", enlarged)
    result = exporters.onnx.export(source, tmp_path / "onnx", graph=graph, precision="fp16")
    data = onnx.load(result.path)
    streams = [row for row in data.graph.initializer if row.name.endswith("input_layernorm.weight")]
    assert {row.data_type for row in streams} == {onnx.TensorProto.FLOAT}
    assert np.isfinite(hidden_states(result.path)).all()


def hidden_states(path: Path) -> np.ndarray:
    """The last norm's output, which is what an overflow of the stream would reach (a head this large overflows itself)."""
    model = onnx.load(path)
    last = next(node for node in reversed(model.graph.node) if "model.norm" in node.name)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last.output[0]))
    session = session_of(model.SerializeToString())
    inputs = {"input_ids": TOKENS.numpy(), "attention_mask": np.ones(TOKENS.shape, np.int64), **empty_cache(session, 2)}
    return session.run([last.output[0]], inputs)[0].astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("graph", exporters.onnx.GRAPHS)
def test_bf16_is_fp32_but_for_rounding(name: str, graph: str, tmp_path: Path) -> None:
    """No runtime computes bf16 on a CPU, so the file's own values are run as fp32, against PyTorch's with weights in bf16.

    What is left is the rotary tables, which the genai graph has in bf16, and norms that multiply by 1 + w.
    """
    source = checkpoint_of(tmp_path / "checkpoint", f"{name}, compressed")
    result = exporters.onnx.export(source, tmp_path / "onnx", graph=graph, precision="bf16")
    onnx.checker.check_model(str(result.path), full_check=True)
    model = onnx.load(result.path)
    types = {row.name: row.type.tensor_type.elem_type for row in (*model.graph.input, *model.graph.output)}
    assert types["logits"] == onnx.TensorProto.FLOAT  # as onnxruntime-genai's own builder gives them out
    assert types["present.0.key"] == types["past_key_values.0.key"] == onnx.TensorProto.BFLOAT16
    widened(model)
    (tmp_path / "wide.onnx").write_bytes(model.SerializeToString())
    pytorch = reference(source)
    with torch.no_grad():
        for weight in pytorch.parameters():
            weight.copy_(weight.bfloat16())
        expected = pytorch(TOKENS).logits.numpy()
    error = Runner(tmp_path / "wide.onnx", 2)(TOKENS) - expected
    assert np.sqrt((error**2).mean()) <= {"genai": 0.03, "portable": 0.002}[graph] * expected.std()


def widened(model: onnx.ModelProto) -> None:
    """Every bfloat16 of a model as float32, in place."""
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    tensors = [*model.graph.initializer]
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for row in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if row.type.tensor_type.elem_type == narrow:
            row.type.tensor_type.elem_type = wide


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read(self, name) * 1e6)
    with pytest.raises(UserError, match="beyond the range of fp16"):
        exporters.onnx.export(source, tmp_path / "onnx", precision="fp16")
    assert not (tmp_path / "onnx").exists()


def test_blocks_need_the_genai_graph(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    with pytest.raises(UserError, match="--graph genai"):
        exporters.onnx.export(source, tmp_path / "onnx", graph="portable", precision="int8")


@pytest.mark.parametrize(
    ("precision", "activations", "expected"),
    [
        ("fp32", None, False),
        ("int8", None, True),
        ("int8", True, False),
        ("int4", None, False),
        ("int4", False, False),
        ("int9", None, False),
    ],
)
def test_what_decodes_slowly_is_told(precision: str, activations: bool | None, expected: bool) -> None:
    assert slow(precision, Quantization(int8_activations=activations)) is expected


def test_a_head_that_decodes_slowly_is_told() -> None:
    assert slow("int4", Quantization(head="int8")) and not slow("int4", Quantization(head="fp32"))
