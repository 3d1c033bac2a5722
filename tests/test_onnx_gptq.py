"""Rounding with a text in mind: by hand, against nearest levels, and with the Gram matrices that the model really has."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from layouts import MIXED
from test_onnx import Runner
from test_onnx_graphs import MODELS, checkpoint_of, checkpoint_with, reference
from test_onnx_precision import of_any_blocks

import exporters.onnx
from exporters.onnx import Quantization, Text, gptq, rounding_text
from exporters.onnx.blocks import Blocks, dequantized, quantized
from exporters.onnx.gptq import calibrated
from exporters.onnx.grams import Grams
from exporters.onnx.precision import DEFAULTS
from sola_edge.calibration import read_calibration
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.layers import FusedLinear, HybridLinear
from sola_edge.plain import plain
from sola_edge.testing import tiny_checkpoint
from sola_edge.texts import load_text

WORDS = " ".join(f"word{n % 17} and number {n * n % 101}" for n in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Text:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return Text(str(path), windows=3, window=32)


def loss(weight: torch.Tensor, blocks: Blocks, found: Any, gram: torch.Tensor) -> float:
    """tr(Δ S Δᵀ)."""
    delta = (torch.from_numpy(dequantized(found, blocks, weight.shape[1])) - weight).double()
    return float((delta @ gram.double() * delta).sum())


# --- the rounding ----------------------------------------------------------------------------------------------------


def test_what_a_column_loses_the_next_one_takes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1. Two inputs that are always equal: 0.4 + 0.4 is best said by 0 + 1; nearest levels say 0 + 0."""
    monkeypatch.setattr(gptq, "DAMPING", 1e-4)
    weight = torch.tensor([[-8.0, 0.4, 0.4, *[0.0] * 13]])
    gram = torch.eye(16)
    gram[1, 2] = gram[2, 1] = 0.9999
    blocks = Blocks(4, size=16)
    assert dequantized(quantized(weight, blocks), blocks, 16)[0, :3].tolist() == [-8, 0, 0]
    assert dequantized(calibrated(weight, blocks, gram), blocks, 16)[0, :3].tolist() == [-8, 0, 1]


@of_any_blocks
def test_inputs_without_correlation_give_nearest_levels(
    bits: int, size: int, symmetric: bool, rows: int, columns: int, seed: int
) -> None:
    blocks = Blocks(bits, size, symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found, nearest = calibrated(weight, blocks, 3.0 * torch.eye(columns)), quantized(weight, blocks)
    for part in ("values", "scales", "zeros"):
        mine, other = getattr(found, part), getattr(nearest, part)
        assert (mine is None) == (other is None)
        assert mine is None or (mine.shape == other.shape and mine.dtype == other.dtype)
    # ONNX Runtime divides by the step where we multiply by its reciprocal: a tie may fall to the other side
    step = np.abs(nearest.scales).max()
    difference = np.abs(dequantized(found, blocks, columns) - dequantized(nearest, blocks, columns))
    assert difference.max() <= 1.001 * step and (difference > 1e-6).mean() <= 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_correlated_inputs_lose_less_than_with_nearest_levels(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks(bits, 32, symmetric=False)
    mixing = torch.randn(96, 4, generator=generator)
    x = torch.randn(2000, 4, generator=generator) @ mixing.T + 0.1 * torch.randn(2000, 96, generator=generator)
    gram = x.T @ x / len(x)
    weight = torch.randn(24, 96, generator=generator)
    found = loss(weight, blocks, calibrated(weight, blocks, gram), gram)
    assert found <= 0.5 * loss(weight, blocks, quantized(weight, blocks), gram)


# --- the Gram matrices -----------------------------------------------------------------------------------------------


def inputs_of(source: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """(tokens, n_in) of every matrix of the decoder layers, by module, as transformers runs the model."""
    model = reference(source)
    caught: dict[str, torch.Tensor] = {}
    fused = {
        f"{name}.{part}": name for name, parts in open_checkpoint(source).architecture.fused.items() for part in parts
    }

    def hook(name: str) -> Any:
        return lambda _module, values: caught.update({name: values[0].flatten(0, -2)}) or None

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | HybridLinear | FusedLinear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(ids)
    for layer in range(model.config.num_hidden_layers):
        caught |= {
            f"model.layers.{layer}.{part}": caught[f"model.layers.{layer}.{whole}"] for part, whole in fused.items()
        }
    return caught


def assert_grams(source: Path, text: Text) -> None:
    stored = open_checkpoint(source)
    exported = plain(stored)
    grams = Grams(exported, stored, text)
    ids = read_calibration(load_text(text.name), stored.tokenizer(), text.window, text.windows).windows
    inputs = inputs_of(source, ids)
    seen = 0
    for name in exported.names():
        module, _, part = name.rpartition(".")
        if stored.architecture.component_of(module) is None or part in ("bias", "order"):
            continue
        x, layout = inputs[module], exported.layout.get(module)
        if layout and layout.rank:
            split = layout.prime if layout.split == "in" else 0
            inner = x[:, split:]
            whole = {"prime": x[:, :split] if split else x, "A": inner, "B": inner @ exported.tensor(f"{module}.A").T}
            x = whole[part]
        expected = x.T @ x / len(x)
        torch.testing.assert_close(grams.of(name), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        seen += 1
    assert seen >= 7 * stored.layers


@pytest.mark.parametrize("name", MODELS)
def test_gram_matrices_are_those_of_the_running_model(name: str, tmp_path: Path, text: Text) -> None:
    assert_grams(checkpoint_of(tmp_path / "checkpoint", f"{name}, compressed"), text)


def test_gram_matrices_of_every_layout(tmp_path: Path, text: Text) -> None:
    assert_grams(checkpoint_with(tmp_path / "checkpoint", MIXED), text)


# --- the export ------------------------------------------------------------------------------------------------------


def test_an_export_is_rounded_so(tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of a layer, whatever it is stacked with, is what `calibrated` makes of it; the head is nearest levels."""
    source = checkpoint_with(tmp_path / "checkpoint", MIXED)
    choices = Quantization(int8_activations=False, text=text)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision="int4", quantization=choices)
    onnx.checker.check_model(str(result.path), full_check=True)
    metadata = {row.key: row.value for row in onnx.load(result.path, load_external_data=False).metadata_props}
    rounding = json.loads(metadata["rounding"])
    assert rounding["method"] == "gptq" and rounding["windows"] == 3 and rounding["window"] == 32
    assert rounding["sha256"] == load_text(text.name).sha256 and rounding["text"] == "words.txt"

    stored = open_checkpoint(source)
    exported = plain(stored)
    grams, blocks = Grams(exported, stored, text), DEFAULTS[4]
    rounded: dict[str, torch.Tensor] = {}
    for name in exported.names():
        rounded[name] = tensor = exported.tensor(name)
        if tensor.dim() == 2:
            layer = stored.architecture.component_of(name.rpartition(".")[0]) is not None
            made = calibrated(tensor, blocks, grams.of(name)) if layer else quantized(tensor, blocks)
            rounded[name] = torch.from_numpy(dequantized(made, blocks, tensor.shape[1]))

    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", lambda _, name: rounded[name])
        patch.setattr(sys.modules["exporters.onnx.export"], "open_checkpoint", lambda _: exported)
        expected = Runner(exporters.onnx.export(source, tmp_path / "rounded").path, 2)(tokens)
    found = Runner(result.path, 2)(tokens)
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (("best",), "rounding 'best'"),
        (("nearest", "mixed"), "reads no text"),
        (("nearest", None, 3), "reads no text"),
        (("gptq", None, 0), "windows 0"),
    ],
)
def test_impossible_roundings_are_refused(choices: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rounding_text(*choices)


def test_a_text_needs_blocks(tmp_path: Path, text: Text) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    with pytest.raises(UserError, match="no blocks"):
        exporters.onnx.export(source, tmp_path / "onnx", precision="fp16", quantization=Quantization(text=text))


def test_a_missing_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    asked = Quantization(text=Text(str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="none"):
        exporters.onnx.export(source, tmp_path / "onnx", precision="int4", quantization=asked)
    assert not (tmp_path / "onnx").exists()
