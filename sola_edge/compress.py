"""Streams a checkpoint's decoder layers through statistics → analysis → plan → rewritten layers → compressed checkpoint.

The plan needs what the method noted of *all* layers; nothing else ever holds more than one. Statistics and analyses are
kept in the cache and serve every rate. Layers that are rewritten wait in a work folder there, so a killed run goes on
after the last one.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import safetensors
import torch
import transformers
from safetensors.torch import load_file

import sola_edge
from sola_edge.cache import cache_folder
from sola_edge.calibration import STAGES, Calibration, Statistics, read_calibration
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
from sola_edge.collect import collect
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.files import check_folder_target, replace_folder
from sola_edge.identity import identity
from sola_edge.journal import Journal
from sola_edge.methods import method_named
from sola_edge.model_card import write_compressed_card
from sola_edge.planning import Plan
from sola_edge.progress import track
from sola_edge.runner import LayerRunner
from sola_edge.sequential import Sequential, stored
from sola_edge.texts import load_text
from sola_edge.view import Analysis, LayerView, Method, ModelView

WORK_FORMAT = 3  # of analyses and rewritten layers on disk: other numbers are other files


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
    check_folder_target(target, PROVENANCE)
    checkpoint = open_checkpoint(source)
    if checkpoint.path.resolve() == target.resolve():
        raise UserError(f"{target} is the model itself; give the name of another folder to write")
    run = prepare(checkpoint, settings, calibration)
    run.write(target)
    return Compressed(target, run.plan, run.calibration.describe())


def prepare(checkpoint: Checkpoint, settings: CompressionSettings, calibration: str) -> "Compression":
    """Statistics, analysis and plan of a compression; nothing is written but the cache. Raises UserError."""
    method = method_named(settings.method)
    model = check_source(checkpoint, settings, method)
    text = load_text(calibration)
    windows = read_calibration(text, checkpoint.tokenizer(), settings.window, settings.max_windows)
    statistics = collect(checkpoint, windows, method.gradient_windows(settings), settings.device)
    analyses = _analyses(model, method, statistics)
    return Compression(model, method, windows, statistics, analyses, method.plan(model, analyses))


def check_source(checkpoint: Checkpoint, settings: CompressionSettings, method: Method) -> ModelView:
    """Refuse a compressed model, a device that is not here, what the method refuses, and windows beyond the model's context.

    Raises UserError.
    """
    if checkpoint.layout:
        raise UserError(f"{checkpoint.path} is compressed already; give the dense model")
    if settings.device != "cpu" and not (settings.device == "cuda" and torch.cuda.is_available()):
        raise UserError(f"device {settings.device!r} is not available here; use cpu")
    model = ModelView(checkpoint, settings)
    method.check(model)
    context = getattr(checkpoint.config, "max_position_embeddings", None)
    if context is not None and settings.window > context:
        raise UserError(
            f"window {settings.window} is more than the {context} tokens that {checkpoint.path} takes; give fewer"
        )
    return model


def _analyses(model: ModelView, method: Method, statistics: Statistics) -> list[Analysis]:
    """What the method notes of each layer, from the cache or anew."""
    key = {
        "method": method.name,
        "format": WORK_FORMAT,
        "gradient_windows": statistics.gradient_windows,
        **method.analysis_key(model.settings),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    journal = Journal(statistics.folder / f"analysis-{digest}")
    found = []
    with filelock.FileLock(journal.folder / ".lock"):
        journal.tidy()
        for layer in track(range(model.layers), f"analysing for {method.name}, layer by layer"):
            name = f"{layer:03d}.safetensors"
            if not journal.has(name):
                analysis = method.analyse(LayerView(model, layer, statistics))
                with journal.writing(name) as path:
                    save_tensors({k: v.contiguous() for k, v in analysis.items()}, path)
            found.append(load_file(journal.path(name)))
    return found


@dataclass(frozen=True)
class Compression:
    """A planned compression, ready to be written."""

    model: ModelView
    method: Method
    calibration: Calibration
    statistics: Statistics
    analyses: list[Analysis]
    plan: Plan

    def write(self, target: Path) -> None:
        """Rewrite every layer and put the checkpoint together in the folder `target`."""
        checkpoint = self.model.checkpoint
        journal = Journal(cache_folder("work") / self._key())
        lock = filelock.FileLock(journal.folder.with_suffix(".lock"))
        with lock, replace_folder(target) as partial:
            journal.tidy()
            self._rewrite(journal)
            writer = CheckpointWriter(partial)
            for name, tensor in self._tensors(journal):
                writer.add(name, tensor)
            writer.finish(storage_config(checkpoint), checkpoint.tokenizer(), self.plan.layouts)
            if checkpoint.generation:
                shutil.copy(checkpoint.path / GENERATION, partial)
            self._write_provenance(partial)
            described = self.calibration.describe()
            write_compressed_card(partial, checkpoint.path, self.plan, self.model.settings, described)
            shutil.rmtree(journal.folder, ignore_errors=True)

    @property
    def _correction_windows(self) -> int:
        """Without gradients, attention sinks rule the fit and make things worse: there is no correction then."""
        count = min(self.model.settings.correction_windows, self.statistics.gradient_windows)
        return count if count > 1 else 0  # its halves are compared

    def _key(self) -> str:
        content = {
            "format": WORK_FORMAT,
            "statistics": self.statistics.folder.name,
            "settings": self.model.settings.as_dict(),
            "layouts": {module: asdict(layout) for module, layout in self.plan.layouts.items()},
            "versions": _versions(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    def _rewrite(self, journal: Journal) -> None:
        """Every layer's new tensors as a piece of the journal, going on after the last one that is there."""
        layers = self.model.layers
        streams = self._streams(journal)
        first = next((layer for layer in range(layers) if not journal.has(_piece(layer))), layers)
        if streams is not None and first < layers and not streams.reached(first):
            streams.start()
            first = 0
        for layer in track(range(first, layers), "rewriting, layer by layer"):
            with journal.writing(_piece(layer)) as path:
                save_tensors(self._new_tensors(layer, streams), path)
            if streams is not None:
                streams.forget(layer)

    def _new_tensors(self, layer: int, streams: Sequential | None) -> dict[str, torch.Tensor]:
        view = LayerView(self.model, layer, self.statistics)
        rewriter = self.method.rewriter(view, self.plan.layouts, self.analyses[layer])
        dtype = self.model.checkpoint.dtype
        if streams is not None:
            found = streams.rewrite(view, rewriter, self.plan.layouts, dtype)
        else:
            stages = [rewriter.stage(stage, None) for stage in STAGES]
            found = stored({name: tensor for tensors in stages for name, tensor in tensors.items()}, dtype)
        return {name: tensor.contiguous().cpu() for name, tensor in found.items()}

    def _streams(self, journal: Journal) -> Sequential | None:
        if not self._correction_windows:
            return None
        windows = self.calibration.windows[: self._correction_windows]
        return Sequential(LayerRunner(self.model.checkpoint, self.model.settings.device), windows, journal)

    def _tensors(self, journal: Journal) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the compressed checkpoint, in the source's order of layers."""
        checkpoint = self.model.checkpoint
        prefix = checkpoint.architecture.layer.split("{}")[0]
        for name in checkpoint.names():
            if not name.startswith(prefix):
                yield name, checkpoint.tensor(name)
        for layer in track(range(checkpoint.layers), "writing layers"):
            new = load_file(journal.path(_piece(layer)))
            yield from sorted(new.items())
            own = checkpoint.architecture.layer.format(layer) + "."
            for name in (n for n in checkpoint.names() if n.startswith(own)):
                if checkpoint.architecture.component_of(name.rpartition(".")[0]) is None:
                    yield name, checkpoint.tensor(name)

    def _write_provenance(self, folder: Path) -> None:
        source = self.model.checkpoint
        content = {
            "format": 2,
            "tool": {"sola-edge": sola_edge.__version__},
            "versions": _versions(),
            "source": {**_named(source.path), "weights_sha256": source.weights_sha256},
            "method": self.method.name,
            "rate": self.plan.rate,
            "settings": self.model.settings.as_dict(),
            "calibration": self.calibration.describe(),
            "calibration_nll": self.statistics.nll,
            "norm_curve": norm_curves(self.statistics, source.layers),
            "plan": asdict(self.plan),
            "weights_sha256": hash_weights(sorted(folder.glob("*.safetensors"))),
        }
        (folder / PROVENANCE).write_text(json.dumps(content, indent=2))


def _named(path: Path) -> dict[str, str]:
    """Name of the model at the path, and who made it where its files say so."""
    found = identity(path)
    named = {"name": found.name, "organization": found.organization, "version": found.version}
    return {key: value for key, value in named.items() if value is not None}


def _piece(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


NORM_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def norm_curves(statistics: Statistics, layers: int) -> dict[str, Any]:
    """By layer, the share of Σ|h| that the largest 5 %, 10 %, 15 % … of its neurons carry: SoLA's premise, measured."""
    curves = []
    for layer in range(layers):
        norms = statistics.norms(layer).double().sort(descending=True).values
        carried = norms.cumsum(0) / norms.sum().clamp_min(torch.finfo(torch.float64).tiny)
        curves.append([round(float(carried[max(round(share * len(norms)), 1) - 1]), 4) for share in NORM_SHARES])
    return {"neurons": list(NORM_SHARES), "norm": curves}
