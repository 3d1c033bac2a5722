"""Which models each exporter has been proved on: those whose exported logits a test compares with PyTorch's."""

from collections.abc import Mapping
from typing import TypeVar

from sola_edge.architecture import ARCHITECTURES, FULL, SLIDING, head_dim
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

T = TypeVar("T")


MIXED = frozenset({FULL, SLIDING})
# By exporter, the model types and the kinds of attention that their layers may mix.
PROVED = {
    "ONNX": dict.fromkeys(ARCHITECTURES, MIXED),
    "GGUF": {**dict.fromkeys(ARCHITECTURES, frozenset({FULL})), "gemma2": MIXED, "gemma3_text": MIXED},
}
# Channels of a head must be a multiple of this: of 16 for GroupQueryAttention to rotate them, of 2 for any rotation.
HEAD_MULTIPLES = {"genai": 16, "portable": 2}


def check_supported(checkpoint: Checkpoint, exporter: str) -> None:
    """Raises UserError when the exporter (a key of `PROVED`) would write something that does not compute the model."""
    name = checkpoint.config.model_type
    problem = _problem(checkpoint, exporter)
    if problem is None:
        return
    others = [other for other in PROVED if other != exporter and _problem(checkpoint, other) is None]
    instead = "".join(f"export it to {other}, or " for other in others)
    raise UserError(
        f"{checkpoint.path}: the {exporter} export {problem.format(repr(name))}; {instead}run the checkpoint with "
        f"transformers (`import sola_edge`, then AutoModelForCausalLM)"
    )


def _problem(checkpoint: Checkpoint, exporter: str) -> str | None:
    """What the exporter does not know of this model, {} for its type; None if nothing."""
    proved, config = PROVED[exporter], checkpoint.config
    if getattr(config, "use_bidirectional_attention", False):
        return "does not know the attention of this {} model, which looks ahead"
    if config.model_type not in proved:
        return f"does not know the architecture {{}} (it knows {', '.join(proved)})"
    if set(getattr(config, "layer_types", None) or ()) - proved[config.model_type]:
        return "does not know the mixture of attention kinds of this {} model"
    return None


def check_graph(checkpoint: Checkpoint, graph: str) -> None:
    """Raises UserError when this ONNX graph's operators cannot compute the model, naming a graph that can."""
    channels = head_dim(checkpoint.config)
    if channels % HEAD_MULTIPLES[graph] == 0:
        return
    others = [name for name, multiple in HEAD_MULTIPLES.items() if channels % multiple == 0]
    instead = "".join(f"; export it with --graph {name}" for name in others)
    raise UserError(
        f"{checkpoint.path}: attention heads of {channels} channels cannot be exported to the {graph} graph "
        f"(its attention rotates multiples of {HEAD_MULTIPLES[graph]} only){instead}"
    )


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The row of a name in a table of the ONNX export's choices of that kind. Raises UserError for an unknown one."""
    if name not in table:
        raise UserError(f"{kind} {name!r} is not available for ONNX; choose from: {', '.join(table)}")
    return table[name]
