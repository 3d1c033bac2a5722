"""The graph that ONNX Runtime's LLM users run: opset 21 with com.microsoft's attention and normalization.

The runtime may bind past and present of a layer to one shared buffer. com.microsoft's attention wants the tokens of a sequence
to stand before its padding, so those that are padded on the left are turned around at the start and back before the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.dialect import INT64, NEW, QKV, Dialect, KeyValue, Kind
from exporters.onnx.graph import MICROSOFT, Opsets, hidden, shape_of, type_of, width

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclass(frozen=True)
class Rotation:
    """Rotary tables and the window of the layers of one kind."""

    cos: ir.Value
    sin: ir.Value
    window: int


class GenAI(Dialect):
    """com.microsoft's operators."""

    opsets = Opsets({"": 21, MICROSOFT: 1}, ir=10)
    shared_cache = True
    blocks = True
    packs = True

    def begin(self, ids: ir.Value, mask: ir.Value, kinds: Mapping[str, Kind]) -> ir.Value:
        self._lengths(mask)
        self._rotations = {name: self._rotation(kind) for name, kind in kinds.items()}
        return self._tokens_first(ids, mask)

    def _lengths(self, mask: ir.Value) -> None:
        """Key length of each sequence (less one, as the operator wants it) and of the longest, both int32.

        attention_mask ─┬─ ReduceSum ─ Sub 1 ─ Cast ── seqlens_k (batch_size,)
                        └─ Shape ─ Gather 1 ─ Cast ─── total_length ()
        """
        op, module = self.graph.op, "attention_mask"
        batch = ("batch_size",)
        total = op("ReduceSum", [mask, self.graph.constant([1])], module, batch, dtype=INT64, keepdims=0)
        last = op("Sub", [total, self.graph.constant([1])], module, batch, dtype=INT64)
        shape = op("Shape", [mask], module, (2,), dtype=INT64)
        longest = op("Gather", [shape, self.graph.constant(1)], module, (), dtype=INT64, axis=0)
        self._seqlens_k = op("Cast", [last], f"{module}/seqlens_k", batch, dtype=INT32, to=INT32.value)
        self._total_length = op("Cast", [longest], f"{module}/total_length", (), dtype=INT32, to=INT32.value)

    def _rotation(self, kind: Kind) -> Rotation:
        tables = kind.rotary
        cos = self.graph.weight(f"cos_cache{tables.suffix}", tables.shape, tables.cos)
        sin = self.graph.weight(f"sin_cache{tables.suffix}", tables.shape, tables.sin)
        return Rotation(cos, sin, kind.window)

    def _tokens_first(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """The new tokens of each sequence rotated by its padding on the left, p: token i of the result is (i + p) mod n.

        attention_mask ── Slice: the last n ── Cast ── ArgMax ── p (batch_size, 1)

        Without padding, and with padding on the right, p is 0: a decoded token stays where it is.
        """
        op, module = self.graph.op, "padding"
        self._count = self._length(ids, module)
        new = self._latest(mask, self._count, module)
        number = op("Cast", [new], module, NEW, dtype=FLOAT, to=FLOAT.value)  # CUDA's ArgMax knows no integers
        self._padding = op("ArgMax", [number], module, ("batch_size", 1), dtype=INT64, axis=1, keepdims=1)
        length = op("Squeeze", [self._count], module, (), dtype=INT64)
        limits = [self.graph.constant(0), length, self.graph.constant(1)]
        self._indices = op("Range", limits, module, ("sequence_length",), dtype=INT64)
        moved = op("Add", [self._indices, self._padding], module, NEW, dtype=INT64)
        order = op("Mod", [moved, self._count], module, NEW, dtype=INT64)
        return op("GatherElements", [ids, order], module, NEW, dtype=INT64, axis=1)

    def end(self, x: ir.Value) -> ir.Value:
        """Rotated back: position i comes from (i - p) mod n, which ONNX gives the sign of n."""
        op, module = self.graph.op, "padding/back"
        moved = op("Sub", [self._indices, self._padding], module, NEW, dtype=INT64)
        order = op("Mod", [moved, self._count], module, NEW, dtype=INT64)
        places = op("Unsqueeze", [order, self.graph.constant([2])], module, (*NEW, 1), dtype=INT64)
        return op("GatherND", [x, places], module, hidden(width(x)), batch_dims=1)

    def norm(self, x: ir.Value, weight: ir.Value, epsilon: float, module: str) -> ir.Value:
        """com.microsoft has no RMSNorm without a skip input, and the operator that others write is in no ONNX standard.

        So it is spelled out; ONNX Runtime fuses it back into one kernel. Squares need fp32, whatever the graph's precision.

            x ─ (Cast) ─┬─ Pow 2 ─ ReduceMean ─ Add ε ─ Sqrt ─┐
                        └───────────────────────────────────── Div ─ (Cast) ─ Mul weight
        """
        op, dtype, shape = self.graph.op, type_of(x), shape_of(x)
        single = (*shape[:-1], 1)
        x = self.graph.cast(x, FLOAT, f"{module}/fp32")
        square = op("Pow", [x, self.graph.constant(2.0, FLOAT)], module, shape, dtype=FLOAT)
        mean = op("ReduceMean", [square, self.graph.constant([-1])], module, single, dtype=FLOAT, keepdims=1)
        shifted = op("Add", [mean, self.graph.constant(epsilon, FLOAT)], module, single, dtype=FLOAT)
        root = op("Sqrt", [shifted], module, single, dtype=FLOAT)
        normal = self.graph.cast(op("Div", [x, root], module, shape, dtype=FLOAT), dtype, module)
        return op("Mul", [normal, weight], module, shape, dtype=dtype)

    def skip_norm(
        self, stream: ir.Value, added: ir.Value, weight: ir.Value, epsilon: float, module: str, *, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        dtype, shape = type_of(stream), hidden(width(stream))
        outputs = [(f"{module}/output", dtype, shape), None, None, (f"{module}/stream", dtype, shape)]
        made = self.graph.op_outputs(
            "SkipSimplifiedLayerNormalization",
            [stream, added, weight],
            module,
            outputs[:1] if last else outputs,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return made[0], made[-1]

    def attention(self, qkv: QKV, past: KeyValue, kind: str, module: str) -> tuple[ir.Value, KeyValue]:
        """Grouped-query attention with rotation inside the operator.

        q ─┐       past key, value
        k ─┤            │
        v ─┴─ GroupQueryAttention ── attended
                        │
                present key, value
        """
        rotation, heads = self._rotations[kind], self.heads
        capped = {"softcap": heads.cap} if heads.cap else {}
        attended, key, value = self.graph.op_outputs(
            "GroupQueryAttention",
            [*qkv, *past, self._seqlens_k, self._total_length, rotation.cos, rotation.sin],
            module,
            self._attention_outputs(module),
            domain=MICROSOFT,
            num_heads=heads.query,
            kv_num_heads=heads.key_value,
            scale=heads.scale,
            local_window_size=rotation.window,
            do_rotary=1,
            rotary_interleaved=0,
            **capped,
        )
        return attended, (key, value)

    def tied_head(self, x: ir.Value, embedding: ir.Value, module: str) -> ir.Value:
        shape = (*NEW, shape_of(embedding)[0])
        return self.graph.op("FusedMatMul", [x, embedding], module, shape, domain=MICROSOFT, transB=1)
