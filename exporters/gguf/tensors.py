"""The tensors of an export: names, shapes and types at once, values one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from exporters.gguf.names import FACTOR_SUFFIXES, Names, interleave
from exporters.gguf.types import FALLBACK, TypeRow, fits, stored_bytes
from sola_edge.architecture import rope_settings, rope_type
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: shape as numpy has it (rows, columns), and how to get its float32 values."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    fallback: bool  # stored in another type than asked, as its rows are no whole blocks
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Stored bytes, without padding."""
        return stored_bytes(self.shape, self.type)


def tensors(checkpoint: Checkpoint, names: Names, row: TypeRow, dense: bool) -> Iterator[Tensor]:
    """All tensors of the file in its order: embedding, layers, final norm, head.

    `dense` multiplies factors out. Reads no weights. Raises UserError for a layout that GGUF cannot hold.
    """
    architecture = checkpoint.architecture
    yield from _module(checkpoint, names, architecture.embedding, row.embedding, dense)
    yield from _rope_frequencies(checkpoint)
    parts = ("attention_norm", "q", "k", "v", "o", "ffn_norm", "gate", "up", "down")
    for i in range(checkpoint.config.num_hidden_layers):
        for part in parts:
            yield from _module(checkpoint, names, architecture.module(i, part), row.matrix, dense)
    yield from _module(checkpoint, names, architecture.final_norm, row.matrix, dense)
    if not checkpoint.tied:
        yield from _module(checkpoint, names, architecture.head, row.embedding, dense)


def _module(
    checkpoint: Checkpoint, names: Names, module: str, qtype: GGMLQuantizationType, dense: bool
) -> Iterator[Tensor]:
    base, heads = names.base(module), names.permuted_heads(module)
    layout = checkpoint.layout.get(module)
    if layout is None:
        name = f"{module}.weight"
        yield _tensor(f"{base}.weight", checkpoint.shape(name), qtype, _reader(checkpoint, name, heads))
    elif dense:

        def recomposed() -> np.ndarray:
            return _permuted(recompose(checkpoint, module, layout), heads)

        yield _tensor(f"{base}.weight", (layout.n_out, layout.n_in), qtype, recomposed)
    else:
        if heads and layout.prime:
            raise UserError(f"{module} has prime rows, which GGUF's order of attention rows cannot hold; use --dense")
        for part, shape in layout.shapes.items():
            read = _reader(checkpoint, f"{module}.{part}", heads if part == "B" else None)
            yield _tensor(f"{base}.{FACTOR_SUFFIXES[part]}", shape, qtype, read)
    bias = checkpoint.bias_name(module)
    if bias:
        yield _tensor(f"{base}.bias", checkpoint.shape(bias), qtype, _reader(checkpoint, bias, heads))


def _tensor(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType, read: Callable[[], np.ndarray]) -> Tensor:
    if len(shape) == 1:
        return Tensor(name, shape, GGMLQuantizationType.F32, False, read)
    fallback = not fits(shape, qtype)
    return Tensor(name, shape, FALLBACK if fallback else qtype, fallback, read)


def _reader(checkpoint: Checkpoint, name: str, heads: int | None) -> Callable[[], np.ndarray]:
    return lambda: _permuted(checkpoint.tensor(name).float(), heads)


def _permuted(values: torch.Tensor, heads: int | None) -> np.ndarray:
    array = values.numpy()
    return interleave(array, heads) if heads else array


def recompose(checkpoint: Checkpoint, module: str, layout: MatrixLayout) -> torch.Tensor:
    """The dense W (n_out, n_in), float32, that a factored matrix stands for."""
    product = checkpoint.tensor(f"{module}.B").float() @ checkpoint.tensor(f"{module}.A").float()
    if not layout.prime:
        return product
    prime = checkpoint.tensor(f"{module}.prime").float()
    return torch.cat([prime, product], dim=0 if layout.split == "out" else 1)


def _rope_frequencies(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Divisors of the RoPE frequencies, (head_dim / 2,), for the scaling that GGUF holds as a tensor: llama3's."""
    config = checkpoint.config
    kind = rope_type(config)
    if kind in ("longrope", "dynamic"):
        raise UserError(f"{checkpoint.path} has RoPE scaling {kind!r}, which the GGUF export does not support")
    if kind != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    theta = rope_settings(config).get("rope_theta") or config.rope_theta
    size = scaled.shape[0]
    plain = 1.0 / theta ** (torch.arange(size, dtype=torch.float32) / size)
    divisors = plain / scaled
    yield _tensor("rope_freqs.weight", (size,), GGMLQuantizationType.F32, divisors.numpy)
