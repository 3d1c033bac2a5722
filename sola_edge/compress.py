"""Streams a checkpoint's decoder layers through statistics → plan → factors → compressed checkpoint.

Two passes. The first runs the calibration text and, layer by layer, chooses prime neurons and decomposes what is marginal;
the bases (as large as the weights they came from) wait on disk beside the output. The plan needs the energies of all layers.
The second pass reads each layer's weights again and writes it, factored. Neither holds more than a layer.
"""

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file

import sola_edge
from sola_edge.allocation import MatrixSpectrum
from sola_edge.architecture import FFN
from sola_edge.calibration import INPUT_OF, LayerStatistics, LayerStream, token_windows
from sola_edge.checkpoint import (
    GENERATION,
    PROVENANCE,
    Checkpoint,
    CheckpointWriter,
    hash_weights,
    open_checkpoint,
    save_tensors,
    storage_config,
)
from sola_edge.config import CompressionSettings, Split, alignment_for
from sola_edge.errors import UserError
from sola_edge.factorize import factors, output_basis, retained_energy
from sola_edge.files import check_folder_target, replace_folder
from sola_edge.methods import Method, method_named
from sola_edge.planning import Plan, make_plan, neuron_order, prime_count
from sola_edge.progress import track
from sola_edge.texts import Text, load_text


@dataclass(frozen=True)
class Compressed:
    """What `compress` made: the folder, the plan it follows, and the calibration it rests on."""

    path: Path
    plan: Plan
    calibration: dict[str, Any]


def compress(source: str | Path, target: Path, settings: CompressionSettings, calibration: str) -> Compressed:
    """Compress a checkpoint into the folder `target`.

    Raises UserError for anything a user can put right; nothing is written then.
    """
    method = method_named(settings.method)
    check_folder_target(target, PROVENANCE)
    checkpoint = open_checkpoint(source)
    if checkpoint.path.resolve() == target.resolve():
        raise UserError(f"{target} is the model itself; give the name of another folder to write")
    _refuse(checkpoint, method, settings)
    text = load_text(calibration)
    windows = token_windows(text, checkpoint.tokenizer(), settings.window, settings.max_windows)
    with replace_folder(target) as partial:
        bases = partial / "bases"
        bases.mkdir()
        spectra, prime_shares = _analyse(checkpoint, windows, settings, method, bases)
        plan = make_plan(spectra, settings, checkpoint.parameters())
        _write(checkpoint, plan, bases, partial)
        shutil.rmtree(bases)
        described = _describe_calibration(text, windows)
        record = {"settings": settings.as_dict(), "calibration": described, "prime_share_of_norm": prime_shares}
        _write_provenance(partial, checkpoint, plan, record)
    return Compressed(target, plan, described)


def _refuse(checkpoint: Checkpoint, method: Method, settings: CompressionSettings) -> None:
    if checkpoint.layout:
        raise UserError(f"{checkpoint.path} is compressed already; give the dense model")
    if settings.structure != "hybrid":
        raise UserError(f"structure {settings.structure!r} is not available with {method.name}; use hybrid")
    if not method.layers(checkpoint.layers):
        raise UserError(
            f"{method.name} leaves the first and last two layers dense, and this model has {checkpoint.layers}"
        )
    prime_count(checkpoint.config.intermediate_size, checkpoint.config.hidden_size, settings)
    if settings.device != "cpu" and not (settings.device == "cuda" and torch.cuda.is_available()):
        raise UserError(f"device {settings.device!r} is not available here; use cpu")


def _analyse(
    checkpoint: Checkpoint, windows: torch.Tensor, settings: CompressionSettings, method: Method, bases: Path
) -> tuple[list[MatrixSpectrum], dict[int, float]]:
    """First pass: the spectra of all matrices, and by layer the share of Σ|h| that its prime neurons carry.

    Leaves `<layer>.safetensors` in `bases`: a neuron order and each matrix's basis vectors.
    """
    stream = LayerStream(checkpoint, windows, settings.device)
    chosen = method.layers(checkpoint.layers)
    spectra: list[MatrixSpectrum] = []
    prime_shares = {}
    for layer in track(range(chosen.stop), f"calibrating on {windows.numel():,} tokens, layer by layer"):
        statistics = stream.advance(layer)
        if layer in chosen:
            found, prime = _analyse_layer(checkpoint, layer, statistics, settings, method, bases)
            spectra += found
            norms = statistics.norms.sort(descending=True).values
            prime_shares[layer] = float(norms[:prime].sum() / norms.sum())
    return spectra, prime_shares


def _analyse_layer(
    checkpoint: Checkpoint,
    layer: int,
    statistics: LayerStatistics,
    settings: CompressionSettings,
    method: Method,
    bases: Path,
) -> tuple[list[MatrixSpectrum], int]:
    """The spectra of one layer's matrices and its prime count."""
    row, config = checkpoint.architecture, checkpoint.config
    prime = prime_count(config.intermediate_size, config.hidden_size, settings)
    order = neuron_order(statistics.norms, prime)
    kept = {"order": order}
    spectra = []
    for component in method.components(settings.rate):
        module = row.module(layer, component)
        weight = checkpoint.tensor(f"{module}.weight")
        gram = statistics.grams[INPUT_OF[component]]
        if component == "down":
            gram = gram[order][:, order][prime:, prime:]
        shape = _Shape.of(component, prime)
        basis = output_basis(shape.marginal(shape.permuted(weight, order)), gram)
        kept[module] = basis.vectors.float()
        align = alignment_for(min(weight.shape), settings.align)
        energy = retained_energy(basis.energy).numpy()
        n_out, n_in = weight.shape
        spectra.append(MatrixSpectrum(module, component, n_out, n_in, shape.prime, shape.split, align, energy))
    save_tensors({name: tensor.contiguous() for name, tensor in kept.items()}, bases / f"{layer}.safetensors")
    return spectra, prime


@dataclass(frozen=True)
class _Shape:
    """How one component is split: which side of W its neurons are on, and how many of them are prime."""

    prime: int
    split: Split
    neurons: int | None  # the dimension of W that counts FFN neurons, None for attention

    @staticmethod
    def of(component: str, prime: int) -> "_Shape":
        if component not in FFN:
            return _Shape(0, "out", None)
        return _Shape(prime, "in", 1) if component == "down" else _Shape(prime, "out", 0)

    def permuted(self, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return weight if self.neurons is None else weight.index_select(self.neurons, order)

    def marginal(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[self.prime :] if self.split == "out" else weight[:, self.prime :]

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[: self.prime] if self.split == "out" else weight[:, : self.prime]


def _write(checkpoint: Checkpoint, plan: Plan, bases: Path, folder: Path) -> None:
    """Second pass: every tensor of the source, permuted or factored where the plan says so."""
    writer = CheckpointWriter(folder)
    layer_prefix = checkpoint.architecture.layer.split("{}")[0]
    outside = [name for name in checkpoint.names() if not name.startswith(layer_prefix)]
    for name in outside:
        writer.add(name, checkpoint.tensor(name))
    for layer in track(range(checkpoint.layers), "factorising and writing layers"):
        for name, tensor in _layer_tensors(checkpoint, layer, plan, bases):
            writer.add(name, tensor)
    writer.finish(storage_config(checkpoint), checkpoint.tokenizer(), plan.layouts)
    if checkpoint.generation:
        shutil.copy(checkpoint.path / GENERATION, folder)


def _layer_tensors(checkpoint: Checkpoint, layer: int, plan: Plan, bases: Path) -> Iterator[tuple[str, torch.Tensor]]:
    file = bases / f"{layer}.safetensors"
    stored = load_file(file) if file.exists() else {}
    row = checkpoint.architecture
    prefix = row.layer.format(layer) + "."
    permute = any(row.module(layer, component) in plan.layouts for component in FFN)
    for name in (n for n in checkpoint.names() if n.startswith(prefix)):
        module, _, kind = name.rpartition(".")
        tensor = checkpoint.tensor(name)
        component = row.component_of(module)
        if component is None:
            yield name, tensor
            continue
        layout = plan.layouts.get(module)
        shape = _Shape.of(component, layout.prime if layout else 0)
        if permute and not (kind == "bias" and component == "down"):
            tensor = shape.permuted(tensor, stored["order"])
        if layout is None or kind == "bias":
            yield name, tensor
            continue
        b, a = factors(shape.marginal(tensor), stored[module], layout.rank)
        parts = {"A": a.to(tensor.dtype), "B": b.to(tensor.dtype)}
        if layout.prime:
            parts["prime"] = shape.kept(tensor)
        yield from ((f"{module}.{part}", value) for part, value in parts.items())


def _describe_calibration(text: Text, windows: torch.Tensor) -> dict[str, Any]:
    count, window = windows.shape
    return {
        "text": text.name,
        "sha256": text.sha256,
        "windows": count,
        "window": window,
        "tokens": windows.numel(),
    }


def _write_provenance(folder: Path, source: Checkpoint, plan: Plan, record: dict[str, Any]) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    content = {
        "format": 1,
        "tool": {"sola-edge": sola_edge.__version__},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "source": {"name": source.path.name, "weights_sha256": hash_weights(source.weight_files())},
        "method": record["settings"]["method"],
        "rate": plan.rate,
        **record,
        "plan": asdict(plan),
        "weights_sha256": hash_weights(weights),
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2))
