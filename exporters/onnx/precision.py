"""What weights are stored in: one row per precision of the command line, and the choices that quantized ones leave."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import onnx_ir as ir
import torch

from exporters.onnx.blocks import Blocks, lookup_blocks
from exporters.onnx.grams import Grams, Text
from exporters.onnx.graph import FP32, GraphBuilder, Precision
from exporters.onnx.products import BlockProducts, Products, WholeProducts
from exporters.support import choose
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

PRECISIONS = {
    row.name: row
    for row in (
        FP32,
        Precision("fp16", ir.DataType.FLOAT16, torch.float16),
        Precision("bf16", ir.DataType.BFLOAT16, torch.bfloat16, wide_logits=True),
        Precision("int8", ir.DataType.FLOAT, torch.float32, bits=8),
        Precision("int4", ir.DataType.FLOAT, torch.float32, bits=4),
    )
}


# What is measured to be worth it (docs/log.md): int8 is for those who want the model as it is, int4 for those who want it fast.
DEFAULTS = {
    8: Blocks(8, size=16, symmetric=False, int8_activations=False),
    4: Blocks(4, size=32, symmetric=True, int8_activations=True),
}


@dataclass(frozen=True)
class Quantization:
    """Of int8 and int4, see blocks.Blocks; None: what is the default there.

    head: the precision of the head and a tied embedding, None for that of the rest. text: what is rounded with (gptq.py), the
    head aside; None rounds to the nearest levels.
    """

    size: int | None = None
    symmetric: bool | None = None
    int8_activations: bool | None = None
    head: str | None = None
    text: Text | None = None

    def blocks(self, bits: int) -> Blocks | None:
        """Of weights of that many bits, None for 0. Raises UserError for a size that the runtime does not know."""
        if not bits:
            return None
        given = {k: getattr(self, k) for k in ("size", "symmetric", "int8_activations") if getattr(self, k) is not None}
        return replace(DEFAULTS[bits], **given)


def slow(precision: str, quantization: Quantization) -> bool:
    """Whether ONNX Runtime multiplies by weights that it has to widen first: 8 bits with fp32 activations on a CPU.

    docs/log.md has what that costs.
    """
    rows = [PRECISIONS[name] for name in (precision, quantization.head) if name in PRECISIONS]
    found = [quantization.blocks(row.bits) for row in rows]
    return any(blocks is not None and blocks.bits == 8 and not blocks.int8_activations for blocks in found)


@dataclass(frozen=True)
class Weights:
    """How matrices and the head are stored; None is in the graph's own type."""

    precision: Precision
    matrices: Blocks | None
    head: Blocks | None
    text: Text | None = None

    @property
    def quantized(self) -> bool:
        """Whether matrices are stored in blocks."""
        return self.matrices is not None

    def of(self, checkpoint: Checkpoint) -> "Weights":
        """For that model: the head's blocks are such as a tied embedding's rows can be looked up in."""
        if self.head is None or not checkpoint.tied:
            return self
        return replace(self, head=lookup_blocks(self.head, checkpoint.config.hidden_size))

    def described(self) -> dict[str, str]:
        """For a file's metadata: the precision, and of what blocks matrices and head are."""
        found = {"precision": self.precision.name}
        if self.matrices:
            for name, blocks in (("matrices", self.matrices), ("head", self.head)):
                found[name] = json.dumps(asdict(blocks)) if blocks else "fp32"
        return found

    @classmethod
    def recorded(cls, metadata: Mapping[str, str]) -> "Weights":
        """What a file's metadata say, see `described`. Raises KeyError, TypeError or ValueError for others."""
        row = PRECISIONS[metadata["precision"]]
        blocks = {
            name: json.loads(metadata[name]) for name in ("matrices", "head") if row.bits and metadata[name] != "fp32"
        }
        stored = {name: Blocks(**content) for name, content in blocks.items()}
        return cls(row, stored.get("matrices"), stored.get("head"))

    def products(self, graph: GraphBuilder, grams: Grams | None = None) -> Products:
        """What makes the products of a graph's matrices."""
        return BlockProducts(graph, self.matrices, grams) if self.matrices else WholeProducts(graph)


def weights(name: str, asked: Quantization | None) -> Weights:
    """Raises UserError for an unknown precision, and for choices about blocks where there are none."""
    row = choose("precision", name, PRECISIONS)
    choices = asked or Quantization()
    if not row.bits and choices != Quantization():
        raise UserError(
            f"precision {name} has no blocks to choose or to round, and no other head; leave that out, or give int8 or int4"
        )
    head = choose("precision", choices.head, PRECISIONS) if choices.head else row
    if head.onnx != row.onnx:
        known = ", ".join(other.name for other in PRECISIONS.values() if other.onnx == row.onnx)
        raise UserError(f"a head in {head.name} does not go with {name}; give {known}")
    return Weights(row, choices.blocks(row.bits), choices.blocks(head.bits), choices.text)
