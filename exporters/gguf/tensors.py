"""The tensors of an export: names, shapes and types at once, values one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from exporters.gguf.forms import B_FACTOR, Form, bias, expands, parts
from exporters.gguf.names import Names, interleave
from exporters.gguf.rope import rope_divisors
from exporters.gguf.types import FALLBACK, TypeRow, fits, stored_bytes
from sola_edge.architecture import COMPONENTS, rotated_channels
from sola_edge.checkpoint import Checkpoint


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
    """All tensors of the file in its order: embedding, layers, final norm, head. Reads no weights."""
    architecture = checkpoint.architecture
    yield from _matrix(checkpoint, names, architecture.embedding, row.embedding, form)
    for name, values in rope_divisors(checkpoint.config).items():
        yield _tensor(name, (rotated_channels(checkpoint.config) // 2,), row.matrix, _reader(values))
    for i in range(checkpoint.layers):
        yield from _layer(checkpoint, names, i, row, form)
    yield _norm(checkpoint, names, architecture.final_norm)
    if not checkpoint.tied:
        yield from _matrix(checkpoint, names, architecture.head, row.embedding, form)


def _layer(checkpoint: Checkpoint, names: Names, i: int, row: TypeRow, form: Form) -> Iterator[Tensor]:
    architecture = checkpoint.architecture
    prefix, fused = architecture.layer.format(i), architecture.fused if form.fused else {}
    for norm in (*architecture.hidden_norms, *architecture.head_norms):
        yield _norm(checkpoint, names, f"{prefix}.{norm}")
    for name, components in fused.items():
        children = [architecture.module(i, component) for component in components]
        yield _fused(checkpoint, names, f"{prefix}.{name}", children, row.matrix, form)
    separate = set(COMPONENTS).difference(*fused.values())
    for component in (c for c in COMPONENTS if c in separate):
        yield from _matrix(checkpoint, names, architecture.module(i, component), row.matrix, form, row.b)


def expanded(checkpoint: Checkpoint, names: Names, form: Form, rounds: bool) -> tuple[str, ...]:
    """GGUF names of the matrices that are larger in the file than in the checkpoint; see forms.expands."""
    return tuple(
        names.base(module)
        for module, row in checkpoint.layout.items()
        if expands(form, row, bool(names.permuted_heads(module)), rounds)
    )


def _matrix(
    checkpoint: Checkpoint,
    names: Names,
    module: str,
    qtype: GGMLQuantizationType,
    form: Form,
    b: GGMLQuantizationType | None = None,
) -> Iterator[Tensor]:
    """The parts of a matrix and its bias; b: the type of its B factor, where that is another."""
    base, heads = names.base(module), names.permuted_heads(module)
    for part in parts(checkpoint, module, form, bool(heads)):
        stored = b if b is not None and part.suffix == B_FACTOR else qtype
        yield _tensor(f"{base}.{part.suffix}", part.shape, stored, _reader(part.read, heads if part.outputs else None))
    name_of_bias = checkpoint.bias_name(module)
    if name_of_bias:
        shape, values = bias(checkpoint, name_of_bias, form)
        yield _tensor(f"{base}.bias", shape, qtype, _reader(values, heads))


def _fused(
    checkpoint: Checkpoint, names: Names, module: str, children: list[str], qtype: GGMLQuantizationType, form: Form
) -> Tensor:
    """Whole matrices as one, rows one below the other."""
    wholes = [part for child in children for part in parts(checkpoint, child, form, reordered=False)]
    shape = (sum(part.shape[0] for part in wholes), wholes[0].shape[1])
    read = _reader(lambda: torch.cat([part.read().float() for part in wholes]))
    return _tensor(f"{names.base(module)}.weight", shape, qtype, read)


def _norm(checkpoint: Checkpoint, names: Names, module: str) -> Tensor:
    """llama.cpp multiplies by what is stored."""
    name, added = f"{module}.weight", float(checkpoint.architecture.unit_norms)
    read = _reader(lambda: checkpoint.tensor(name).float() + added)
    return _tensor(f"{names.base(module)}.weight", checkpoint.shape(name), GGMLQuantizationType.F32, read)


def _tensor(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType, read: Callable[[], np.ndarray]) -> Tensor:
    if len(shape) == 1:
        return Tensor(name, shape, GGMLQuantizationType.F32, False, read)
    fallback = not fits(shape, qtype)
    return Tensor(name, shape, FALLBACK if fallback else qtype, fallback, read)


def _reader(read: Callable[[], torch.Tensor], heads: int | None = None) -> Callable[[], np.ndarray]:
    """Float32 values; `heads`: with the rows of each head in interleaved pairs."""

    def values() -> np.ndarray:
        array = read().float().numpy()
        return interleave(array, heads) if heads else array

    return values
