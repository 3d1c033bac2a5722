"""Write a checkpoint as one GGUF file, a tensor at a time.

checkpoint → the converter's metadata → names, shapes and types of all tensors → header → tensor after tensor. Nothing
ever holds more than one tensor. A factored matrix becomes its factor tensors, which llama.cpp with our addition runs;
`dense` multiplies the factors out, for any llama.cpp, and saves nothing.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from exporters.gguf.metadata import add_metadata, converter_metadata
from exporters.gguf.names import Names
from exporters.gguf.tensors import Tensor, tensors
from exporters.gguf.types import encode, type_row
from exporters.result import ExportResult
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_file_target, replace_file
from sola_edge.progress import track


@dataclass(frozen=True)
class GGUFExport(ExportResult):
    """An exported GGUF file: how many tensors there are of each type, and the ones that could not be of the asked type.

    `tensor_bytes` counts the tensors alone: the rest of `bytes` is the tokenizer and other metadata, and padding.
    """

    type_counts: dict[str, int]
    fallbacks: tuple[str, ...]
    tensor_bytes: int


def export(checkpoint_path: str | Path, out_file: str | Path, type: str = "f16", dense: bool = False) -> GGUFExport:
    """Write the checkpoint as a GGUF file of the type (a name of `types.TYPES`).

    A tensor whose rows are no whole blocks of the type is stored in F16 and named in the result's `fallbacks`.
    Raises UserError for an unknown type, a bad checkpoint, a checkpoint without tokenizer, or an unwritable file.
    """
    row, out = type_row(type), Path(out_file)
    check_file_target(out)
    checkpoint = open_checkpoint(checkpoint_path)
    if out.resolve() == checkpoint.path.resolve():
        raise UserError(f"{out} is the model itself; give another name for the file to write")
    metadata = converter_metadata(checkpoint)
    architecture = metadata["general.architecture"].value
    plan = list(tensors(checkpoint, Names(checkpoint, architecture), row, dense))
    writer = gguf.GGUFWriter(None, architecture)
    parameters = sum(math.prod(tensor.shape) for tensor in plan)
    add_metadata(writer, metadata, checkpoint.provenance, parameters)
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
    )


def _write(writer: gguf.GGUFWriter, plan: list[Tensor], path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(plan, "Writing GGUF"):
            writer.write_tensor_data(encode(tensor.read(), tensor.type, tensor.name))
    finally:
        writer.close()
