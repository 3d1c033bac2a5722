"""In which form a checkpoint goes into GGUF, and which tensors its changed matrices become.

| form   | a changed matrix is                                             | runs on            |
|--------|-----------------------------------------------------------------|--------------------|
| dense  | multiplied out, and as large as in the dense model              | any llama.cpp      |
| narrow | whole, `<name>.weight`; the metadata say how wide each layer is | any llama.cpp      |
| hybrid | `<name>.prime.weight`, `.lr_a.weight`, `.lr_b.weight`           | ours (llama_cpp.md)|
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from gguf import GGUFValueType, Keys
from torch.nn import functional as F

from exporters.gguf.metadata import Value
from exporters.gguf.rope import rope_metadata
from exporters.gguf.rows import ROWS, check_biases, sliding_period, unfused
from sola_edge.architecture import FFN, matrix_shape
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import MatrixLayout
from sola_edge.layers import recompose

Kind = Literal["dense", "narrow", "hybrid"]
WHOLE = "weight"
B_FACTOR = "lr_b.weight"
SUFFIXES = {WHOLE: "prime.weight", "prime": "prime.weight", "A": "lr_a.weight", "B": B_FACTOR}
OURS = tuple(SUFFIXES.values())  # ends of the names that llama.cpp with our addition alone knows


def whole_name(part: str) -> str:
    """Name of the whole weight that a tensor of this name is a part of, or is."""
    end = next((end for end in OURS if part.endswith(f".{end}")), None)
    return part if end is None else f"{part.removesuffix(end)}{WHOLE}"


@dataclass(frozen=True)
class Form:
    """`kind` of the table above, the architecture that the file is written as, and whether the matrices that transformers fuses
    are: in files for any llama.cpp, where the architecture has them so.
    """

    kind: Kind
    architecture: str
    fused: bool = False


@dataclass(frozen=True)
class Part:
    """A tensor of a matrix: the end of its GGUF name, (rows, columns), values, and whether its rows are the outputs."""

    suffix: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    outputs: bool


def choose_form(checkpoint: Checkpoint, architecture: str, dense: bool) -> Form:
    """The form of an export under the architecture that llama.cpp's converter chose.

    A checkpoint of which only whole FFN matrices changed is narrow if llama.cpp can hold the widths, under another name where
    need be. Raises UserError for a bias that llama.cpp would not load.
    """
    form = Form("dense", architecture, fused=bool(checkpoint.architecture.fused))
    if checkpoint.layout and not dense:
        form = _narrow(checkpoint, architecture) or Form("hybrid", architecture)
    check_biases(checkpoint, form.architecture)
    return form


def _narrow(checkpoint: Checkpoint, architecture: str) -> Form | None:
    """A form that any llama.cpp runs at the checkpoint's own size, None where there is none."""
    name = unfused(checkpoint.config, architecture) if checkpoint.architecture.fused else architecture
    if not name or not all(_is_whole_ffn(checkpoint, module) for module in checkpoint.layout):
        return None
    if len(set(ffn_widths(checkpoint))) > 1:
        name = ROWS[name].per_layer
    return Form("narrow", name) if name else None


def _is_whole_ffn(checkpoint: Checkpoint, module: str) -> bool:
    return checkpoint.layout[module].rank == 0 and checkpoint.architecture.component_of(module) in FFN


def ffn_widths(checkpoint: Checkpoint) -> list[int]:
    """Number of neurons of each layer."""
    downs = (checkpoint.layout.get(checkpoint.architecture.module(i, "down")) for i in range(checkpoint.layers))
    return [checkpoint.config.intermediate_size if down is None else down.n_in for down in downs]


def form_metadata(values: dict[str, Value], checkpoint: Checkpoint, form: Form) -> dict[str, Value]:
    """The converter's metadata under the form's architecture, and what it does not write: see rope.py, and the widths and
    kinds of attention of the layers.
    """
    base, name, config = values["general.architecture"].value, form.architecture, checkpoint.config
    count = GGUFValueType.UINT32
    renamed = {
        f"{name}.{key.removeprefix(f'{base}.')}" if key.startswith(f"{base}.") else key: value
        for key, value in values.items()
    }
    added = rope_metadata(config)
    if ROWS[name].mixes:
        added[Keys.Attention.SLIDING_WINDOW_PATTERN] = Value(sliding_period(config), count, None)
    if form.kind == "narrow":
        widths = ffn_widths(checkpoint)
        alike = len(set(widths)) == 1
        per_layer = Value(widths, GGUFValueType.ARRAY, count)
        added[Keys.LLM.FEED_FORWARD_LENGTH] = Value(widths[0], count, None) if alike else per_layer
    return renamed | {key.format(arch=name): value for key, value in added.items()}


def made_plain(layout: MatrixLayout, reordered: bool, rounds: bool) -> bool:
    """Whether a matrix of a hybrid file is written without its pivots.

    ggml gathers no channels; what is rounded in pivot rows counts many times. `reordered`: GGUF has the rows of this matrix
    in another order, which rows that lie in several tensors cannot follow.
    """
    return layout.gather or (layout.pivot and (reordered or rounds))


def expands(form: Form, layout: MatrixLayout, reordered: bool, rounds: bool) -> bool:
    """Whether a matrix is written in a larger form than the checkpoint has it in: plain factors, or whole."""
    return form.kind == "hybrid" and (made_plain(layout, reordered, rounds) or _made_whole(layout, reordered))


def _made_whole(layout: MatrixLayout, reordered: bool) -> bool:
    return reordered and layout.prime > 0


def parts(checkpoint: Checkpoint, module: str, form: Form, reordered: bool) -> Iterator[Part]:
    """The tensors that the module's matrix becomes, without its bias. Reads no weights.

    What is `made_plain` is so already, see sola_edge/plain.py.
    """
    if module not in checkpoint.layout:
        name = f"{module}.{WHOLE}"
        yield Part(WHOLE, checkpoint.shape(name), partial(checkpoint.tensor, name), True)
        return
    layout = checkpoint.layout[module]
    whole, own = (layout.n_out, layout.n_in), _dense_shape(checkpoint, module)

    def multiplied_out() -> torch.Tensor:
        return recompose(layout, {name: checkpoint.tensor(f"{module}.{name}") for name in layout.shapes})

    if form.kind == "dense":
        yield Part(WHOLE, own, lambda: _padded(multiplied_out(), own), True)
        return
    if layout.rank == 0 or _made_whole(layout, reordered):
        suffix = WHOLE if form.kind == "narrow" or whole == own else SUFFIXES[WHOLE]
        yield Part(suffix, whole, multiplied_out, True)
        return
    for name, shape in layout.shapes.items():
        yield Part(SUFFIXES[name], shape, partial(checkpoint.tensor, f"{module}.{name}"), name == "B")


def bias(checkpoint: Checkpoint, name: str, form: Form) -> tuple[tuple[int, ...], Callable[[], torch.Tensor]]:
    """(shape, values) of a bias: of a form that is dense as long as the dense model's."""
    shape = checkpoint.shape(name)
    if form.kind == "dense":
        module = name.removesuffix(".bias")
        shape = _dense_shape(checkpoint, module)[:1] if module in checkpoint.layout else shape
    return shape, lambda: _padded(checkpoint.tensor(name), shape)


def _dense_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    component = checkpoint.architecture.component_of(module)
    layout = checkpoint.layout[module]
    return (layout.n_out, layout.n_in) if component is None else matrix_shape(checkpoint.config, component)


def _padded(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros after the last row and column: neurons that compute nothing."""
    missing = [size - have for size, have in zip(shape, values.shape, strict=True)]
    return F.pad(values, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else values
