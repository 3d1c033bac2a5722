"""The graph that ONNX Runtime's LLM users run: opset 21 with com.microsoft's attention and normalization.

Inputs input_ids, attention_mask and past_key_values.N.key/value, outputs logits and present.N.key/value, all named and
shaped as onnxruntime-genai expects; the runtime may bind past and present of a layer to one shared buffer.
"""

from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.graph import MICROSOFT, GraphBuilder, hidden, width
from exporters.onnx.linear import Linears, Pieces
from exporters.onnx.precision import Weights
from exporters.onnx.rope import rotary_tables
from exporters.onnx.vocabulary import Vocabulary
from sola_edge.architecture import head_dim, kv_heads
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
HEAD_MULTIPLE = 16  # of channels per head that GroupQueryAttention can rotate
WINDOWED = ("mistral",)  # model types whose `sliding_window` transformers obeys


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares: lengths from the mask, and the rotary tables."""

    seqlens_k: ir.Value
    total_length: ir.Value
    cos: ir.Value
    sin: ir.Value


class Decoder:
    """Builds the graph of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, graph: GraphBuilder, weights: Weights) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.names = checkpoint.architecture
        self.graph = graph
        self.linear = Linears(graph, checkpoint, weights.products(graph))
        self.vocabulary = Vocabulary(graph, checkpoint, weights.head)
        self.heads = self.config.num_attention_heads
        self.kv_heads = kv_heads(self.config)
        self.head_dim = head_dim(self.config)
        if self.head_dim % HEAD_MULTIPLE:
            raise UserError(
                f"{checkpoint.path}: attention heads of {self.head_dim} channels cannot be exported to the genai graph "
                f"(ONNX Runtime's attention rotates multiples of {HEAD_MULTIPLE} only)"
            )

    def build(self) -> None:
        """Nodes of the whole model.

        A residual stream: each normalization adds its module's output to the stream and passes the sum on.

            input_ids ─ embedding ─ norm ─ attention ─ add+norm ─ FFN ─ add+norm ─ … ─ add+norm ─ head ─ logits
        """
        ids = self.graph.input("input_ids", INT64, ("batch_size", "sequence_length"))
        mask = self.graph.input("attention_mask", INT64, ("batch_size", "total_sequence_length"))
        pasts = [(self._past(i, "key"), self._past(i, "value")) for i in range(self.checkpoint.layers)]
        shared = self._attention_inputs(mask)
        stream = self.vocabulary.embedding(ids)
        added: ir.Value | None = None
        presents = []
        for i, past in enumerate(pasts):
            x, stream = self._norm(self.names.module(i, "attention_norm"), stream, added)
            added, present = self._attention(i, x, past, shared)
            x, stream = self._norm(self.names.module(i, "ffn_norm"), stream, added)
            added = self._ffn(i, x)
            presents.append(present)
        x, _ = self._norm(self.names.final_norm, stream, added)
        self.graph.output(self.vocabulary.head(x), "logits")
        for i, (key, value) in enumerate(presents):
            self.graph.output(key, f"present.{i}.key")
            self.graph.output(value, f"present.{i}.value")

    def _past(self, layer: int, part: str) -> ir.Value:
        shape = ("batch_size", self.kv_heads, "past_sequence_length", self.head_dim)
        return self.graph.input(f"past_key_values.{layer}.{part}", self.graph.precision.onnx, shape)

    def _attention_inputs(self, mask: ir.Value) -> AttentionInputs:
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
        tables = rotary_tables(self.config)
        return AttentionInputs(
            seqlens_k=op("Cast", [last], f"{module}/seqlens_k", batch, dtype=INT32, to=INT32.value),
            total_length=op("Cast", [longest], f"{module}/total_length", (), dtype=INT32, to=INT32.value),
            cos=self.graph.weight("cos_cache", tables.shape, tables.cos),
            sin=self.graph.weight("sin_cache", tables.shape, tables.sin),
        )

    def _stored(self, name: str) -> ir.Value:
        """A tensor of the checkpoint as it is."""
        return self.graph.weight(name, self.checkpoint.shape(name), lambda: self.checkpoint.tensor(name))

    def _norm(self, module: str, stream: ir.Value, added: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """(normalized, stream) of stream + added by RMSNorm.

        The first one has nothing to add. com.microsoft has no RMSNorm without a skip input, and the operator that others
        write there is in no ONNX standard, so it is spelled out; ONNX Runtime fuses it back into one kernel.

            x ─┬─ Pow 2 ─ ReduceMean ─ Add ε ─ Sqrt ─┐
               └───────────────────────────────────── Div ─ Mul weight
        """
        op, shape = self.graph.op, hidden(self.config.hidden_size)
        weight = self._stored(f"{module}.weight")
        epsilon = float(self.config.rms_norm_eps)
        if added is not None:
            dtype = self.graph.precision.onnx
            outputs = [(f"{module}/output", dtype, shape), None, None, (f"{module}/stream", dtype, shape)]
            if module == self.names.final_norm:
                outputs = outputs[:1]
            kind = "SkipSimplifiedLayerNormalization"
            inputs = [stream, added, weight]
            made = self.graph.op_outputs(kind, inputs, module, outputs, domain=MICROSOFT, epsilon=epsilon)
            return made[0], made[-1]
        dtype = self.graph.precision.onnx
        square = op("Pow", [stream, self.graph.constant(2.0, dtype)], module, shape)
        mean = op("ReduceMean", [square, self.graph.constant([-1])], module, hidden(1), keepdims=1)
        root = op(
            "Sqrt", [op("Add", [mean, self.graph.constant(epsilon, dtype)], module, hidden(1))], module, hidden(1)
        )
        return op("Mul", [op("Div", [stream, root], module, shape), weight], module, shape), stream

    def _attention(
        self, layer: int, x: ir.Value, past: tuple[ir.Value, ir.Value], shared: AttentionInputs
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """(output, (present key, present value)) of grouped-query attention with rotation inside the operator.

        x ─┬─ q ─┐       past key, value
           ├─ k ─┤            │
           └─ v ─┴─ GroupQueryAttention ─ o ─ output
                              │
                        present key, value
        """
        q, k, v = (self.linear(self.names.module(layer, part), (x,)) for part in "qkv")
        module = self.names.module(layer, "q").rsplit(".", 1)[0]
        dtype = self.graph.precision.onnx
        cache = ("batch_size", self.kv_heads, "total_sequence_length", self.head_dim)
        attended, key, value = self.graph.op_outputs(
            "GroupQueryAttention",
            [q, k, v, *past, shared.seqlens_k, shared.total_length, shared.cos, shared.sin],
            module,
            [
                (f"{module}/output", dtype, hidden(self.heads * self.head_dim)),
                (f"{module}/key", dtype, cache),
                (f"{module}/value", dtype, cache),
            ],
            domain=MICROSOFT,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.head_dim**-0.5,
            local_window_size=self._window(),
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self.linear(self.names.module(layer, "o"), (attended,)), (key, value)

    def _window(self) -> int:
        """Number of keys that a query sees, itself included; -1 is all of them."""
        window = getattr(self.config, "sliding_window", None) if self.config.model_type in WINDOWED else None
        return window or -1

    def _ffn(self, layer: int, x: ir.Value) -> ir.Value:
        """down(act(gate x) · up x). With gate, up and down factored at one prime count p, two parallel branches:

            x ─┬─ gate.prime ─ act ─┐
               ├─ up.prime ──────── Mul ─ down.prime ─────────┐
               ├─ gate's low rank ─ act ─┐                     Add ─ output
               └─ up's low rank ──────── Mul ─ down's low rank ┘

        and with any mixture of whole and factored matrices the same, joined or cut where two of them differ.
        """
        gate_name, up_name, down_name = (self.names.module(layer, part) for part in ("gate", "up", "down"))
        gate, up = self.linear.pieces(gate_name, (x,)), self.linear.pieces(up_name, (x,))
        if tuple(map(width, gate)) != tuple(map(width, up)):
            gate, up = (self.linear.join(gate, gate_name),), (self.linear.join(up, up_name),)
        products: Pieces = ()
        for i, (g, u) in enumerate(zip(gate, up, strict=True)):
            module = gate_name.rsplit(".", 1)[0] + ("" if len(gate) == 1 else (".prime", ".marginal")[i])
            products += (self.graph.op("Mul", [self._activation(g, module), u], module, hidden(width(g))),)
        return self.linear(down_name, products)

    def _activation(self, x: ir.Value, module: str) -> ir.Value:
        shape = hidden(width(x))
        match self.config.hidden_act:
            case "silu" | "swish":
                return self.graph.op(
                    "Mul", [x, self.graph.op("Sigmoid", [x], module, shape)], f"{module}.act_fn", shape
                )
            case "gelu":
                return self.graph.op("Gelu", [x], module, shape)
            case "gelu_pytorch_tanh" | "gelu_new":
                return self.graph.op("Gelu", [x], module, shape, approximate="tanh")
            case "relu":
                return self.graph.op("Relu", [x], module, shape)
            case other:
                raise UserError(
                    f"the activation {other!r} cannot be exported to ONNX (supported: silu, gelu, gelu_pytorch_tanh, relu)"
                )
