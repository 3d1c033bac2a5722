"""A graph under construction: typed values, named nodes, and weights that are read only when the file is written.

A node and its output carry the name of the module they compute (`model.layers.3.mlp.gate_proj.A/MatMul`), an
initializer that of its tensor (`model.layers.3.mlp.gate_proj.A`). Every value is annotated with its type and shape, so
viewers and checkers need no shape inference for com.microsoft's operators.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from sola_edge.errors import UserError

Dimension = int | str
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Opsets:
    """What a graph is written in: the version of each domain's operators, and the IR version that the standard's came with."""

    versions: Mapping[str, int]
    ir: int


@dataclass(frozen=True)
class Precision:
    """How weights and activations are stored: a name for the command line, the ONNX type and torch's.

    bits: of the weights of matrices where they are quantized in blocks, 0 where they have the type of the rest. wide_logits:
    whether logits are given out in fp32.
    """

    name: str
    onnx: ir.DataType
    torch: torch.dtype
    bits: int = 0
    wide_logits: bool = False


FP32 = Precision("fp32", ir.DataType.FLOAT, torch.float32)
INDICES = Precision("int32", ir.DataType.INT32, torch.int32)  # positions among channels, whatever the weights are
BYTES = Precision("uint8", ir.DataType.UINT8, torch.uint8)  # packed small integers


class GraphBuilder:
    """Collects nodes and initializers in the order in which they are made, which is topological."""

    def __init__(self, precision: Precision, opsets: Opsets) -> None:
        self.precision = precision
        self.opsets = opsets
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, str], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Make a value a graph output of that name."""
        value.name = name
        self.outputs.append(value)

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        load: Callable[[], torch.Tensor],
        precision: Precision | None = None,
        *,
        transposed: bool = False,
    ) -> ir.Value:
        """An initializer. `load` is called while the file is written, maybe in a thread beside others, and returns a tensor of
        that shape; `transposed`: of the transpose's shape.

        It is stored in the graph's own precision unless another is given. A name that exists already is shared.
        """
        if name not in self.initializers:
            dtype = precision or self.precision

            def evaluate() -> ir.TensorProtocol:
                stored = _stored(load(), dtype, name)  # reads it from first to last value, as disks like it
                return TorchTensor((stored.T if transposed else stored).contiguous(), name=name)

            value = ir.Value(name=name, type=ir.TensorType(dtype.onnx), shape=ir.Shape(shape))
            value.const_value = ir.LazyTensor(evaluate, dtype=dtype.onnx, shape=ir.Shape(shape), name=name)
            self.initializers[name] = value
        return self.initializers[name]

    def constant(self, content: float | Sequence[int] | int, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant inside the graph file, shared by all who ask for the same one."""
        key = (str(content), dtype.name)
        if key not in self._constants:
            array = np.asarray(content, dtype=dtype.numpy())
            name = f"constants/{dtype.name}/{content}".replace(" ", "")
            attribute = ir.AttrTensor("value", ir.Tensor(array, name=name))
            self._constants[key] = self._node("Constant", [], name, [(name, dtype, array.shape)], "", [attribute])[0]
        return self._constants[key]

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        module: str,
        shape: Sequence[Dimension],
        *,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output of the given shape, of the graph's own precision unless `dtype` says otherwise."""
        output = (f"{module}/{operator}/output", dtype or self.precision.onnx, shape)
        return self.op_outputs(operator, inputs, module, [output], domain=domain, **attributes)[0]

    def cast(self, value: ir.Value, dtype: ir.DataType, module: str) -> ir.Value:
        """The value in that type; itself where it has it."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", [value], module, shape_of(value), dtype=dtype, to=dtype.value)

    def op_outputs(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        module: str,
        outputs: Sequence[tuple[str, ir.DataType, Sequence[Dimension]] | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with several outputs (name, type, shape); None is an output that is not wanted."""
        rows = [ir.Attr(key, *_typed(content)) for key, content in attributes.items()]
        return self._node(operator, inputs, f"{module}/{operator}", outputs, domain, rows)

    def _node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[tuple[str, ir.DataType, Sequence[Dimension]] | None],
        domain: str,
        attributes: Sequence[ir.Attr],
    ) -> list[ir.Value]:
        values = [
            ir.Value(name="")
            if output is None
            else ir.Value(name=output[0], type=ir.TensorType(output[1]), shape=ir.Shape(output[2]))
            for output in outputs
        ]
        self.nodes.append(ir.Node(domain, operator, inputs, attributes, outputs=values, name=name))
        return values

    def model(self, name: str, producer: str, version: str, metadata: dict[str, str]) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=dict(self.opsets.versions),
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=self.opsets.ir,
            producer_name=producer,
            producer_version=version,
            metadata_props=dict(metadata),
        )


def _stored(tensor: torch.Tensor, precision: Precision, name: str) -> torch.Tensor:
    """The tensor in that precision. Raises UserError where a value is not finite or outgrows it."""
    found = tensor.to(precision.torch)
    if not _finite(found):
        check_finite(tensor, name)
        bad = int((~found.isfinite()).sum())
        raise UserError(f"{bad} values of {name} are beyond the range of {precision.name}; give --precision fp32")
    return found


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises UserError for a tensor with values that are not finite."""
    if not _finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(f"{bad} values of {name} are not finite; the checkpoint is damaged")


def _finite(tensor: torch.Tensor) -> bool:
    """By the least and the greatest value, which are NaN where one is: many times as fast as looking at each."""
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def shape_of(value: ir.Value) -> tuple[Dimension, ...]:
    """A value's dimensions, of which the unknown ones are names."""
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else str(d) for d in value.shape)


def type_of(value: ir.Value) -> ir.DataType:
    """A value's element type."""
    assert value.dtype is not None
    return value.dtype


def width(value: ir.Value) -> int:
    """Number of channels: a value's last dimension."""
    assert value.shape is not None
    channels = value.shape[-1]
    assert isinstance(channels, int)
    return channels


def hidden(channels: int) -> tuple[Dimension, ...]:
    """Shape of an activation."""
    return ("batch_size", "sequence_length", channels)


def _typed(content: Any) -> tuple[ir.AttributeType, Any]:
    """ONNX attribute type and value of a Python one."""
    if isinstance(content, bool | int):
        return ir.AttributeType.INT, int(content)
    if isinstance(content, float):
        return ir.AttributeType.FLOAT, content
    if isinstance(content, str):
        return ir.AttributeType.STRING, content
    return ir.AttributeType.INTS, list(content)
