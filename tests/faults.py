"""Faults that are put into exported files, one each: what a damaged, mixed-up or mislabelled artefact looks like."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[np.ndarray], np.ndarray]


def copied(folder: Path, target: Path) -> Path:
    """A folder's copy."""
    return Path(shutil.copytree(folder, target))


def scaled(factor: float) -> Change:
    """Every value times the factor."""
    return lambda values: (values * factor).astype(values.dtype)


def swapped(a: int, b: int) -> Change:
    """Two rows in each other's place."""

    def change(values: np.ndarray) -> np.ndarray:
        found = values.copy()
        found[[a, b]] = values[[b, a]]
        return found

    return change


def onnx_changed(folder: Path, target: Path, changes: dict[str, Change]) -> Path:
    """The folder with some initializers changed in their external data."""
    copied(folder, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, change in changes.items():
        tensor = stored[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        values = np.memmap(
            target / place["location"], dtype, mode="r+", offset=int(place["offset"]), shape=tuple(tensor.dims)
        )
        values[:] = change(np.array(values))
        values.flush()
    return target


def onnx_cache_off_by_one(folder: Path, target: Path) -> Path:
    """A graph of the genai dialect that takes a cache, if there is one, for a token shorter than it is."""
    copied(folder, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    made = [
        helper.make_node("Shape", ["past_key_values.0.key"], ["off/past"], "off/past", start=2, end=3),
        helper.make_node("Min", ["off/past", "off/one"], ["off/by"], "off/by"),
        helper.make_node("Cast", ["off/by"], ["off/by32"], "off/by32", to=TensorProto.INT32),
        helper.make_node("Sub", ["attention_mask/seqlens_k/Cast/output", "off/by32"], ["off/seqlens"], "off/seqlens"),
    ]
    one = helper.make_node("Constant", [], ["off/one"], "off/one", value=numpy_helper.from_array(np.array([1])))
    nodes = list(model.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.op_type == "GroupQueryAttention")
    for node in nodes[at:]:
        node.input[:] = ["off/seqlens" if i == "attention_mask/seqlens_k/Cast/output" else i for i in node.input]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], one, *made, *nodes[at:]])
    onnx.save(model, target / "model.onnx")
    return target


def onnx_with_bos(folder: Path, target: Path, bos: str, token: int) -> Path:
    """A folder whose tokenizer puts a BOS before a text."""
    copied(folder, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }
    path.write_text(json.dumps(content))
    return target


def gguf_changed(
    source: Path, target: Path, changes: dict[str, Change] | None = None, keys: dict[str, Any] | None = None
) -> Path:
    """The file with some tensors (as rows of their stored values or bytes) and metadata changed, all else byte for byte."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    new = dict(keys or {})
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, new.pop(key, field.contents()), field.types[0], sub_type=sub_type)
    for key, value in new.items():
        writer.add_bool(key, value)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if changes and tensor.name in changes:
            values = changes[tensor.name](values)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
