"""The initializers and nodes of an ONNX folder of ours beside those that our exporter makes of the checkpoint.

Weights in blocks are decoded and compared with the matrix that they stand for. Whole ones lie in the graph as MatMul wants
them, (inputs, outputs): their rows are the matrix's columns.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporters.onnx.blocks import Blocks, Quantized, dequantized, quantized
from exporters.onnx.export import GRAPHS, MARKER, build
from exporters.onnx.graph import FP32, MICROSOFT, GraphBuilder
from exporters.onnx.precision import Weights
from exporters.support import check_supported
from runtime_checks.diagnosis.declared import marker
from runtime_checks.diagnosis.difference import Matrix
from runtime_checks.diagnosis.weights import Encoded, Stored, compare_weights, explanation, names_differ
from runtime_checks.schema import Finding
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError
from sola_edge.plain import plain

KINDS = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}
WHOLE = Weights(FP32, None, None)
PARTS = (".values", ".scales", ".zeros")
SHOWN = 60  # characters of an attribute's value


def compare_onnx(folder: Path, checkpoint: Checkpoint) -> list[Finding]:
    """What differs. Raises UserError where the folder is none of our exporter's, or the checkpoint none that it knows."""
    model = ir.load(folder / "model.onnx")
    recorded = _recorded(folder)
    check_supported(checkpoint, "ONNX")
    source = plain(checkpoint) if recorded.quantized else checkpoint
    dialect = GRAPHS["genai" if MICROSOFT in model.graph.opset_imports else "portable"]
    as_written = build(source, dialect, recorded)
    values = build(source, dialect, WHOLE) if recorded.quantized else as_written
    found = dict(model.graph.initializers)
    findings = names_differ(found, as_written.initializers, "initializer") + _nodes(model, as_written)
    tensors = _tensors(found, values, recorded, checkpoint, gptq="rounding" in _marker(folder))
    return findings + compare_weights(tensors)


def _marker(folder: Path) -> dict[str, Any]:
    found = marker(folder)
    if found is None:
        raise UserError(f"{folder} was not written by sola-edge, so nobody here knows what its weights are called")
    return found


def _recorded(folder: Path) -> Weights:
    try:
        return Weights.recorded(_marker(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / MARKER} does not tell how weights are stored ({error!r}); export it again"
        ) from error


def _tensors(
    found: Mapping[str, ir.Value], planned: GraphBuilder, recorded: Weights, checkpoint: Checkpoint, gptq: bool
) -> Iterator[Stored]:
    embedding = f"{checkpoint.architecture.embedding}.weight"
    ends = (embedding, f"{checkpoint.architecture.head}.weight")
    remade = recorded.quantized and any(row.pivot for row in checkpoint.layout.values())
    for name, value in planned.initializers.items():
        if name in found:
            kind = KINDS.get(_tensor(value).dtype)
            if kind is not None and found[name].dtype == value.dtype:
                yield _whole(name, kind, found[name], value)
        elif f"{name}{PARTS[0]}" in found:
            blocks = recorded.head if name in ends else recorded.matrices
            if blocks is not None:
                parts = [found[f"{name}{part}"] for part in PARTS if f"{name}{part}" in found]
                nearest = not gptq or name in ends
                made = remade and name not in ends
                yield _in_blocks(name, blocks, parts, value, turned=name != embedding, nearest=nearest, remade=made)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


def _whole(name: str, kind: str, found: ir.Value, planned: ir.Value) -> Stored:
    def wide(encoded: Encoded) -> Matrix:
        return np.asarray(encoded[0]).astype(np.float32)

    # values are planned in the graph's own type: nothing is left to be rounded
    return Stored(
        name=name,
        kind=kind,
        shapes=(_shape(found), _shape(planned)),
        stored=lambda: (_tensor(found).numpy(),),
        values=lambda: _tensor(planned).numpy(),
        encode=lambda values: (values,),
        decode=wide,
    )


def _in_blocks(
    name: str, blocks: Blocks, parts: list[ir.Value], planned: ir.Value, *, turned: bool, nearest: bool, remade: bool
) -> Stored:
    def values() -> Matrix:
        whole = _tensor(planned).numpy()
        return np.ascontiguousarray(whole.T) if turned else whole

    n_out, n_in = reversed(_shape(planned)) if turned else _shape(planned)
    return Stored(
        name=name,
        kind=f"INT{blocks.bits}",
        shapes=(_shape(parts[0]), blocks.shapes(n_out, n_in)["values"]),
        stored=lambda: tuple(_tensor(part).numpy() for part in parts),
        values=values,
        encode=partial(_encode, blocks=blocks) if nearest else None,
        decode=partial(_decode, blocks=blocks, n_in=n_in),
        remade=remade,
    )


def _encode(values: Matrix, blocks: Blocks) -> Encoded:
    made = quantized(torch.from_numpy(values), blocks)
    return (made.values, made.scales) if made.zeros is None else (made.values, made.scales, made.zeros)


def _decode(encoded: Encoded, blocks: Blocks, n_in: int) -> Matrix:
    parts: list[Any] = [np.asarray(part) for part in encoded]
    values, scales, *zeros = parts
    return dequantized(Quantized(values, scales, zeros[0] if zeros else None), blocks, n_in)


def _nodes(model: ir.Model, planned: GraphBuilder) -> list[Finding]:
    """Nodes that are more, missing, or not as they were: of an older exporter they may compute the same, so they explain."""
    found = {node.name or "": node for node in model.graph}
    wanted = {node.name or "": node for node in planned.nodes}
    changed: dict[str, list[str]] = {}
    for name, node in wanted.items():
        detail = _changed(found[name], node) if name in found else None
        if detail is not None:
            changed.setdefault(detail, []).append(name)
    told = [explanation("node {}", names, detail) for detail, names in changed.items()]
    return names_differ(found, wanted, "node") + told


def _changed(found: ir.Node, wanted: ir.Node) -> str | None:
    if (found.domain, found.op_type) != (wanted.domain, wanted.op_type):
        return f"is a {found.op_type}, the exporter writes {wanted.op_type}"
    inputs, expected = ([value.name if value else "" for value in node.inputs] for node in (found, wanted))
    if inputs != expected:
        other = next((a for a, b in zip(inputs, expected, strict=False) if a != b), "fewer or more")
        return f"has another input: {other}"
    for key, attribute in wanted.attributes.items():
        here = found.attributes.get(key)
        values = [None if one is None else _value(one) for one in (here, attribute)]
        if values[0] != values[1]:
            return f"{key} is {values[0]}, the exporter writes {values[1]}"
    return None


def _value(attribute: ir.Attr) -> str:
    content = attribute.value
    if isinstance(content, ir.TensorProtocol):
        content = content.numpy().tolist()
    elif isinstance(content, float):
        content = float(np.float32(content))
    elif isinstance(content, list | tuple):
        content = list(content)
    return str(content)[:SHOWN]
