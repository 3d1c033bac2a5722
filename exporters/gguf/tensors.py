"""The tensors of an export: names, shapes and types at once, values one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from gguf import GGMLQuantizationType

from exporters.gguf.forms import Form, bias, expands, parts
from exporters.gguf.names import Names, interleave
from exporters.gguf.types import FALLBACK, TypeRow, fits, stored_bytes
from sola_edge.architecture import rope_settings, rope_type
from sola_edge.checkpoint import Checkpoint
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


def tensors(checkpoint: Checkpoint, names: Names, row: TypeRow, form: Form) -> Iterator[Tensor]:
    """All tensors of the file in its order: embedding, layers, final norm, head. Reads no weights.

    Raises UserError for RoPE scaling that GGUF cannot hold.
    """
    architecture = checkpoint.architecture
    yield from _module(checkpoint, names, architecture.embedding, row.embedding, form)
    yield from _rope_frequencies(checkpoint)
    components = ("attention_norm", "q", "k", "v", "o", "ffn_norm", "gate", "up", "down")
    for i in range(checkpoint.config.num_hidden_layers):
        for component in components:
            yield from _module(checkpoint, names, architecture.module(i, component), row.matrix, form)
    yield from _module(checkpoint, names, architecture.final_norm, row.matrix, form)
    if not checkpoint.tied:
        yield from _module(checkpoint, names, architecture.head, row.embedding, form)


def expanded(checkpoint: Checkpoint, names: Names, form: Form, rounds: bool) -> tuple[str, ...]:
    """GGUF names of the matrices that are larger in the file than in the checkpoint; see forms.expands."""
    return tuple(
        names.base(module)
        for module, row in checkpoint.layout.items()
        if expands(form, row, bool(names.permuted_heads(module)), rounds)
    )


def _module(
    checkpoint: Checkpoint, names: Names, module: str, qtype: GGMLQuantizationType, form: Form
) -> Iterator[Tensor]:
    base, heads = names.base(module), names.permuted_heads(module)
    if module in checkpoint.layout:
        for part in parts(checkpoint, module, form, bool(heads)):
            read = _reader(part.read, heads if part.outputs else None)
            yield _tensor(f"{base}.{part.suffix}", part.shape, qtype, read)
    else:
        name = f"{module}.weight"
        yield _tensor(f"{base}.weight", checkpoint.shape(name), qtype, _reader(partial(checkpoint.tensor, name), heads))
    name_of_bias = checkpoint.bias_name(module)
    if name_of_bias:
        shape, values = bias(checkpoint, name_of_bias, form)
        yield _tensor(f"{base}.bias", shape, qtype, _reader(values, heads))


def _tensor(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType, read: Callable[[], np.ndarray]) -> Tensor:
    if len(shape) == 1:
        return Tensor(name, shape, GGMLQuantizationType.F32, False, read)
    fallback = not fits(shape, qtype)
    return Tensor(name, shape, FALLBACK if fallback else qtype, fallback, read)


def _reader(read: Callable[[], torch.Tensor], heads: int | None) -> Callable[[], np.ndarray]:
    """Float32 values; `heads`: with the rows of each head in interleaved pairs."""

    def values() -> np.ndarray:
        array = read().float().numpy()
        return interleave(array, heads) if heads else array

    return values


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
