"""The shapes in a file: from them follow the memory that a runtime should take, and the least that a token can cost."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime_checks.artefacts import INTEGERS, Artefact
from sola_edge.architecture import architecture_of, head_dim, kv_heads
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError
from sola_edge.gguf_source import field, open_gguf, stored_tensors

F16, F32 = 2, 4  # bytes


@dataclass(frozen=True)
class Shapes:
    """Of a file.

    weights, embedding: bytes as stored, of all tensors and of the table that tokens are looked up in; shared: that table is
    the output head too. rotations: bytes of tables of the rotary embedding, of which a token needs a row. matrices: parameters
    of the layers' matrices, as many as a token is multiplied by. ffn: of the widest layer. blocks: of an ONNX file, the
    matrices whose weights are in blocks.
    """

    weights: int
    embedding: int
    shared: bool
    rotations: int
    matrices: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    blocks: "tuple[BlockMatrix, ...]" = ()

    @property
    def tied(self) -> int:
        """Bytes of an embedding that is the head too, else 0."""
        return self.embedding if self.shared else 0

    @property
    def kv_values(self) -> int:
        """Values of the cache for every token of context."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decoding step reads: all but a table of which it reads a row."""
        return self.weights - self.rotations - (0 if self.shared else self.embedding)

    def flops(self, tokens: int, scored: int) -> int:
        """Multiplications and additions of a prompt of so many tokens, of which `scored` get logits.

        Two for each weight that a token meets, and two each for the scores and the sums of causal attention.
        """
        attention = 2 * 2 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1) // 2
        return 2 * tokens * self.matrices + 2 * scored * self.vocab * self.hidden + attention


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix of weights in blocks (MatMulNBits): bits of a weight; whether its products are of integers; elements; bytes of
    its values and its scales; whether tokens are looked up in the values too.
    """

    bits: int
    integers: bool
    elements: int
    values: int
    scales: int
    looked_up: bool


def shapes_of(artefact: Artefact) -> Shapes:
    """Raises UserError where the file does not say."""
    return READERS[artefact.kind](artefact.path)


def _of_config(
    config: Any,
    *,
    weights: int,
    embedding: int,
    shared: bool,
    matrices: int,
    rotations: int = 0,
    blocks: tuple[BlockMatrix, ...] = (),
) -> Shapes:
    return Shapes(
        blocks=blocks,
        weights=weights,
        embedding=embedding,
        shared=shared,
        rotations=rotations,
        matrices=matrices,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
    )


def _of_checkpoint(path: Path) -> Shapes:
    """As PyTorch holds it: every parameter in fp32."""
    source = open_checkpoint(path)
    row = architecture_of(source.config)
    ends = (f"{row.embedding}.weight", f"{row.head}.weight")
    shapes = {name: source.shape(name) for name in source.names()}
    matrices = _elements(shape for name, shape in shapes.items() if name not in ends)
    embedding = _elements([shapes[ends[0]]]) * F32
    weights = source.parameters() * F32
    return _of_config(source.config, weights=weights, embedding=embedding, shared=source.tied, matrices=matrices)


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Elements of all that are matrices."""
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)


HEAD, ROTATIONS = "lm_head", ("cos_cache", "sin_cache")  # as our graphs and onnxruntime-genai's builder call them
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
BLOCK_PRODUCT = "MatMulNBits"


def _of_onnx(folder: Path) -> Shapes:
    """Sizes from the graph's nodes and initializers, the rest from the model's config.json beside it."""
    import onnx
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json, from which the shapes are read; put the model's there")
    config = AutoConfig.from_pretrained(folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    rows = {name for name, tensor in stored.items() if tensor.dims[:1] == [config.vocab_size]}
    lookup = next((n for n in graph.node if n.op_type.startswith("Gather") and rows & set(n.input)), None)
    table = [name for name in lookup.input if name in stored] if lookup else []
    shared = any(set(table) & set(node.input) for node in graph.node if node is not lookup)
    head = (HEAD, *table)
    return _of_config(
        config,
        weights=sum(map(_bytes, stored.values())),
        embedding=sum(_bytes(stored[name]) for name in table),
        shared=shared,
        rotations=sum(_bytes(tensor) for name, tensor in stored.items() if name.startswith(ROTATIONS)),
        matrices=sum(_product(n, stored) for n in graph.node if not any(i.startswith(head) for i in n.input)),
        blocks=tuple(_block_matrix(n, stored, table) for n in graph.node if n.op_type == BLOCK_PRODUCT),
    )


def _block_matrix(node: Any, stored: dict[str, Any], table: list[str]) -> BlockMatrix:
    """table: names of what tokens are looked up in."""
    made = {a.name: a.i for a in node.attribute}
    _, values, scales, *_ = node.input
    return BlockMatrix(
        bits=made.get("bits", 4),
        integers=made.get("accuracy_level") == INTEGERS,
        elements=_product(node, stored),
        values=_bytes(stored[values]),
        scales=_bytes(stored[scales]),
        looked_up=values in table,
    )


def _product(node: Any, stored: dict[str, Any]) -> int:
    """Weights that a node multiplies by, where it is such a product."""
    if node.op_type == BLOCK_PRODUCT:
        sizes = {a.name: a.i for a in node.attribute}
        return int(sizes["K"] * sizes["N"])
    if node.op_type not in PRODUCTS:
        return 0
    return _elements(tuple(stored[name].dims) for name in node.input if name in stored)


def _bytes(tensor: Any) -> int:
    from onnx import helper

    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


VOCABULARY = ("token_embd.", "output.")


def _of_gguf(path: Path) -> Shapes:
    reader = open_gguf(path)
    name = field(reader, "general.architecture")
    tensors = {tensor.name: tensor for tensor in stored_tensors(path)}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no token_embd.weight, so it is no model; export it again")
    wide: dict[str, int] = {}
    for key in (
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "embedding_length",
        "feed_forward_length",
    ):
        found = field(reader, f"{name}.{key}")
        if found is None and key != "attention.head_count_kv":
            raise UserError(f"{path} has no {name}.{key} in its metadata; export it again")
        wide[key] = int(np.max(found)) if found is not None else wide["attention.head_count"]
    layers = (tuple(map(int, t.shape)) for t in tensors.values() if not t.name.startswith(VOCABULARY))
    return Shapes(
        weights=sum(int(tensor.n_bytes) for tensor in tensors.values()),
        embedding=int(tensors["token_embd.weight"].n_bytes),
        shared="output.weight" not in tensors,
        rotations=0,
        matrices=_elements(layers),
        layers=wide["block_count"],
        heads=wide["attention.head_count"],
        kv_heads=wide["attention.head_count_kv"],
        head_dim=field(reader, f"{name}.attention.key_length")
        or wide["embedding_length"] // wide["attention.head_count"],
        hidden=wide["embedding_length"],
        ffn=wide["feed_forward_length"],
        vocab=len(field(reader, "tokenizer.ggml.tokens")),
    )


READERS: dict[str, Callable[[Path], Shapes]] = {"checkpoint": _of_checkpoint, "onnx": _of_onnx, "gguf": _of_gguf}
