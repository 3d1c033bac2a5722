"""Write a checkpoint as one GGUF file, a tensor at a time.

checkpoint → the converter's metadata → form (forms.py) → names, shapes and types of all tensors → header → tensor after
tensor. Nothing ever holds more than one matrix.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from exporters.gguf.forms import OURS, Form, choose_form, form_metadata, made_plain
from exporters.gguf.metadata import add_metadata, converter_metadata
from exporters.gguf.names import Names
from exporters.gguf.tensors import Tensor, expanded, tensors
from exporters.gguf.types import encode, type_row
from exporters.result import ExportResult
from exporters.support import check_supported
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_file_target, replace_file
from sola_edge.plain import plain
from sola_edge.progress import track


@dataclass(frozen=True)
class GGUFExport(ExportResult):
    """An exported GGUF file: how many tensors there are of each type, and the ones that could not be of the asked type.

    `tensor_bytes` counts the tensors alone: the rest of `bytes` is the tokenizer and other metadata, and padding.
    `expanded` names the matrices that the file holds in a larger form than the checkpoint: ggml cannot gather their outputs,
    or the type rounds and they are pivoted. `stock`: the file runs on any llama.cpp, and not only on one with our addition.
    """

    type_counts: dict[str, int]
    fallbacks: tuple[str, ...]
    tensor_bytes: int
    expanded: tuple[str, ...]
    stock: bool


def export(checkpoint_path: str | Path, out_file: str | Path, type: str = "f16", dense: bool = False) -> GGUFExport:
    """Write the checkpoint as a GGUF file of the type (a name of `types.TYPES`).

    A compressed checkpoint of which only FFNs were made narrower runs on any llama.cpp, and is as small as the checkpoint.
    Any other one needs llama.cpp with our addition, unless it is exported `dense`: factors are multiplied out and dropped
    neurons put back as zeros, which computes the same and saves nothing.

    A tensor whose rows are no whole blocks of the type is stored in F16 and named in the result's `fallbacks`.
    Raises UserError for an unknown type, a bad checkpoint, a checkpoint without tokenizer, or an unwritable file.
    """
    row, out = type_row(type), Path(out_file)
    check_file_target(out)
    checkpoint = open_checkpoint(checkpoint_path)
    check_supported(checkpoint, "GGUF")
    if out.resolve() == checkpoint.path.resolve():
        raise UserError(f"{out} is the model itself; give another name for the file to write")
    metadata = converter_metadata(checkpoint)
    base = metadata["general.architecture"].value
    form, names = choose_form(checkpoint, base, dense), Names(checkpoint, base)
    stored, checkpoint = checkpoint, _without_pivots(checkpoint, form, names, row.rounds)
    plan = list(tensors(checkpoint, names, row, form))
    writer = gguf.GGUFWriter(None, form.architecture)
    parameters = sum(math.prod(tensor.shape) for tensor in plan)
    add_metadata(writer, form_metadata(metadata, checkpoint, form), checkpoint.provenance, parameters)
    writer.add_file_type(row.file_type)
    for tensor in plan:
        shape = quant_shape_to_byte_shape(tensor.shape, tensor.type)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=tensor.type)
    with replace_file(out) as partial:
        _write(writer, plan, partial)
    return GGUFExport(
        path=out,
        files=(out,),
        bytes=out.stat().st_size,
        type_counts=dict(Counter(tensor.type.name for tensor in plan)),
        fallbacks=tuple(tensor.name for tensor in plan if tensor.fallback),
        tensor_bytes=sum(tensor.bytes for tensor in plan),
        expanded=expanded(stored, names, form, rounds=row.rounds),
        stock=not any(tensor.name.endswith(OURS) for tensor in plan),
    )


def _without_pivots(checkpoint: Checkpoint, form: Form, names: Names, rounds: bool) -> Checkpoint:
    if form.kind != "hybrid":
        return checkpoint
    return plain(checkpoint, lambda module, row: made_plain(row, bool(names.permuted_heads(module)), rounds))


def _write(writer: gguf.GGUFWriter, plan: list[Tensor], path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(plan, "Writing GGUF"):
            writer.write_tensor_data(encode(tensor.read(), tensor.type, tensor.name))
    finally:
        writer.close()
