"""Random llama models of any shape, dense or compressed by a plausible plan: for speed and memory, which do not ask for sense.

Weights are written one tensor at a time in float16, from a fixed seed; nobody holds a model.

dense     the shape as it is
hybrid    q and o low-rank, FFN of 7/8 of the neurons, half of them prime, the others low-rank; plain factors
pivoted   the same with pivoted factors, gathered but in gate (its order of neurons is everybody's)
narrow    attention as it is, FFNs with fewer neurons, fewest in the middle of the model

Ranks and widths are multiples of what `--align auto` means; ranks differ by a step where the rate asks for it, as real ones do.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from sola_edge.architecture import ATTENTION, COMPONENTS, FFN, architecture_of, matrix_shape
from sola_edge.checkpoint import CheckpointWriter
from sola_edge.config import MatrixLayout, Split, alignment_for, rate_of
from sola_edge.errors import UserError
from sola_edge.files import replace_folder
from sola_edge.testing import byte_tokenizer

KEPT, PRIME = 7 / 8, 1 / 2  # of the neurons; prime ones are a share of those kept
SEED = 0
Layouts = dict[tuple[int, str], MatrixLayout]  # (layer, component) → layout


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama model; the defaults are TinyLlama-1.1B's. `context`: positions."""

    hidden: int = 2048
    ffn: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    context: int = 2048

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, default: "Shape") -> None:
        """An option for each size."""
        for size in fields(cls):
            parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=getattr(default, size.name))

    @classmethod
    def asked(cls, options: argparse.Namespace) -> "Shape":
        """The shape that the options ask for."""
        return cls(**{size.name: getattr(options, size.name) for size in fields(cls)})

    @property
    def name(self) -> str:
        """All sizes, for a folder."""
        return "x".join(str(getattr(self, size.name)) for size in fields(self))

    def config(self) -> PretrainedConfig:
        """Of transformers, with embedding and output head of their own."""
        return AutoConfig.for_model(
            "llama",
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.context,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            dtype="float16",
        )

    def matrix(self, component: str) -> tuple[int, int]:
        """(n_out, n_in) of a dense component."""
        return matrix_shape(self.config(), component)

    def parameters(self) -> int:
        """Of the whole dense model."""
        layer = sum(n_out * n_in for n_out, n_in in map(self.matrix, COMPONENTS)) + 2 * self.hidden
        return layer * self.layers + 2 * self.vocab * self.hidden + self.hidden


def layouts_of(kind: str, shape: Shape, rate: float) -> Layouts:
    """What the kind of model stores at that compression rate. Raises UserError when the shape is too small for the rate."""
    return {} if kind == "dense" else KINDS[kind](shape, rate)


def achieved_rate(shape: Shape, layouts: Layouts) -> float:
    """Compression rate of these layouts."""
    return rate_of(_removed(shape, layouts), shape.parameters())


def _removed(shape: Shape, layouts: Layouts) -> int:
    dense = {component: n_out * n_in for component in COMPONENTS for n_out, n_in in [shape.matrix(component)]}
    return sum(dense[component] - layout.parameters for (_, component), layout in layouts.items())


def _shrunk(shape: Shape, rate: float, layouts: Layouts, steps: Iterator[Layouts]) -> Layouts:
    """`layouts` overwritten step by step until so much is removed. Raises UserError when the steps end before."""
    wanted, removed = round(rate * shape.parameters()), _removed(shape, layouts)
    for step in steps:
        if removed >= wanted:
            return layouts
        before = {place: layouts[place] for place in step if place in layouts}
        removed += _removed(shape, step) - _removed(shape, before)
        layouts = layouts | step
    raise UserError(f"rate {rate:g} is beyond what a model of this shape can lose: {shape}; ask for less")


def _hybrid(shape: Shape, rate: float, pivot: bool) -> Layouts:
    """Ranks from where factors begin to save, lowered in turn through the layers and matrices."""
    align = alignment_for(min(shape.hidden, shape.ffn), None)
    kept = max(round(KEPT * shape.ffn / align), 2) * align
    prime = max(round(PRIME * kept / align), 1) * align

    def layout(component: str, rank: int) -> MatrixLayout:
        n_out, n_in = shape.matrix(component)
        split: Split = "in" if component == "down" else "out"
        if component in FFN:
            n_out, n_in = (n_out, kept) if component == "down" else (kept, n_in)
        gather = pivot and component != "gate"
        return MatrixLayout(n_out, n_in, prime if component in FFN else 0, rank, split, pivot=pivot, gather=gather)

    components = ("o", "gate", "up", "down", "q")
    ranks = {component: _largest_rank(partial(layout, component), align) for component in components}
    start = {(i, c): layout(c, ranks[c]) for c in components for i in range(shape.layers)}

    def steps() -> Iterator[Layouts]:
        for down in range(1, max(ranks.values()) // align):
            for component in components:
                for i in range(shape.layers):
                    if ranks[component] - down * align > 0:
                        yield {(i, component): layout(component, ranks[component] - down * align)}

    return _shrunk(shape, rate, start, steps())


def _largest_rank(layout: Callable[[int], MatrixLayout], align: int) -> int:
    """The largest multiple of `align` at which factors take less than the matrix. Raises UserError where none does."""
    smallest = layout(align)
    ranks = range(min(smallest.low_rank_shape) // align * align, 0, -align)
    for rank in ranks:
        if smallest.pivot and rank >= smallest.low_rank_shape[0]:
            continue
        if layout(rank).weights < smallest.n_out * smallest.n_in:
            return rank
    raise UserError(f"a matrix of {smallest.n_out} × {smallest.n_in} is too small for factors of rank {align}")


def _narrow(shape: Shape, rate: float) -> Layouts:
    """Neurons dropped in steps, where a layer has lost least for its share: 1 at the ends, 2 in the middle."""
    align = alignment_for(min(shape.hidden, shape.ffn), None)
    middle = max((shape.layers - 1) / 2, 1)
    share = [2 - abs(i - middle) / middle for i in range(shape.layers)]

    def layer(i: int, width: int) -> Layouts:
        sides = MatrixLayout(width, shape.hidden, 0, 0), MatrixLayout(shape.hidden, width, 0, 0, "in")
        return {(i, component): sides[component == "down"] for component in FFN}

    def steps() -> Iterator[Layouts]:
        dropped = [0] * shape.layers
        while True:
            able = [i for i in range(shape.layers) if shape.ffn - dropped[i] > align]
            if not able:
                return
            i = min(able, key=lambda i: (dropped[i] + align) / share[i])
            dropped[i] += align
            yield layer(i, shape.ffn - dropped[i])

    return _shrunk(shape, rate, {}, steps())


KINDS: Mapping[str, Callable[[Shape, float], Layouts]] = {
    "hybrid": lambda shape, rate: _hybrid(shape, rate, pivot=False),
    "pivoted": lambda shape, rate: _hybrid(shape, rate, pivot=True),
    "narrow": _narrow,
}


def write_model(folder: Path, shape: Shape, layouts: Layouts) -> Path:
    """Write the model as a checkpoint folder (with a byte tokenizer padded to the vocabulary) and return the folder."""
    config = shape.config()
    row = architecture_of(config)
    random = torch.Generator().manual_seed(SEED)
    with replace_folder(folder) as unfinished:
        writer = CheckpointWriter(unfinished)
        for name in (row.embedding, row.head):
            writer.add(f"{name}.weight", _weight((shape.vocab, shape.hidden), random))
        writer.add(f"{row.final_norm}.weight", torch.ones(shape.hidden, dtype=torch.float16))
        for i in range(shape.layers):
            for norm in row.hidden_norms:
                writer.add(f"{row.layer.format(i)}.{norm}.weight", torch.ones(shape.hidden, dtype=torch.float16))
            for component in (*ATTENTION, *FFN):
                layout = layouts.get((i, component))
                parts = layout.shapes if layout else {"weight": shape.matrix(component)}
                for part, size in parts.items():
                    tensor = _order(size[0], random) if part == "order" else _weight(size, random)
                    writer.add(f"{row.module(i, component)}.{part}", tensor)
        modules = {row.module(*place): layout for place, layout in layouts.items()}
        writer.finish(config, byte_tokenizer(shape.vocab), modules)
    return folder


def _weight(size: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Normal values that keep the size of activations."""
    return (torch.randn(size, generator=random) / size[-1] ** 0.5).to(torch.float16)


def _order(rows: int, random: torch.Generator) -> torch.Tensor:
    return torch.randperm(rows, generator=random).to(torch.int32)


def describe(shape: Shape, layouts: Layouts) -> dict[str, object]:
    """For the record: parameters, the rate achieved, and of each component its layouts, with how many layers have each."""
    counts: dict[str, dict[str, int]] = {}
    for (_, component), layout in layouts.items():
        row = asdict(layout)
        text = ", ".join(f"{k} {v}" for k, v in row.items() if v not in (False, 0) and k not in ("split", "bias"))
        counts.setdefault(component, {}).setdefault(text, 0)
        counts[component][text] += 1
    rate = achieved_rate(shape, layouts)
    return {"parameters": shape.parameters() - _removed(shape, layouts), "rate": rate, "layouts": counts}


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """That folder, made if need be, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="sola-edge-") as folder:
        yield Path(folder)
