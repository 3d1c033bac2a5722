"""The tensors of a GGUF file beside those that our exporter plans for the checkpoint, whoever wrote the file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from exporters.gguf.export import without_pivots
from exporters.gguf.forms import OURS, Form, choose_form, whole_name
from exporters.gguf.metadata import converter_metadata
from exporters.gguf.names import Names
from exporters.gguf.tensors import Tensor, tensors
from exporters.gguf.types import TYPES
from exporters.support import check_supported
from runtime_checks.diagnosis.difference import Matrix
from runtime_checks.diagnosis.weights import Encoded, Stored, compare_weights, names_differ
from runtime_checks.schema import Finding
from sola_edge.checkpoint import Checkpoint
from sola_edge.gguf_source import stored_tensors

F32 = gguf.GGMLQuantizationType.F32
# What gguf's own kernels round to, bit for bit as llama.cpp does.
ROUNDED = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")


def compare_gguf(path: Path, checkpoint: Checkpoint) -> list[Finding]:
    """What differs. Raises UserError where the exporter does not know the checkpoint's architecture or tokenizer."""
    check_supported(checkpoint, "GGUF")
    stored = {tensor.name: tensor for tensor in stored_tensors(path)}
    plan, remade = _plan(checkpoint, stored)
    findings = names_differ(stored, plan, "tensor")
    shared = (name for name in plan if name in stored)
    return findings + compare_weights(_stored(stored[name], plan[name], whole_name(name) in remade) for name in shared)


def _plan(checkpoint: Checkpoint, stored: dict[str, gguf.ReaderTensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The tensors of that file by name, and the whole names of those that are made of other factors than the checkpoint has."""
    base = converter_metadata(checkpoint)["general.architecture"].value
    shapes = {name: _shape(tensor) for name, tensor in stored.items()}
    plans = []
    for form, rounds in _ways(checkpoint, base, any(name.endswith(OURS) for name in stored)):
        names = Names(checkpoint, form.architecture)
        shown = without_pivots(checkpoint, form, names, rounds)
        plan = {tensor.name: tensor for tensor in tensors(shown, names, TYPES["f32"], form)}
        remade = {f"{names.base(m)}.weight" for m, row in checkpoint.layout.items() if shown.layout[m] != row}
        fitting = sum(plan[name].shape == shape for name, shape in shapes.items() if name in plan)
        plans.append((fitting - len(plan.keys() ^ shapes.keys()), plan, frozenset(remade)))
    _, plan, remade_names = max(plans, key=lambda made: made[0])
    return plan, remade_names


def _ways(checkpoint: Checkpoint, base: str, factored: bool) -> Iterator[tuple[Form, bool]]:
    """Forms in which the checkpoint may have been written, each with whether pivots were made plain."""
    form = choose_form(checkpoint, base, dense=False)
    if factored or form.kind != "hybrid":
        yield form, False
    if factored:
        yield form, True
    if checkpoint.layout and not factored:
        yield choose_form(checkpoint, base, dense=True), False


def _stored(tensor: gguf.ReaderTensor, planned: Tensor, remade: bool) -> Stored:
    kind, shape = tensor.tensor_type, _shape(tensor)
    return Stored(
        name=tensor.name,
        kind=kind.name,
        shapes=(shape, planned.shape),
        stored=lambda: (tensor.data,),
        values=planned.read,
        encode=partial(_encode, kind=kind) if kind.name in ROUNDED else None,
        decode=partial(_decode, kind=kind, shape=shape),
        remade=remade,
    )


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """(rows, columns), as numpy has it."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _encode(values: Matrix, kind: gguf.GGMLQuantizationType) -> Encoded:
    return (quantize(np.ascontiguousarray(values), kind),)


def _decode(encoded: Encoded, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> Matrix:
    decoded: Matrix = dequantize(encoded[0], kind).astype(np.float32, copy=False).reshape(shape)
    return decoded
