"""Random checkpoints whose matrices have any layout that MatrixLayout allows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sola_edge.architecture import FFN
from sola_edge.checkpoint import CheckpointWriter, open_checkpoint, storage_config
from sola_edge.config import MatrixLayout
from sola_edge.files import replace_folder
from sola_edge.testing import tiny_checkpoint

Layouts = Mapping[tuple[int, str], MatrixLayout]  # (layer, component) → layout

HIDDEN, NEURONS, LAYERS, HEADS, KV_HEADS = 64, 160, 6, 4, 2


def gate(width: int, prime: int = 0, rank: int = 0, **kinds: bool) -> MatrixLayout:
    """Of gate or up."""
    return MatrixLayout(width, HIDDEN, prime, rank, "out", **kinds)


def down(width: int, prime: int = 0, rank: int = 0, **kinds: bool) -> MatrixLayout:
    return MatrixLayout(HIDDEN, width, prime, rank, "in", **kinds)


def attention(rank: int, n_out: int = HIDDEN, prime: int = 0, **kinds: bool) -> MatrixLayout:
    return MatrixLayout(n_out, HIDDEN, prime, rank, "out", **kinds)


KV = HIDDEN // HEADS * KV_HEADS  # rows of k and v

NARROW: Layouts = {
    (layer, component): layout
    for layer, width in ((1, 96), (2, 40), (4, 128))
    for component, layout in (("gate", gate(width)), ("up", gate(width)), ("down", down(width, bias=layer != 2)))
}
EQUALLY_NARROW: Layouts = {
    (layer, component): layout
    for layer in range(LAYERS)
    for component, layout in (("gate", gate(96)), ("up", gate(96)), ("down", down(96)))
}
# Layer 0 stays dense. In 1 to 3 gate, up and down share their prime count, in 4 and 5 they do not.
MIXED: Layouts = {
    (1, "q"): attention(24),
    (1, "k"): attention(16, KV, pivot=True, gather=True),
    (1, "v"): attention(16, KV, pivot=True, gather=True),
    (1, "o"): attention(24, pivot=True, gather=True, bias=True),
    (1, "gate"): gate(104),
    (1, "up"): gate(104, bias=True),
    (1, "down"): down(104, bias=True),
    (2, "q"): attention(24, pivot=True),
    (2, "k"): attention(24, KV, pivot=True, gather=True),
    (2, "v"): attention(16, KV, bias=True),
    (2, "o"): attention(40, pivot=True, gather=True),
    (2, "gate"): gate(128, 32, 24, bias=True),
    (2, "up"): gate(128, 32, 16),
    (2, "down"): down(128, 32, 24),
    (3, "q"): attention(24, prime=8),
    (3, "v"): attention(0, KV, bias=True),
    (3, "o"): attention(16, pivot=True),
    (3, "gate"): gate(96, 24, 16, pivot=True),
    (3, "up"): gate(96, 24, 20, pivot=True, gather=True, bias=True),
    (3, "down"): down(96, 24, 16, pivot=True, gather=True, bias=True),
    (4, "gate"): gate(80, rank=16, pivot=True),
    (4, "up"): gate(80, 8, 16),
    (4, "down"): down(80, rank=24, pivot=True),
    (5, "gate"): gate(NEURONS, 40, 16, pivot=True),
    (5, "up"): gate(NEURONS, rank=16, pivot=True, gather=True),
    (5, "down"): MatrixLayout(HIDDEN, NEURONS, 8, 16, "out", pivot=True),
}


def checkpoint_with(folder: Path, layouts: Layouts, **values: Any) -> Path:
    """A random model (`tiny_checkpoint` with these values) whose matrices have these layouts; returns its folder."""
    sizes = {"hidden": HIDDEN, "ffn": NEURONS, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS}
    dense = open_checkpoint(tiny_checkpoint(folder, **{**sizes, **values}))
    modules = {dense.architecture.module(*place): layout for place, layout in layouts.items()}
    generator = torch.Generator().manual_seed(3)
    with replace_folder(folder) as partial:
        writer = CheckpointWriter(partial)
        for name in dense.names():
            module = name.rpartition(".")[0]
            if module not in modules:
                writer.add(name, dense.tensor(name))
        for module, layout in modules.items():
            has_bias = layout.bias or dense.bias_name(module) is not None
            for part, tensor in random_parts(layout, has_bias, generator).items():
                writer.add(f"{module}.{part}", tensor)
        writer.finish(storage_config(dense), dense.tokenizer(), modules)
        rows = {module: asdict(layout) for module, layout in modules.items()}
        (partial / "sola.json").write_text(json.dumps({"method": "random", "rate": 0.0, "matrices": rows}))
    return folder


def random_parts(layout: MatrixLayout, has_bias: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The stored parts of a layout, large enough that every one of them matters to the logits."""
    parts = {}
    for name, shape in layout.shapes.items():
        if name == "order":
            parts[name] = torch.randperm(shape[0], generator=generator).to(torch.int32)
        else:
            parts[name] = torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5
    if has_bias:
        parts["bias"] = torch.randn(layout.n_out, generator=generator)
    return parts


def with_biases(layouts: Layouts, components: tuple[str, ...] = FFN) -> Layouts:
    """The same layouts, each of these components with a bias that the dense model does not have."""
    return {place: replace(layout, bias=place[1] in components) for place, layout in layouts.items()}
