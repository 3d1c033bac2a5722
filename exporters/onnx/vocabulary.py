"""Both ends of the model: rows of the embedding for token ids, and logits from the last hidden states.

A tied embedding is stored once, whole or in blocks: its rows are looked up where the head's matrix lies.
"""

from functools import partial

import onnx_ir as ir

from exporters.onnx.blocks import Blocks
from exporters.onnx.dialect import Dialect
from exporters.onnx.graph import MICROSOFT, GraphBuilder, Precision, hidden
from exporters.onnx.products import BlockProducts, Matrix, WholeProducts
from sola_edge.checkpoint import Checkpoint


class Vocabulary:
    """stream: the precision of the residual stream. blocks: how the head, and with it a tied embedding, is quantized; None
    leaves both in the graph's own type.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        checkpoint: Checkpoint,
        dialect: Dialect,
        stream: Precision,
        blocks: Blocks | None = None,
    ) -> None:
        self.graph = graph
        self.stream = stream
        self.checkpoint = checkpoint
        self.dialect = dialect
        self.names = checkpoint.architecture
        self.hidden = checkpoint.config.hidden_size
        self.products = BlockProducts(graph, blocks) if blocks else None

    def embedding(self, ids: ir.Value) -> ir.Value:
        """(batch, sequence, hidden) in the stream's precision, scaled where the architecture has it so."""
        module, shape = self.names.embedding, hidden(self.hidden)
        if self.checkpoint.tied and self.products:
            embedded = self._looked_up(ids, module)
        else:
            embedded = self.graph.op("Gather", [self._whole(module), ids], module, shape, axis=0)
        embedded = self.graph.cast(embedded, self.stream.onnx, module)
        if not self.names.scaled_embedding:
            return embedded
        scale = self.graph.constant(self.hidden**0.5, self.stream.onnx)
        return self.graph.op("Mul", [embedded, scale], module, shape, dtype=self.stream.onnx)

    def head(self, x: ir.Value) -> ir.Value:
        """Logits, below the model's cap if it has one. A tied head is the embedding itself.

        head ── (Div cap ── Tanh ── Mul cap) ── logits
        """
        module, shape = self.names.head, hidden(self.checkpoint.config.vocab_size)
        logits = self._product(x, module)
        cap = getattr(self.checkpoint.config, "final_logit_softcapping", None)
        if not cap:
            return logits
        inner = self.graph.op("Div", [logits, self._number(cap)], f"{module}.cap", shape)
        bent = self.graph.op("Tanh", [inner], f"{module}.cap", shape)
        return self.graph.op("Mul", [bent, self._number(cap)], f"{module}.cap", shape)

    def _product(self, x: ir.Value, module: str) -> ir.Value:
        stored = self.names.embedding if self.checkpoint.tied else module
        if self.products:
            return self.products(module, x, Matrix.of(self.checkpoint, f"{stored}.weight"))
        if self.checkpoint.tied:
            return self.dialect.tied_head(x, self._whole(stored), module)
        return WholeProducts(self.graph)(module, x, Matrix.of(self.checkpoint, f"{stored}.weight"))

    def _number(self, value: float) -> ir.Value:
        return self.graph.constant(value, self.graph.precision.onnx)

    def _whole(self, module: str) -> ir.Value:
        name = f"{module}.weight"
        return self.graph.weight(name, self.checkpoint.shape(name), partial(self.checkpoint.tensor, name))

    def _looked_up(self, ids: ir.Value, module: str) -> ir.Value:
        """Rows of the head's blocks (vocabulary, blocks, bytes), made whole where they are looked up.

        ids ── GatherBlockQuantized ── (batch, sequence, blocks, size) ── Reshape ── (batch, sequence, hidden)
        """
        assert self.products is not None
        blocks = self.products.blocks
        stored = self.products.stored(Matrix.of(self.checkpoint, f"{module}.weight"))
        vocabulary, count = blocks.shapes(self.checkpoint.config.vocab_size, self.hidden)["scales"]
        inputs = [stored["values"], ids]
        for part in ("scales", "zeros"):
            if part in stored:
                value = stored[part]
                shape, dtype = (vocabulary, count, 1), value.dtype
                axes = self.graph.constant([2])
                inputs.append(self.graph.op("Unsqueeze", [value, axes], f"{module}.{part}", shape, dtype=dtype))
        rows = self.graph.op(
            "GatherBlockQuantized",
            inputs,
            module,
            ("batch_size", "sequence_length", count, blocks.size),
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.size,
            gather_axis=0,
            quantize_axis=2,
        )
        together = self.graph.constant([0, 0, self.hidden])
        return self.graph.op("Reshape", [rows, together], module, hidden(self.hidden))
