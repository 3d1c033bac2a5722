"""What two graphs of one model differ in: the operators of a decoder's norms, attention and tied head.

`Decoder` says what is computed, a `Dialect` in which operators. The inputs and outputs of every graph have the same names,
shapes and meaning.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from exporters.onnx.graph import Dimension, GraphBuilder, Opsets, hidden
from exporters.onnx.rope import RotaryTables

INT64 = ir.DataType.INT64
NEW: tuple[Dimension, ...] = ("batch_size", "sequence_length")
ALL: tuple[Dimension, ...] = ("batch_size", "total_sequence_length")
_END = 2**63 - 1  # of a slice
KeyValue = tuple[ir.Value, ir.Value]  # of one layer's cache
# q, k and v; or all three side by side in the first, for dialects that pack
QKV = tuple[ir.Value, ir.Value | None, ir.Value | None]


@dataclass(frozen=True)
class Heads:
    """Attention of every layer of a model: query heads that share key/value heads, `width` channels each.

    scale: what scores are multiplied by; cap: the bound below which they are bent, 0 for none.
    """

    query: int
    key_value: int
    width: int
    scale: float
    cap: float


@dataclass(frozen=True)
class Kind:
    """Attention of one kind of layer. window: keys that a query sees, itself included; -1 is all of them."""

    window: int
    rotary: RotaryTables


class Dialect(ABC):
    """Writes the parts of one model into one graph. `begin` comes before everything else, `end` after the last norm.

    shared_cache: whether past and present of a layer may be one buffer, longer than what is in it. blocks: whether it has
    operators for weights in blocks. packs: whether attention takes q, k and v side by side in one tensor.
    """

    opsets: ClassVar[Opsets]
    shared_cache: ClassVar[bool]
    blocks: ClassVar[bool]
    packs: ClassVar[bool]

    def __init__(self, graph: GraphBuilder, heads: Heads) -> None:
        self.graph = graph
        self.heads = heads

    @abstractmethod
    def begin(self, ids: ir.Value, mask: ir.Value, kinds: Mapping[str, Kind]) -> ir.Value:
        """What layers share is made here. Token ids (batch_size, sequence_length) in the order in which they are computed.

        ids: of the new tokens; mask (batch_size, total_sequence_length): 1 for each token, cached ones included, and 0 for
        padding on either side.
        """

    def end(self, x: ir.Value) -> ir.Value:
        """Hidden states in the order in which the token ids were given."""
        return x

    @abstractmethod
    def norm(self, x: ir.Value, weight: ir.Value, epsilon: float, module: str) -> ir.Value:
        """RMSNorm of x over its last dimension, in the type of x and weight, with sums of squares in fp32."""

    @abstractmethod
    def skip_norm(
        self, stream: ir.Value, added: ir.Value, weight: ir.Value, epsilon: float, module: str, *, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """(RMSNorm of stream + added, stream + added); nobody reads the sum after the `last` one."""

    @abstractmethod
    def attention(self, qkv: QKV, past: KeyValue, kind: str, module: str) -> tuple[ir.Value, KeyValue]:
        """(attended, (present key, present value)); the queries and keys that come in are not rotated yet."""

    @abstractmethod
    def tied_head(self, x: ir.Value, embedding: ir.Value, module: str) -> ir.Value:
        """Logits x Eᵀ by the embedding matrix E (vocabulary, hidden), which is stored once."""

    def _attention_outputs(self, module: str) -> list[tuple[str, ir.DataType, tuple[Dimension, ...]]]:
        """Names, types and shapes of attended, present key and present value."""
        dtype, heads = self.graph.precision.onnx, self.heads
        cache = ("batch_size", heads.key_value, "total_sequence_length", heads.width)
        return [
            (f"{module}/output", dtype, hidden(heads.query * heads.width)),
            (f"{module}/key", dtype, cache),
            (f"{module}/value", dtype, cache),
        ]

    def _length(self, ids: ir.Value, module: str) -> ir.Value:
        """sequence_length, int64 (1,)."""
        return self.graph.op("Shape", [ids], module, (1,), dtype=INT64, start=1, end=2)

    def _latest(self, values: ir.Value, length: ir.Value, module: str) -> ir.Value:
        """Of int64 values of all tokens, those of the `length` new ones."""
        start = self.graph.op("Neg", [length], module, (1,), dtype=INT64)
        inputs = [values, start, self.graph.constant([_END]), self.graph.constant([1])]
        return self.graph.op("Slice", inputs, module, NEW, dtype=INT64)
