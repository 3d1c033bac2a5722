"""Write a checkpoint as one GGUF file, or as shards, a tensor at a time.

checkpoint → the converter's metadata → form (forms.py) → names, shapes and types of all tensors → header → tensor after
tensor. Nothing ever holds more than one matrix. Types that llama-quantize rounds to are made so from an F16 file, which is
written beside the target and removed.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from exporters.gguf import llama_quantize, shards
from exporters.gguf.forms import OURS, Form, choose_form, form_metadata, made_plain, whole_name
from exporters.gguf.llama_quantize import Importance
from exporters.gguf.metadata import add_metadata, conventional_name, converter_metadata
from exporters.gguf.names import Names
from exporters.gguf.rows import check_computed, ignored_window
from exporters.gguf.tensors import Tensor, expanded, tensors
from exporters.gguf.types import TYPES, TypeRow, encode, type_row
from exporters.result import ExportResult
from exporters.support import check_supported
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_file_target, folder_beside, replace_file
from sola_edge.plain import plain
from sola_edge.progress import track


@dataclass(frozen=True)
class GGUFExport(ExportResult):
    """An exported GGUF file: how many tensors there are of each type, and the ones that could not be of the asked type.

    `tensor_bytes` counts the tensors alone: the rest of `bytes` is the tokenizer and other metadata, and padding.
    `expanded` names the matrices that the file holds in a larger form than the checkpoint: ggml cannot gather their outputs,
    or the type rounds and they are pivoted. `stock`: the file runs on any llama.cpp, and not only on one with our addition.
    `window`: llama.cpp ignores the sliding window of this architecture, and computes what the checkpoint does for texts of up
    to so many tokens; None where it always does.
    """

    type_counts: dict[str, int]
    fallbacks: tuple[str, ...]
    tensor_bytes: int
    expanded: tuple[str, ...]
    stock: bool
    window: int | None


def export(
    checkpoint_path: str | Path,
    out_file: str | Path,
    type: str = "f16",
    dense: bool = False,
    importance: Importance | None = None,
    split_max_size: int | None = None,
) -> GGUFExport:
    """Write the checkpoint as a GGUF file of the type (a name of `types.TYPES` or `llama_quantize.BLOCKS`).

    out_file: a file, or a folder that is there, in which the file is named as GGUF's naming convention asks. split_max_size:
    bytes; a model that takes more is written as several files (shards.py), of which a runtime is given the first, the result's
    `path`.

    A compressed checkpoint of which only FFNs were made narrower runs on any llama.cpp, and is as small as the checkpoint.
    Any other one needs llama.cpp with our addition, unless it is exported `dense`: factors are multiplied out and dropped
    neurons put back as zeros, which computes the same and saves nothing.

    A tensor whose rows are no whole blocks of the type is stored in F16, or in what llama-quantize takes instead, and named in
    the result's `fallbacks`. importance: how K- and I-quants are rounded; they need a build of llama.cpp.
    Raises UserError for an unknown type, a bad checkpoint, a checkpoint without tokenizer, an unwritable file, and what
    llama-quantize refuses.
    """
    name, out = type.lower(), Path(out_file)
    if not out.is_dir():
        check_file_target(out)
    if name not in llama_quantize.BLOCKS and importance:
        raise UserError(f"type {name} is not rounded by importance; leave that out, or give one such as q4_k_m")
    row = None if name in llama_quantize.BLOCKS else type_row(name)
    checkpoint = open_checkpoint(checkpoint_path)
    check_supported(checkpoint, "GGUF")
    if out.is_dir():
        out = out / conventional_name(converter_metadata(checkpoint), checkpoint.parameters(), name)
        check_file_target(out)
    if out.resolve() == checkpoint.path.resolve():
        raise UserError(f"{out} is the model itself; give another name for the file to write")
    if row is None:
        return _by_llama_quantize(checkpoint, out, name, dense, importance, split_max_size)
    return _export(checkpoint, out, row, _form(checkpoint, dense), row.rounds, split_max_size)


def _by_llama_quantize(
    checkpoint: Checkpoint, out: Path, name: str, dense: bool, importance: Importance | None, split_max_size: int | None
) -> GGUFExport:
    """By way of an F16 file, beside the target and as long as that takes."""
    build = llama_quantize.tools(name)
    with folder_beside(out) as folder:
        form = _form(checkpoint, dense)
        first = _export(checkpoint, folder / "model.gguf", TYPES["f16"], form, rounds=True)
        matrix = None
        if importance:
            matrix = llama_quantize.importance_matrix(build, first.path, folder, importance)
        types: dict[str, str] = {}
        if not first.stock:
            dense_file = _without_data(checkpoint, replace(form, kind="dense"), folder / "dense.gguf")
            whole = llama_quantize.types_of(build, dense_file, name, matrix)
            stored = (tensor.name for tensor in gguf.GGUFReader(first.path).tensors)
            types = {part: whole[base] for part in stored if (base := whole_name(part)) in whole}
        quantized = folder / "quantized.gguf"
        llama_quantize.quantize(build, first.path, quantized, name, matrix, types)
        made = gguf.GGUFReader(quantized).tensors
        block = llama_quantize.BLOCKS[name]
        files: tuple[Path, ...] = (out,)
        if split_max_size:
            files = shards.split(quantized, out, split_max_size, checkpoint.weight_files())
        else:
            with replace_file(out) as partial:
                quantized.replace(partial)
        return replace(
            first,
            path=files[0],
            files=files,
            bytes=sum(file.stat().st_size for file in files),
            type_counts=dict(Counter(tensor.tensor_type.name for tensor in made)),
            fallbacks=tuple(t.name for t in made if len(t.shape) > 1 and int(t.shape[0]) % block),
            tensor_bytes=sum(int(tensor.n_bytes) for tensor in made),
        )


def _form(checkpoint: Checkpoint, dense: bool) -> Form:
    """Raises UserError for what llama.cpp cannot hold or would compute otherwise."""
    architecture = converter_metadata(checkpoint)["general.architecture"].value
    check_computed(checkpoint, architecture)
    return choose_form(checkpoint, architecture, dense)


def _export(
    checkpoint: Checkpoint, out: Path, row: TypeRow, form: Form, rounds: bool, split_max_size: int | None = None
) -> GGUFExport:
    """rounds: whether the values will be rounded to few bits, here or afterwards, which pivots do not survive."""
    names, plan, writer = _planned(checkpoint, row, form, rounds, split_max_size)
    values = (encode(tensor.read(), tensor.type, tensor.name) for tensor in track(plan, "Writing GGUF"))
    files = shards.write(writer, values, out, sources=checkpoint.weight_files())
    apart = form.kind == "hybrid" and bool(checkpoint.architecture.fused)  # what the architecture has as one
    return GGUFExport(
        path=files[0],
        files=files,
        bytes=sum(file.stat().st_size for file in files),
        type_counts=dict(Counter(tensor.type.name for tensor in plan)),
        fallbacks=tuple(tensor.name for tensor in plan if tensor.fallback),
        tensor_bytes=sum(tensor.bytes for tensor in plan),
        expanded=expanded(checkpoint, names, form, rounds=rounds),
        stock=not (apart or any(tensor.name.endswith(OURS) for tensor in plan)),
        window=ignored_window(checkpoint.config, form.architecture),
    )


def _planned(
    checkpoint: Checkpoint, row: TypeRow, form: Form, rounds: bool, split_max_size: int | None = None
) -> tuple[Names, list[Tensor], gguf.GGUFWriter]:
    """Names and tensors of the file, and a writer that knows them and the metadata and has written nothing."""
    names = Names(checkpoint, form.architecture)
    checkpoint = without_pivots(checkpoint, form, names, rounds)
    plan = list(tensors(checkpoint, names, row, form))
    writer = gguf.GGUFWriter(None, form.architecture, split_max_size=split_max_size or 0)
    parameters = sum(math.prod(tensor.shape) for tensor in plan)
    metadata = form_metadata(converter_metadata(checkpoint), checkpoint, form)
    add_metadata(writer, metadata, checkpoint.provenance, parameters)
    writer.add_file_type(row.file_type)
    for tensor in plan:
        shape = quant_shape_to_byte_shape(tensor.shape, tensor.type)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=tensor.type)
    return names, plan, writer


def _without_data(checkpoint: Checkpoint, form: Form, out: Path) -> Path:
    """The dense model's F16 file as far as its names and shapes go; instead of weights a hole, which takes no room."""
    _, plan, writer = _planned(checkpoint, TYPES["f16"], form, rounds=False)
    try:
        shards.write_head(writer, out)
    finally:
        writer.close()
    align = writer.data_alignment
    os.truncate(out, out.stat().st_size + align + sum(writer.ggml_pad(tensor.bytes, align) for tensor in plan))
    return out


def without_pivots(checkpoint: Checkpoint, form: Form, names: Names, rounds: bool) -> Checkpoint:
    """The model as the file of that form has it; `rounds` as in `expanded`."""
    if form.kind != "hybrid":
        return checkpoint
    return plain(checkpoint, lambda module, row: made_plain(row, bool(names.permuted_heads(module)), rounds))
