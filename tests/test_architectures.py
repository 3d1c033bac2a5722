"""Every architecture of the table, on tiny random models: transformers' own model is the judge.

Layer by layer it must be the whole model, its statistics those of autograd through the whole model, and compression that loses
nothing must lose nothing. The text is longer than the models' sliding windows.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import sola_edge  # noqa: F401  (registers the quantization method)
from sola_edge.architecture import ARCHITECTURES, COMPONENTS, attention_implementation, matrix_shape, rope_type
from sola_edge.calibration import INPUT_OF, PROBE, Calibration
from sola_edge.checkpoint import Checkpoint, copy_checkpoint, open_checkpoint
from sola_edge.collect import collect
from sola_edge.compress import compress
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.layers import FusedLinear, HybridLinear
from sola_edge.runner import LayerRunner, drawn_labels
from sola_edge.testing import EXACT_FORMS, exact_pair, tiny_checkpoint

LAYERS = 4
IDS = torch.randint(3, 300, (2, 50), generator=torch.Generator().manual_seed(1))
LONGROPE = {"type": "longrope", "short_factor": [1.0 + i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
# What each architecture is, and what its config.json may say that changes how a layer runs.
CASES: dict[str, dict[str, Any]] = {
    **{name: {"model_type": name} for name in ARCHITECTURES},
    "llama with biases": {"model_type": "llama", "bias": True, "tied": False},
    "mistral, sliding": {"model_type": "mistral", "sliding_window": 16},
    "qwen2, two kinds": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3 with biases": {"model_type": "qwen3", "attention_bias": True, "tied": False},
    "gemma3_text, scaled": {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3, sliding": {"model_type": "phi3", "sliding_window": 16, "tied": False},
    "phi3, longrope": {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "phi3, partly rotated": {"model_type": "phi3", "partial_rotary_factor": 0.5},
}
# A config value of the case that must change the logits, or the case shows nothing.
MATTERS: dict[str, dict[str, Any]] = {
    "mistral, sliding": {"sliding_window": None},
    "qwen2, two kinds": {"layer_types": ["full_attention"] * LAYERS},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 64},
    "phi3, sliding": {"sliding_window": None},
    "phi3, longrope": {"original_max_position_embeddings": 64},
}


def tiny(folder: Path, case: str) -> Path:
    return tiny_checkpoint(folder, layers=LAYERS, **CASES[case])


def whole_model(folder: Path) -> Any:
    """transformers' own, with attention as the model defines it."""
    attention = attention_implementation(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 standard deviations of the logits."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_it_is_the_whole_model(tmp_path: Path, case: str) -> None:
    folder = tiny(tmp_path / "model", case)
    model, runner = whole_model(folder), LayerRunner(open_checkpoint(folder))
    with torch.no_grad():
        hidden = runner.embed(IDS)
        for layer in range(LAYERS):
            runner.load(layer)
            hidden = runner.run(hidden)
        last = model.model(IDS).last_hidden_state
    expected = logits(model)
    torch.testing.assert_close(model.model.norm(hidden), last, rtol=1e-5, atol=1e-5)
    gradient, loss = runner.loss_gradient(hidden[0], IDS[0], torch.Generator().manual_seed(0))
    nll = F.cross_entropy(expected[0, :-1], IDS[0, 1:], reduction="sum")
    assert loss == pytest.approx(nll.item(), rel=1e-6)
    assert gradient.abs().max() > 0
    if case in MATTERS:
        for name, value in MATTERS[case].items():
            setattr(model.config, name, value)
        other = AutoModelForCausalLM.from_config(model.config, attn_implementation=model.config._attn_implementation)
        other.load_state_dict(model.state_dict())
        assert (logits(other.eval()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_half_precision_is_run_in_float32(tmp_path: Path, model_type: str) -> None:
    """Gemma's embedding scale would be rounded in bfloat16."""
    folder = tiny(tmp_path / "model", model_type)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[0]
    assert torch.equal(LayerRunner(open_checkpoint(folder)).embed(IDS), expected)


def test_labels_are_drawn_from_the_model_s_distribution() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).expand(20_000, 3)
    share = drawn_labels(p, torch.Generator().manual_seed(0)).bincount() / len(p)
    assert share.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert set(drawn_labels(torch.tensor([[0.0, 1.0, 0.0]]).expand(99, 3), torch.Generator()).tolist()) == {1}


class Autograd:
    """E[x xᵀ] and E[g gᵀ] of every matrix by a backward pass through transformers' whole model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = whole_model(checkpoint.path)
        self.row, self.config = checkpoint.architecture, checkpoint.config
        self.x: dict[tuple[int, str], torch.Tensor] = {}
        self.g: dict[tuple[int, str], torch.Tensor] = {}
        for layer in range(checkpoint.layers):
            for component in COMPONENTS:
                self._listen(layer, component)
        for i, ids in enumerate(IDS):
            output = self.model(ids[None]).logits[0, :-1]
            labels = drawn_labels(output.detach().softmax(-1), torch.Generator().manual_seed(i))
            F.cross_entropy(output, labels, reduction="sum").backward()

    def _listen(self, layer: int, component: str) -> None:
        """Of a fused matrix the component's rows alone: those below the ones of the components before it."""
        module, rows = self.row.module(layer, component), slice(None)
        for fused, parts in self.row.fused.items():
            if component in parts:
                module = f"{self.row.layer.format(layer)}.{fused}"
                sizes = [matrix_shape(self.config, part)[0] for part in parts]
                start = sum(sizes[: parts.index(component)])
                rows = slice(start, start + sizes[parts.index(component)])
        key = (layer, component)
        self.x[key] = self.g[key] = torch.zeros(())

        def forward(_module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            self.x[key] = self.x[key] + x.T @ x / IDS.numel()
            output.register_hook(backward)

        def backward(gradient: torch.Tensor) -> None:
            g = gradient[..., rows].flatten(0, -2).double()
            self.g[key] = self.g[key] + g.T @ g / IDS.numel()

        self.model.get_submodule(module).register_forward_hook(forward)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("SOLA_EDGE_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(tiny(tmp_path / "model", case))
    statistics = collect(checkpoint, Calibration(IDS, "random", "0"), gradient_windows=99)
    judge = Autograd(checkpoint)
    for i in range(checkpoint.layers):
        found = statistics.layer(i)
        for component in COMPONENTS:
            assert relative_error(found.inputs[INPUT_OF[component]], judge.x[i, component]) < 1e-5, (i, component)
            assert relative_error(found.outputs[component], judge.g[i, component]) < 1e-5, (i, component)
    assert set(found.inputs) == set(PROBE)


@pytest.mark.parametrize("case", ["llama with biases", "mistral", *list(ARCHITECTURES)[2:]])
@pytest.mark.parametrize("form", EXACT_FORMS)
def test_compression_that_loses_nothing_loses_nothing(tmp_path: Path, case: str, form: str) -> None:
    source = tiny(tmp_path / "source", case)
    exact_pair(source, tmp_path / "dense", tmp_path / "compressed", EXACT_FORMS[form])
    model = whole_model(tmp_path / "compressed")
    assert_same(logits(model), logits(whole_model(tmp_path / "dense")))
    row = open_checkpoint(source).architecture
    assert isinstance(model.get_submodule(row.module(0, "down")), HybridLinear)
    if EXACT_FORMS[form].dropped:
        sizes = [model.get_submodule(row.module(i, "gate")).out_features for i in range(LAYERS)]
        assert sizes == [160 - 16 * (i + 1) for i in range(LAYERS)]
    else:
        assert isinstance(model.get_submodule(row.module(1, "q")), HybridLinear)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_compressed_models_are_saved_opened_and_generate(tmp_path: Path, model_type: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type=model_type, compressed=True, layers=LAYERS)
    model = whole_model(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(whole_model(tmp_path / "again")), logits(model))
    again, first = open_checkpoint(tmp_path / "again"), open_checkpoint(folder)
    assert again.layout == first.layout
    assert sorted(again.names()) == sorted(first.names())
    prompt = IDS[:1, :30]  # longer than a sliding window
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_copies_are_ordinary_models(tmp_path: Path, model_type: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type=model_type, layers=LAYERS)
    copy_checkpoint(open_checkpoint(folder), tmp_path / "copy")
    original, copy = whole_model(folder), whole_model(tmp_path / "copy")
    assert original.state_dict().keys() == copy.state_dict().keys()
    assert torch.equal(logits(copy), logits(original))


def test_fused_matrices_are_read_as_their_rows(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "phi3")
    stored, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    assert checkpoint.parameters() == sum(tensor.numel() for tensor in stored.values())
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        parts = [checkpoint.tensor(f"{prefix}.self_attn.qkv_proj.{part}.weight") for part in "qkv"]
        assert [part.shape for part in parts] == [(64, 64), (32, 64), (32, 64)]
        assert torch.equal(torch.cat(parts), stored[f"{prefix}.self_attn.qkv_proj.weight"])
        parts = [checkpoint.tensor(f"{prefix}.mlp.gate_up_proj.{part}.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(parts), stored[f"{prefix}.mlp.gate_up_proj.weight"])
    assert not any(name.endswith(("qkv_proj.weight", "gate_up_proj.weight")) for name in checkpoint.names())
    with pytest.raises(KeyError):
        checkpoint.shape("model.layers.0.self_attn.qkv_proj.weight")


def test_a_gained_bias_is_run(tmp_path: Path) -> None:
    """A layout with a bias that the dense model lacks, in a fused matrix and out of it."""
    source = tiny(tmp_path / "source", "phi3")
    exact_pair(source, tmp_path / "dense", tmp_path / "compressed", EXACT_FORMS["narrow"])
    compressed = open_checkpoint(tmp_path / "compressed")
    row = compressed.architecture
    config = json.loads((tmp_path / "compressed" / "config.json").read_text())
    weights = load_file(tmp_path / "compressed" / "model.safetensors")
    dense = whole_model(tmp_path / "dense")
    down, up = row.module(1, "down"), row.module(0, "up")
    bias = torch.linspace(-1, 1, 64)
    for module, value in ((down, bias), (up, torch.zeros(compressed.layout[up].n_out))):
        config["quantization_config"]["matrices"][module]["bias"] = True
        weights[f"{module}.bias"] = value
    dense.get_submodule(down).bias = torch.nn.Parameter(bias)
    save_file(weights, tmp_path / "compressed" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "compressed" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "compressed").layout[down].bias
    model = whole_model(tmp_path / "compressed")
    assert isinstance(model.get_submodule(row.module(0, "up").rpartition(".")[0]), FusedLinear)
    assert_same(logits(model), logits(dense))
    del weights[f"{down}.bias"]
    save_file(weights, tmp_path / "compressed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.bias"):
        open_checkpoint(tmp_path / "compressed")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: weights | {name: weights[name][:-1].clone()}


@pytest.mark.parametrize(
    ("model_type", "damage", "message"),
    [
        (
            "qwen2",
            without("model.layers.1.self_attn.k_proj.bias"),
            "lacks the tensor model.layers.1.self_attn.k_proj.bias",
        ),
        (
            "qwen3",
            without("model.layers.2.self_attn.q_norm.weight"),
            "lacks the tensor model.layers.2.self_attn.q_norm",
        ),
        (
            "qwen3",
            cut("model.layers.2.self_attn.k_norm.weight"),
            r"k_norm.weight has shape \(31,\), its config asks for \(32,\)",
        ),
        (
            "gemma2",
            without("model.layers.0.post_feedforward_layernorm.weight"),
            "lacks the tensor model.layers.0.post_feed",
        ),
        (
            "gemma3_text",
            without("model.layers.3.pre_feedforward_layernorm.weight"),
            "lacks the tensor model.layers.3.pre_f",
        ),
        (
            "phi3",
            without("model.layers.3.mlp.gate_up_proj.weight"),
            "lacks the tensor model.layers.3.mlp.gate_up_proj.gate",
        ),
        ("phi3", cut("model.layers.3.mlp.gate_up_proj.weight"), r"shape \(319, 64\), its config asks for 320 rows"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, model_type: str, damage: Any, message: str) -> None:
    folder = tiny(tmp_path / "model", model_type)
    weights = damage(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)


def test_a_multimodal_gemma3_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UserError, match=r"'gemma3' is not supported \(it is multimodal.*gemma3_text"):
        open_checkpoint(tmp_path)


def test_rope_of_the_layers_with_full_attention(tmp_path: Path) -> None:
    """transformers 5 nests Gemma 3's settings by kind of layer."""
    config = open_checkpoint(tiny(tmp_path / "model", "gemma3_text, scaled")).config
    assert rope_type(config) == "linear"


GGUF_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """As llama.cpp's converter stores qwen2 and qwen3: nothing permuted, one-dimensional tensors in float32."""
    import gguf

    config, row = checkpoint.config, checkpoint.architecture
    writer = gguf.GGUFWriter(path, row.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    names = {row.embedding: "token_embd", row.final_norm: "output_norm", row.head: "output"}
    for i in range(checkpoint.layers):
        names |= {row.module(i, part): f"blk.{i}.{name}" for part, name in GGUF_NAMES.items()}
        names |= {f"{row.layer.format(i)}.{norm}": f"blk.{i}.attn_{norm[-6:]}" for norm in row.head_norms}
    for name in checkpoint.names():
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names[module]}.{kind}", checkpoint.tensor(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("model_type", "values"), [("qwen2", {}), ("qwen3", {"head_dim": 128}), ("qwen3", {})])
def test_a_gguf_is_read_as_transformers_reads_it(tmp_path: Path, model_type: str, values: dict[str, int]) -> None:
    """Where transformers can: of qwen3 it believes that every head has 128 channels."""
    folder = tiny_checkpoint(tmp_path / "model", model_type=model_type, layers=LAYERS, tied=False, **values)
    dense = open_checkpoint(folder)
    write_gguf(dense, tmp_path / "model.gguf")
    found = open_checkpoint(tmp_path / "model.gguf")
    assert sorted(found.names()) == sorted(dense.names())
    assert all(torch.equal(found.tensor(name), dense.tensor(name)) for name in found.names())
    if model_type == "qwen2" or values:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
        assert all(torch.equal(found.tensor(name), theirs[name]) for name in found.names())


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3"])
def test_other_ggufs_are_refused(tmp_path: Path, architecture: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UserError, match=f"a GGUF of the architecture '{architecture}.* cannot be read .*give the folder"
    ):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("exporter", ["ONNX", "GGUF"])
@pytest.mark.parametrize("case", [*ARCHITECTURES, "qwen2, two kinds"])
def test_exporters_refuse_what_they_are_not_proved_on(tmp_path: Path, exporter: str, case: str) -> None:
    from exporters.support import check_supported

    checkpoint = open_checkpoint(tiny(tmp_path / "model", case))
    name = checkpoint.config.model_type
    if exporter == "ONNX" or case in ARCHITECTURES:
        check_supported(checkpoint, exporter)
        return
    with pytest.raises(UserError, match=f"the {exporter} export does not know .*'{name}'.*with transformers") as raised:
        check_supported(checkpoint, exporter)
    assert "\n" not in str(raised.value)
    assert "export it to ONNX" in str(raised.value)
    module = pytest.importorskip(f"exporters.{exporter.lower()}.export")
    with pytest.raises(UserError, match=f"the {exporter} export does not know"):
        module.export(checkpoint.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_qwen2_in_onnx_is_qwen2(tmp_path: Path, compressed: bool) -> None:
    pytest.importorskip("onnx_ir")
    import exporters.onnx

    onnxruntime = pytest.importorskip("onnxruntime")
    folder = tiny_checkpoint(tmp_path / "model", model_type="qwen2", compressed=compressed, layers=LAYERS)
    path = exporters.onnx.export(folder, tmp_path / "onnx").path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    feed = {value.name: torch.zeros(2, value.shape[1], 0, value.shape[3]).numpy() for value in past}
    (found,) = session.run(
        ["logits"], {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy(), **feed}
    )
    assert_same(torch.from_numpy(found), logits(whole_model(folder)))


def test_rows_are_immutable_and_hashable() -> None:
    for row in ARCHITECTURES.values():
        assert isinstance(hash(row), int)
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.q = "x"  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_compressed_and_corrected(tmp_path: Path, case: str) -> None:
    """Fused matrices, biases, norms after the blocks, layers of two kinds: the corrected model loads and is finite."""
    folder, text = tiny(tmp_path / "model", case), tmp_path / "text.txt"
    text.write_text("".join(f"{i}: pack my box with five dozen jugs.\n" for i in range(40)))
    settings = CompressionSettings(
        rate=0.2, align=8, window=32, max_windows=8, gradient_windows=8, correction_windows=4
    )
    made = compress(folder, tmp_path / "small", settings, str(text))
    found = logits(AutoModelForCausalLM.from_pretrained(made.path).eval())
    assert found.isfinite().all()
    assert made.plan.rate == pytest.approx(0.2, rel=0.005)
