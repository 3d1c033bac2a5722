"""What a decoder computes, layer after layer, whatever its architecture; a dialect says in which operators.

Inputs input_ids, attention_mask and past_key_values.N.key/value, outputs logits and present.N.key/value, all named and
shaped as onnxruntime-genai and optimum expect. What architectures differ in is read from their row and the model's config.
"""

import onnx_ir as ir
import torch

from exporters.onnx.dialect import QKV, Dialect, Heads, KeyValue, Kind
from exporters.onnx.grams import Grams
from exporters.onnx.graph import FP32, GraphBuilder, Precision, hidden, width
from exporters.onnx.linear import Linears, Pieces
from exporters.onnx.precision import Weights
from exporters.onnx.rope import rotary_tables
from exporters.onnx.vocabulary import Vocabulary
from sola_edge.architecture import (
    SLIDING,
    activation,
    attention_cap,
    attention_kinds,
    attention_scale,
    head_dim,
    kv_heads,
)
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

INT64 = ir.DataType.INT64


class Decoder:
    """Builds the graph of one checkpoint in the operators of one dialect."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: GraphBuilder,
        dialect: type[Dialect],
        weights: Weights,
        grams: Grams | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.names = checkpoint.architecture
        self.graph = graph
        self.linear = Linears(graph, checkpoint, weights.products(graph, grams))
        self.kinds = attention_kinds(self.config)
        self.heads = Heads(
            query=self.config.num_attention_heads,
            key_value=kv_heads(self.config),
            width=head_dim(self.config),
            scale=attention_scale(self.config),
            cap=attention_cap(self.config) or 0.0,
        )
        self.dialect = dialect(graph, self.heads)
        self.stream = FP32 if self.names.wide_stream else graph.precision
        self.vocabulary = Vocabulary(graph, checkpoint, self.dialect, self.stream, weights.head)

    def build(self) -> None:
        """Nodes of the whole model.

        A residual stream: each normalization adds its module's output to the stream and passes the sum on.

            input_ids ─ embedding ─ norm ─ attention ─ add+norm ─ FFN ─ add+norm ─ … ─ add+norm ─ head ─ logits

        An architecture may normalize what attention and FFN give once more before it is added. Where the stream outgrows
        fp16, it and its norms are fp32 in a graph of fp16.
        """
        ids = self.graph.input("input_ids", INT64, ("batch_size", "sequence_length"))
        mask = self.graph.input("attention_mask", INT64, ("batch_size", "total_sequence_length"))
        pasts = [(self._past(i, "key"), self._past(i, "value")) for i in range(self.checkpoint.layers)]
        kinds = {kind: self._kind(kind) for kind in dict.fromkeys(self.kinds)}
        stream = self.vocabulary.embedding(self.dialect.begin(ids, mask, kinds))
        added: ir.Value | None = None
        presents = []
        for i, past in enumerate(pasts):
            x, stream = self._add_and_norm(self.names.module(i, "attention_norm"), stream, added)
            attended, present = self._attention(i, x, past)
            added = self._post_norm(i, 0, attended)
            x, stream = self._add_and_norm(self.names.module(i, "ffn_norm"), stream, added)
            added = self._post_norm(i, 1, self._ffn(i, x))
            presents.append(present)
        x, _ = self._add_and_norm(self.names.final_norm, stream, added)
        logits = self.vocabulary.head(self.dialect.end(x))
        if self.graph.precision.wide_logits:
            logits = self.graph.cast(logits, FP32.onnx, "logits")
        self.graph.output(logits, "logits")
        for i, (key, value) in enumerate(presents):
            self.graph.output(key, f"present.{i}.key")
            self.graph.output(value, f"present.{i}.value")

    def _past(self, layer: int, part: str) -> ir.Value:
        shape = ("batch_size", self.heads.key_value, "past_sequence_length", self.heads.width)
        return self.graph.input(f"past_key_values.{layer}.{part}", self.graph.precision.onnx, shape)

    def _kind(self, kind: str) -> Kind:
        window = self.config.sliding_window if kind == SLIDING else None
        return Kind(window or -1, rotary_tables(self.config, kind))

    def _add_and_norm(self, module: str, stream: ir.Value, added: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """(normalized, stream) of stream + added by RMSNorm; the first norm has nothing to add."""
        if added is None:
            return self.graph.cast(self._norm(module, stream), self.graph.precision.onnx, module), stream
        weight, epsilon = self._norm_weight(module, self.stream), float(self.config.rms_norm_eps)
        last, added = module == self.names.final_norm, self.graph.cast(added, self.stream.onnx, f"{module}/added")
        x, stream = self.dialect.skip_norm(stream, added, weight, epsilon, module, last=last)
        return self.graph.cast(x, self.graph.precision.onnx, module), stream

    def _post_norm(self, layer: int, place: int, x: ir.Value) -> ir.Value:
        """What attention (place 0) or FFN (1) gives, normalized where the architecture has it so."""
        if not self.names.post_norms:
            return x
        module = f"{self.names.layer.format(layer)}.{self.names.extra_norms[place]}"
        return self._norm(module, self.graph.cast(x, self.stream.onnx, f"{module}/input"))

    def _norm(self, module: str, x: ir.Value, precision: Precision | None = None) -> ir.Value:
        """Of x in the stream's precision unless another is given."""
        weight = self._norm_weight(module, precision or self.stream)
        return self.dialect.norm(x, weight, float(self.config.rms_norm_eps), module)

    def _norm_weight(self, module: str, precision: Precision) -> ir.Value:
        """What the norm multiplies by: the stored weight, or 1 more."""
        name = f"{module}.weight"
        return self.graph.weight(name, self.checkpoint.shape(name), lambda: self._multiplier(name), precision)

    def _multiplier(self, name: str) -> torch.Tensor:
        stored = self.checkpoint.tensor(name)
        return stored.float() + 1 if self.names.unit_norms else stored

    def _attention(self, layer: int, x: ir.Value, past: KeyValue) -> tuple[ir.Value, KeyValue]:
        """(output, (present key, present value)).

        x ─┬─ q ─ (norm) ─┐       past key, value
           ├─ k ─ (norm) ─┤            │
           └─ v ──────────┴── rotation, attention ─ o ─ output
                                       │
                               present key, value
        """
        o = self.names.module(layer, "o")
        attended, present = self.dialect.attention(self._qkv(layer, x), past, self.kinds[layer], o.rsplit(".", 1)[0])
        return self.linear(o, (attended,)), present

    def _qkv(self, layer: int, x: ir.Value) -> QKV:
        """q, k (normalized by head where the architecture has it so) and v; packed where the dialect takes them so."""
        modules = [self.names.module(layer, part) for part in "qkv"]
        if self.dialect.packs and not self.names.head_norms:
            together = self.linear.packed(modules, x)
            if together is not None:
                return together, None, None
        pieces = self.linear.shared(modules, x)
        q, k, v = (self.linear.join(found, module) for module, found in zip(modules, pieces, strict=True))
        if self.names.head_norms:
            q_norm, k_norm = (f"{self.names.layer.format(layer)}.{norm}" for norm in self.names.head_norms)
            q, k = self._head_norm(q_norm, q), self._head_norm(k_norm, k)
        return q, k, v

    def _head_norm(self, module: str, x: ir.Value) -> ir.Value:
        """x ── Reshape: a row for each head ── norm ── Reshape back."""
        channels, (heads, rest) = width(x), divmod(width(x), self.heads.width)
        assert rest == 0
        apart = ("batch_size", "sequence_length", heads, self.heads.width)
        sizes = self.graph.constant((0, 0, heads, self.heads.width))
        rows = self.graph.op("Reshape", [x, sizes], f"{module}/heads", apart)
        sizes = self.graph.constant((0, 0, channels))
        return self.graph.op(
            "Reshape", [self._norm(module, rows, self.graph.precision), sizes], module, hidden(channels)
        )

    def _ffn(self, layer: int, x: ir.Value) -> ir.Value:
        """down(act(gate x) · up x). With gate, up and down factored at one prime count p, two parallel branches:

            x ─┬─ gate.prime ─ act ─┐
               ├─ up.prime ──────── Mul ─ down.prime ─────────┐
               ├─ gate's low rank ─ act ─┐                     Add ─ output
               └─ up's low rank ──────── Mul ─ down's low rank ┘

        and with any mixture of whole and factored matrices the same, joined or cut where two of them differ.
        """
        gate_name, up_name, down_name = (self.names.module(layer, part) for part in ("gate", "up", "down"))
        gate, up = self._gate_and_up(gate_name, up_name, x)
        if tuple(map(width, gate)) != tuple(map(width, up)):
            gate, up = (self.linear.join(gate, gate_name),), (self.linear.join(up, up_name),)
        products: Pieces = ()
        for i, (g, u) in enumerate(zip(gate, up, strict=True)):
            module = down_name.rsplit(".", 1)[0] + ("" if len(gate) == 1 else (".prime", ".marginal")[i])
            products += (self.graph.op("Mul", [self._activation(g, module), u], module, hidden(width(g))),)
        return self.linear(down_name, products)

    def _gate_and_up(self, gate: str, up: str, x: ir.Value) -> list[Pieces]:
        """Stacked where one is factored: many small products cost more than their split, two large ones do not."""
        if self.linear.factored(gate) or self.linear.factored(up):
            return self.linear.shared((gate, up), x)
        return [self.linear.pieces(gate, (x,)), self.linear.pieces(up, (x,))]

    def _activation(self, x: ir.Value, module: str) -> ir.Value:
        shape = hidden(width(x))
        match activation(self.config):
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
