"""What llama.cpp computes under each architecture name that a file may have: one row per name.

Rows say what its graphs and loaders are fixed to (`src/models/`); whatever a checkpoint asks beyond that is refused. A name is
what llama.cpp's converter gives a checkpoint, or another one under which llama.cpp computes the same from other tensors.
"""

from dataclasses import dataclass
from typing import Any

from sola_edge.architecture import (
    COMPONENTS,
    FULL,
    SLIDING,
    activation,
    attention_cap,
    attention_kinds,
    attention_scale,
    head_dim,
    rope_type,
    rotated_channels,
)
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Row:
    """What llama.cpp does under one architecture name.

    biases: components whose bias it loads. rope: kinds of rotary scaling that it, or what this exporter adds, can express.
    mixes: layers may have sliding or full attention, every n-th the latter. capped: it wants the caps of scores and logits.
    own_head: the head may be another matrix than the embedding. large: the number of layers at which it takes the model for
    the one whose scores are scaled by hidden size / heads instead of the width of a head. per_layer: the name that computes
    the same with an FFN width for each layer. unfused: the name that computes the same from q, k, v, gate and up by
    themselves, if all channels of a head are rotated.
    """

    activation: str = "silu"
    biases: tuple[str, ...] = ("q", "k", "v")
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    mixes: bool = False
    capped: bool = False
    own_head: bool = True
    large: int = 0
    per_layer: str = ""
    unfused: str = ""


_LLAMA: dict[str, Any] = {"biases": COMPONENTS, "rope": ("default", "linear", "yarn", "llama3")}
_GEMMA: dict[str, Any] = {"activation": GELU, "mixes": True}
ROWS = {
    "llama": Row(**_LLAMA, per_layer="deci"),
    "deci": Row(**_LLAMA),  # in every llama.cpp since December 2024
    "qwen2": Row(),
    "qwen3": Row(),
    "gemma2": Row(**_GEMMA, rope=("default",), capped=True, own_head=False, large=46),
    "gemma3": Row(**_GEMMA, rope=("default", "linear"), large=62),
    "phi3": Row(biases=(), rope=("default", "longrope"), unfused="llama"),
}


def check_computed(checkpoint: Checkpoint, architecture: str) -> None:
    """Raises UserError for a checkpoint of which llama.cpp would compute something else under the converter's name for it."""
    row = ROWS.get(architecture)
    problem = f"the architecture {architecture!r} is not known" if row is None else _problem(checkpoint, row)
    if problem:
        raise UserError(
            f"{checkpoint.path}: llama.cpp cannot compute this {checkpoint.config.model_type} model: {problem}; "
            "run it with transformers"
        )


def _problem(checkpoint: Checkpoint, row: Row) -> str | None:
    config = checkpoint.config
    wide = row.large and row.large == config.num_hidden_layers
    channels = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    caps = attention_cap(config), getattr(config, "final_logit_softcapping", None)
    problems = {
        f"RoPE scaling {rope_type(config)!r} (known: {', '.join(row.rope)})": rope_type(config) not in row.rope,
        f"activation {activation(config)!r} instead of {row.activation!r}": activation(config) != row.activation,
        f"attention scores are scaled by another number than {channels}^-0.5": (
            abs(attention_scale(config) * channels**0.5 - 1) > 1e-6
        ),
        "it has no caps of attention scores or logits": row.capped and not all(caps),
        "its head is not the embedding": not row.own_head and not checkpoint.tied,
        "layers with full attention are not every n-th one": row.mixes and sliding_period(config) is None,
    }
    return next((text for text, holds in problems.items() if holds), None)


def check_biases(checkpoint: Checkpoint, architecture: str) -> None:
    """Raises UserError for a bias that llama.cpp would not load under that name."""
    own = checkpoint.architecture
    for i in range(checkpoint.layers):
        for component in COMPONENTS:
            module = own.module(i, component)
            if checkpoint.bias_name(module) and component not in ROWS[architecture].biases:
                layout = checkpoint.layout.get(module)
                has, way_out = ("gained", "compress without it, or ") if layout and layout.bias else ("has", "")
                raise UserError(
                    f"{module} {has} a bias, which llama.cpp does not load for the architecture {architecture!r}; "
                    f"{way_out}export to ONNX"
                )


def sliding_period(config: Any) -> int | None:
    """n, where the n-th, 2n-th, … layer has full attention and the others sliding: 0 for all sliding, 1 for all full.

    None for another mixture.
    """
    kinds = attention_kinds(config)
    period = kinds.index(FULL) + 1 if FULL in kinds else 0
    alike = all((kind == FULL) == (period > 0 and (i + 1) % period == 0) for i, kind in enumerate(kinds))
    return period if alike else None


def unfused(config: Any, architecture: str) -> str:
    """The architecture that computes the model from matrices by themselves, "" where llama.cpp has none."""
    return ROWS[architecture].unfused if rotated_channels(config) == head_dim(config) else ""


def ignored_window(config: Any, architecture: str) -> int | None:
    """Tokens that each layer sees, where llama.cpp lets it see all and the model's context is longer; else None."""
    windowed = SLIDING in attention_kinds(config) and not ROWS[architecture].mixes
    return config.sliding_window if windowed and config.sliding_window < config.max_position_embeddings else None
