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
from gguf import GGUFValueType
from torch.nn import functional as F

from exporters.gguf.metadata import Value
from sola_edge.architecture import COMPONENTS, FFN, matrix_shape
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError
from sola_edge.layers import recompose

Kind = Literal["dense", "narrow", "hybrid"]
WHOLE = "weight"
SUFFIXES = {WHOLE: "prime.weight", "prime": "prime.weight", "A": "lr_a.weight", "B": "lr_b.weight"}
OURS = tuple(SUFFIXES.values())  # ends of the names that llama.cpp with our addition alone knows
# GGUF architecture → the one that computes the same and has a width per layer, in every llama.cpp since December 2024
PER_LAYER = {"llama": "deci"}
# GGUF architecture → components whose bias llama.cpp loads although the dense model has none
OPTIONAL_BIASES = {"llama": COMPONENTS, "deci": COMPONENTS}
ALWAYS_OPTIONAL = ("q", "k", "v")


def whole_name(part: str) -> str:
    """Name of the whole weight that a tensor of this name is a part of, or is."""
    end = next((end for end in OURS if part.endswith(f".{end}")), None)
    return part if end is None else f"{part.removesuffix(end)}{WHOLE}"


@dataclass(frozen=True)
class Form:
    """`kind` of the table above, and the GGUF architecture that the file is written as."""

    kind: Kind
    architecture: str


@dataclass(frozen=True)
class Part:
    """A tensor of a matrix: the end of its GGUF name, (rows, columns), values, and whether its rows are the outputs."""

    suffix: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    outputs: bool


def choose_form(checkpoint: Checkpoint, architecture: str, dense: bool) -> Form:
    """The form of an export under the GGUF architecture that llama.cpp's converter chose.

    A checkpoint of which only whole FFN matrices changed is narrow if llama.cpp can hold the widths. Raises UserError for a
    bias that compression added and llama.cpp would not load.
    """
    form = Form("dense" if dense or not checkpoint.layout else "hybrid", architecture)
    if form.kind == "hybrid" and all(_is_whole_ffn(checkpoint, module) for module in checkpoint.layout):
        if len(set(ffn_widths(checkpoint))) == 1:
            form = Form("narrow", architecture)
        elif architecture in PER_LAYER:
            form = Form("narrow", PER_LAYER[architecture])
    loaded = OPTIONAL_BIASES.get(form.architecture, ALWAYS_OPTIONAL)
    for module, layout in checkpoint.layout.items():
        if layout.bias and checkpoint.architecture.component_of(module) not in loaded:
            raise UserError(
                f"{module} gained a bias, which llama.cpp does not load for the architecture {form.architecture!r}; "
                "compress without it, or export to ONNX"
            )
    return form


def _is_whole_ffn(checkpoint: Checkpoint, module: str) -> bool:
    return checkpoint.layout[module].rank == 0 and checkpoint.architecture.component_of(module) in FFN


def ffn_widths(checkpoint: Checkpoint) -> list[int]:
    """Number of neurons of each layer."""
    downs = (checkpoint.layout.get(checkpoint.architecture.module(i, "down")) for i in range(checkpoint.layers))
    return [checkpoint.config.intermediate_size if down is None else down.n_in for down in downs]


def form_metadata(values: dict[str, Value], checkpoint: Checkpoint, form: Form) -> dict[str, Value]:
    """The converter's metadata under the form's architecture, with the widths of a narrow one."""
    base = values["general.architecture"].value
    renamed = {
        f"{form.architecture}.{key.removeprefix(f'{base}.')}" if key.startswith(f"{base}.") else key: value
        for key, value in values.items()
    }
    if form.kind == "narrow":
        widths = ffn_widths(checkpoint)
        kind = GGUFValueType.UINT32
        per_layer = Value(widths, GGUFValueType.ARRAY, kind)
        alike = len(set(widths)) == 1
        renamed[f"{form.architecture}.feed_forward_length"] = Value(widths[0], kind, None) if alike else per_layer
    return renamed


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
    """The tensors that the module's changed matrix becomes, without its bias. Reads no weights.

    What is `made_plain` is so already, see sola_edge/plain.py.
    """
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
