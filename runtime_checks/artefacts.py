"""What a path holds: its kind, its precision (read from its tensors, never from its name), its size.

Bytes per weight of a precision are what the file would take if every parameter were stored in it, once.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime_checks.schema import Kind
from sola_edge.errors import UserError
from sola_edge.files import size_of

BYTES_PER_WEIGHT = {
    "fp32": 4.0,
    "f32": 4.0,
    "fp16": 2.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q6_k": 210 / 256,
    "q5_k": 176 / 256,
    "q4_k": 144 / 256,
    "q3_k": 110 / 256,
    "q2_k": 84 / 256,
    "q4_0": 18 / 32,
    "q4_1": 20 / 32,
    "q5_0": 22 / 32,
    "q5_1": 24 / 32,
}
INTEGERS = 4  # MatMulNBits' accuracy_level that lets a runtime round its inputs to 8 bits


@dataclass(frozen=True)
class Artefact:
    """A checkpoint folder, an ONNX folder or a GGUF file. `bytes` counts all files, tokenizer included."""

    path: Path
    kind: Kind
    precision: str
    bytes: int

    def expected_bytes(self, parameters: int | None) -> int | None:
        """Bytes that so many parameters take in this precision."""
        per_weight = BYTES_PER_WEIGHT.get(self.precision)
        return None if parameters is None or per_weight is None else round(parameters * per_weight)


def open_artefact(path: Path) -> Artefact:
    """Detect what a path holds. Raises UserError for anything that no runtime here takes."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is no artefact: give a .gguf file, an ONNX folder or a checkpoint folder")
        return Artefact(path, "gguf", _gguf_type(path), _gguf_bytes(path))
    if (path / "model.onnx").exists():
        return Artefact(path, "onnx", _onnx_precision(path / "model.onnx"), size_of(path))
    if (path / "config.json").exists():
        return Artefact(path, "checkpoint", _checkpoint_precision(path), size_of(path))
    raise UserError(f"{path} holds no model: neither model.onnx nor config.json with safetensors weights is in it")


def _gguf_type(path: Path) -> str:
    """The tensor type that holds most of the weights, as a lower-case name; B factors, which have more bits, left out."""
    from exporters.gguf.forms import B_FACTOR
    from sola_edge.gguf_source import stored_tensors

    counts: Counter[str] = Counter()
    for tensor in stored_tensors(path):
        if tensor.name.endswith(B_FACTOR):
            continue
        counts[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    if not counts:
        raise UserError(f"{path} holds no tensors; give an exported model")
    return counts.most_common(1)[0][0]


def _gguf_bytes(path: Path) -> int:
    from sola_edge.gguf_source import shards

    return sum(size_of(file) for file in shards(path))


def _onnx_precision(path: Path) -> str:
    """From the initializers' element types, and the bits of MatMulNBits: `int8`, or `int8-a8` with activations in 8 bits."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors differ between its back ends
        raise UserError(f"{path} is truncated or no ONNX model ({type(error).__name__}); export it again") from error
    products = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    if products:
        kinds = Counter((made.get("bits", 4), made.get("accuracy_level") == INTEGERS) for made in products)
        bits, rounded = kinds.most_common(1)[0][0]
        return f"int{bits}-a8" if rounded else f"int{bits}"
    sizes: Counter[int] = Counter()
    for tensor in graph.initializer:
        count = 1
        for side in tensor.dims:
            count *= side
        sizes[tensor.data_type] += count
    kind: int = sizes.most_common(1)[0][0] if sizes else onnx.TensorProto.FLOAT
    names: dict[int, str] = {
        onnx.TensorProto.FLOAT: "fp32",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.BFLOAT16: "bf16",
        onnx.TensorProto.INT8: "int8",
        onnx.TensorProto.UINT8: "int8",
    }
    return names.get(kind, f"type {kind}")


def _checkpoint_precision(path: Path) -> str:
    from sola_edge.checkpoint import open_checkpoint

    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    stored = str(open_checkpoint(path).dtype).removeprefix("torch.")
    return names.get(stored, stored)
