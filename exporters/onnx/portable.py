"""The portable graph: operators of the ONNX standard alone, opset 23.

Any runtime that has the standard's Attention, RotaryEmbedding and RMSNormalization runs it (ONNX Runtime since 1.23).
Positions and masks are made from attention_mask, so that padding may stand on either side, and rotary angles from positions:
the file has no tables, and no length at which they end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from exporters.onnx.dialect import ALL, INT64, NEW, QKV, Dialect, KeyValue, Kind
from exporters.onnx.graph import FP32, Dimension, Opsets, hidden, shape_of, type_of, width
from exporters.onnx.rope import RotaryTables

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
PAIRS: tuple[Dimension, ...] = ("batch_size", 1, "sequence_length", "total_sequence_length")


@dataclass(frozen=True)
class Shared:
    """What the layers of one kind share: cos and sin of each new token's angles, and which keys each of them sees."""

    cos: ir.Value
    sin: ir.Value
    visible: ir.Value


class Portable(Dialect):
    """Operators of the standard."""

    opsets = Opsets({"": 23}, ir=11)
    shared_cache = False
    blocks = False
    packs = False

    def begin(self, ids: ir.Value, mask: ir.Value, kinds: Mapping[str, Kind]) -> ir.Value:
        queries, keys = self._positions(ids, mask)
        self._shared: dict[str, Shared] = {}
        rotations: dict[str, tuple[ir.Value, ir.Value]] = {}
        for name, kind in kinds.items():
            suffix = kind.rotary.suffix
            if suffix not in rotations:
                rotations[suffix] = self._rotation(queries, kind.rotary)
            self._shared[name] = Shared(*rotations[suffix], self._visible(queries, keys, kind.window, name))
        return ids

    def _positions(self, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(positions of the new tokens, positions of all keys), counted from the first token that is no padding.

        Padded keys are at -1, and so is a padded query before the first token; one after the last token is where that is.

            attention_mask ── CumSum ─┬─ Slice ── Sub 1 ── queries (batch_size, sequence_length)
                           └───────── Mul ─────── Sub 1 ── keys (batch_size, total_sequence_length)
        """
        op, one = self.graph.op, self.graph.constant([1])
        counts = op("CumSum", [mask, self.graph.constant(1)], "positions", ALL, dtype=INT64)
        latest = self._latest(counts, self._length(ids, "positions"), "positions")
        queries = op("Sub", [latest, one], "positions/queries", NEW, dtype=INT64)
        real = op("Mul", [counts, mask], "positions", ALL, dtype=INT64)
        return queries, op("Sub", [real, one], "positions/keys", ALL, dtype=INT64)

    def _rotation(self, positions: ir.Value, rotary: RotaryTables) -> tuple[ir.Value, ir.Value]:
        """cos and sin of position × frequency, in fp32, times the attention scaling.

        positions ── Cast ── Unsqueeze ── Mul frequencies ─┬─ Cos ── Mul scaling ── cos
                                                           └─ Sin ── Mul scaling ── sin
        """
        op, module = self.graph.op, f"rotary{rotary.suffix}"
        shape, count = (*NEW, rotary.frequencies.numel()), rotary.frequencies.numel()
        frequencies = self.graph.weight(f"{module}.frequencies", (count,), lambda: rotary.frequencies, FP32)
        number = op("Cast", [positions], module, NEW, dtype=FLOAT, to=FLOAT.value)
        column = op("Unsqueeze", [number, self.graph.constant([2])], module, (*NEW, 1), dtype=FLOAT)
        angles = op("Mul", [column, frequencies], module, shape, dtype=FLOAT)
        waves = (op(wave, [angles], module, shape, dtype=FLOAT) for wave in ("Cos", "Sin"))
        cos, sin = (self._scaled(wave, rotary.scaling, f"{module}/{i}") for i, wave in enumerate(waves))
        return cos, sin

    def _scaled(self, wave: ir.Value, scaling: float, module: str) -> ir.Value:
        """The wave times the scaling, in the graph's precision."""
        shape = (*NEW, width(wave))
        if scaling != 1.0:
            wave = self.graph.op("Mul", [wave, self.graph.constant(scaling, FLOAT)], module, shape, dtype=FLOAT)
        return self.graph.cast(wave, self.graph.precision.onnx, module)

    def _visible(self, queries: ir.Value, keys: ir.Value, window: int, kind: str) -> ir.Value:
        """Which keys each query attends to, bool (batch_size, 1, sequence_length, total_sequence_length).

        Key position k and query position q: max(min(q, 0) - 1, q - window) < k ≤ q. No key is padding then, but where the
        query is padding before the first token (q = -1), which sees padding: a query that sees nothing has no softmax.
        """
        op, module, one = self.graph.op, f"mask.{kind}", self.graph.constant([1])
        row, column = ("batch_size", 1, 1, "total_sequence_length"), ("batch_size", 1, "sequence_length", 1)
        k = op("Unsqueeze", [keys, self.graph.constant([1, 2])], f"{module}/k", row, dtype=INT64)
        q = op("Unsqueeze", [queries, self.graph.constant([1, 3])], f"{module}/q", column, dtype=INT64)
        first = op("Min", [q, self.graph.constant([0])], module, column, dtype=INT64)
        below = op("Sub", [first, one], f"{module}/padding", column, dtype=INT64)
        if window >= 0:
            outside = op("Sub", [q, self.graph.constant([window])], f"{module}/window", column, dtype=INT64)
            below = op("Max", [below, outside], module, column, dtype=INT64)
        causal = op("LessOrEqual", [k, q], module, PAIRS, dtype=BOOL)
        inside = op("Greater", [k, below], module, PAIRS, dtype=BOOL)
        return op("And", [causal, inside], module, PAIRS, dtype=BOOL)

    def norm(self, x: ir.Value, weight: ir.Value, epsilon: float, module: str) -> ir.Value:
        dtype, shape = type_of(x), shape_of(x)
        return self.graph.op("RMSNormalization", [x, weight], module, shape, dtype=dtype, epsilon=epsilon, axis=-1)

    def skip_norm(
        self, stream: ir.Value, added: ir.Value, weight: ir.Value, epsilon: float, module: str, *, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        total = self.graph.op("Add", [stream, added], module, hidden(width(stream)), dtype=type_of(stream))
        return self.norm(total, weight, epsilon, module), total

    def attention(self, qkv: QKV, past: KeyValue, kind: str, module: str) -> tuple[ir.Value, KeyValue]:
        """Grouped-query attention under an explicit mask.

        q ── RotaryEmbedding ─┐       past key, value
        k ── RotaryEmbedding ─┤            │
        v ────────────────────┴──────── Attention ── attended
                                           │
                                   present key, value

        The operator's own causal mask is not used: where it starts has differed between releases and devices. So has the order
        of cap and mask: before May 2026 (microsoft/onnxruntime#28379) the CPU masked first, which leaves a masked key the
        score -cap. Only models with a cap notice.
        """
        shared, heads = self._shared[kind], self.heads
        q, k, v = qkv
        assert k is not None and v is not None  # this dialect does not pack them
        q = self._rotated(q, heads.query, shared, f"{module}.q")
        k = self._rotated(k, heads.key_value, shared, f"{module}.k")
        attended, key, value = self.graph.op_outputs(
            "Attention",
            [q, k, v, shared.visible, *past],
            module,
            self._attention_outputs(module),
            q_num_heads=heads.query,
            kv_num_heads=heads.key_value,
            scale=heads.scale,
            softcap=heads.cap,
        )
        return attended, (key, value)

    def _rotated(self, x: ir.Value, heads: int, shared: Shared, module: str) -> ir.Value:
        """x with the first channels of each head rotated: as many as there are angles for."""
        inputs, rotated = [x, shared.cos, shared.sin], 2 * width(shared.cos)
        attributes: dict[str, Any] = {"num_heads": heads}
        if rotated != self.heads.width:
            attributes["rotary_embedding_dim"] = rotated
        return self.graph.op("RotaryEmbedding", inputs, module, hidden(width(x)), **attributes)

    def tied_head(self, x: ir.Value, embedding: ir.Value, module: str) -> ir.Value:
        """The file has the matrix once; ONNX Runtime folds the Transpose into a copy while it loads."""
        vocabulary, channels = shape_of(embedding)
        turned = self.graph.op("Transpose", [embedding], module, (channels, vocabulary), perm=[1, 0])
        return self.graph.op("MatMul", [x, turned], module, (*NEW, vocabulary))
