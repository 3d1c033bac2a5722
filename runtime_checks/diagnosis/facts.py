"""What a model computes with beside its weights, as a config, a GGUF file's keys and an ONNX folder tell it.

Each is told by its own file, not by our exporters, and the ones that both sides tell are compared.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime_checks.artefacts import Artefact
from runtime_checks.schema import Finding
from sola_edge.architecture import head_dim, kv_heads, rope_settings, rotated_channels
from sola_edge.checkpoint import open_checkpoint
from sola_edge.gguf_source import field, open_gguf

Facts = dict[str, float]
EXACT = 1e-6  # of what a file stores as a float32
BY_TABLE = 5e-3  # of a theta that is worked out from a table of sines
THETA = "rope theta"
GGUF_KEYS = {
    "layers": "block_count",
    "hidden size": "embedding_length",
    "query heads": "attention.head_count",
    "key/value heads": "attention.head_count_kv",
    "rotated channels": "rope.dimension_count",
    "norm epsilon": "attention.layer_norm_rms_epsilon",
    THETA: "rope.freq_base",
    "context": "context_length",
}
GENAI_KEYS = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "query heads": "num_attention_heads",
    "key/value heads": "num_key_value_heads",
    "head width": "head_size",
}
ATTRIBUTES = {  # of nodes, in either of our graphs
    "epsilon": "norm epsilon",
    "num_heads": "query heads",
    "q_num_heads": "query heads",
    "kv_num_heads": "key/value heads",
}
TABLES = {"sin_cache": 1, "rotary.frequencies": None}  # the row whose sines are those of the frequencies themselves
LEAST = 1e-3  # radians; a smaller angle has lost digits in a table of float16


def compare_facts(artefact: Artefact, reference: Artefact) -> list[Finding]:
    """What the two tell differently."""
    expected: Facts = {}
    for _, told in _facts(reference):
        expected = told | expected
    findings = []
    for where, told in _facts(artefact):
        for name in told.keys() & expected.keys():
            near = BY_TABLE if name == THETA and where == "model.onnx" else EXACT
            if not math.isclose(told[name], expected[name], rel_tol=near):
                detail = f"{name} is {_number(told[name])}, the reference's {_number(expected[name])}"
                findings.append(Finding(what="metadata", where=where, detail=detail))
    return findings


def _number(value: float) -> str:
    return f"{float(f'{value:.4g}'):,.10g}"


def _facts(artefact: Artefact) -> Iterator[tuple[str, Facts]]:
    """(the file or part of it, what it tells)."""
    if artefact.kind == "checkpoint":
        yield "config.json", config_facts(open_checkpoint(artefact.path).config)
    elif artefact.kind == "gguf":
        yield artefact.path.name, gguf_facts(artefact.path)
    else:
        yield "model.onnx", graph_facts(artefact.path / "model.onnx")
        genai = artefact.path / "genai_config.json"
        if genai.is_file():
            yield genai.name, genai_facts(json.loads(genai.read_text()))


def config_facts(config: Any) -> Facts:
    """Of a transformers config."""
    width = head_dim(config)
    theta = rope_settings(config).get("rope_theta") or getattr(config, "rope_theta", None)
    found = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "query heads": config.num_attention_heads,
        "key/value heads": kv_heads(config),
        "head width": width,
        "rotated channels": rotated_channels(config),
        "norm epsilon": config.rms_norm_eps,
        THETA: theta,
        "context": config.max_position_embeddings,
    }
    return _numbers(found)


def gguf_facts(path: Path) -> Facts:
    """Of the keys of a GGUF file."""
    reader = open_gguf(path)
    architecture = field(reader, "general.architecture")
    return _numbers({name: field(reader, f"{architecture}.{key}") for name, key in GGUF_KEYS.items()})


def genai_facts(content: Mapping[str, Any]) -> Facts:
    """Of genai_config.json."""
    model = content.get("model", {})
    decoder = model.get("decoder", {})
    found = {name: decoder.get(key) for name, key in GENAI_KEYS.items()}
    return _numbers({**found, "context": model.get("context_length")})


def graph_facts(path: Path) -> Facts:
    """Of a graph: attributes in which all nodes agree, and the theta of its rotary table."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    found: dict[str, set[float]] = {}
    for node in graph:
        for key, name in ATTRIBUTES.items():
            if key in node.attributes:
                found.setdefault(name, set()).add(float(node.attributes[key].value))
    facts = {name: values.pop() for name, values in found.items() if len(values) == 1}
    for name, row in TABLES.items():
        table = graph.initializers.get(name)
        if table is not None and table.const_value is not None:
            values = np.asarray(table.const_value.numpy())
            exact = (values if row is None else values[row]).astype(np.float64)
            least = 0.0 if values.dtype == np.float32 else LEAST
            theta = theta_of(exact if row is None else np.arcsin(exact), least)
            if theta is not None:
                facts[THETA] = theta
    return facts


def theta_of(frequencies: npt.NDArray[np.float64], least: float = 0.0) -> float | None:
    """The theta of frequencies c × theta^(-i / n), i = 0 … n - 1, of which those above `least` have all their digits.

    None where they are no such series (their scaling is not by one factor).
    """
    used = int((frequencies > least).sum())
    if used < 2:
        return None
    steps = np.diff(np.log(frequencies[:used]))
    if np.abs(steps - steps.mean()).max() > BY_TABLE * abs(steps.mean()):
        return None
    return float(math.exp(-steps.mean() * len(frequencies)))


def _numbers(values: Mapping[str, Any]) -> Facts:
    """Those that are numbers; what differs by layer is none."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
