"""One GGUF file, or several of at most a size each, which llama.cpp loads by the name of the first.

name-00001-of-00003.gguf   metadata, and the first tensors
name-00002-of-00003.gguf   `split.*` keys, and the next tensors
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np

from exporters.gguf.metadata import value_of
from sola_edge.errors import UserError
from sola_edge.files import replace_file, replace_parts
from sola_edge.progress import track

UNITS = {"M": 10**6, "G": 10**9}  # llama-gguf-split's: not 2^20, 2^30
MOST = 200  # shards of one model: all are open at once


def parse_size(text: str) -> int:
    """Bytes of `500M` or `2G`, as llama-gguf-split reads them. Raises UserError."""
    match = re.fullmatch(r"(\d+)([MG])", text)
    if not match or not int(match[1]):
        raise UserError(f"split max size {text!r} is no size; give millions or billions of bytes, such as 500M or 2G")
    return int(match[1]) * UNITS[match[2]]


def write(
    writer: gguf.GGUFWriter, values: Iterable[np.ndarray], out: Path, sources: Sequence[Path] = ()
) -> tuple[Path, ...]:
    """Write what the writer knows of and the tensors' values, which come one at a time, to `out` or the shards named after it.

    All are complete in a folder beside before the first takes its place; the first shard is the last one to do so. sources:
    files that are read meanwhile. Raises UserError when a shard would replace one of these, and for too many shards.
    """
    files = tuple(writer.format_shard_names(out))
    if len(files) > MOST:
        raise UserError(f"{out} would be {len(files)} shards, more than {MOST}; give a larger split max size")
    read = {path.resolve() for path in sources}
    replaced = next((path for path in files if path.resolve() in read), None)
    if replaced:
        raise UserError(f"{replaced} is the model itself; give another name for the file to write")
    if len(files) == 1:
        writer.split_max_size = 0  # or gguf warns that there is nothing to split
        with replace_file(out) as partial:
            _write(writer, values, partial)
    else:
        with replace_parts(files) as folder:
            _write(writer, values, folder / out.name)
    return files


def split(source: Path, out: Path, max_bytes: int, sources: Sequence[Path] = ()) -> tuple[Path, ...]:
    """Write a whole GGUF file as shards; see `write`."""
    reader = gguf.GGUFReader(source)
    fields = {key: value_of(found) for key, found in reader.fields.items() if not key.startswith("GGUF.")}
    writer = gguf.GGUFWriter(None, fields.pop("general.architecture").value, split_max_size=max_bytes)
    for key, value in fields.items():
        writer.add_key_value(key, value.value, value.type, sub_type=value.sub_type)
    for tensor in reader.tensors:
        shape = tensor.data.shape
        writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, tensor.n_bytes, raw_dtype=tensor.tensor_type)
    values = (tensor.data for tensor in track(reader.tensors, "Splitting"))
    return write(writer, values, out, sources)


def _write(writer: gguf.GGUFWriter, values: Iterable[np.ndarray], path: Path) -> None:
    try:
        write_head(writer, path)
        for tensor in values:
            writer.write_tensor_data(tensor)
    finally:
        writer.close()


def write_head(writer: gguf.GGUFWriter, path: Path) -> None:
    """Write header, metadata, and names, shapes and types of all tensors."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
