"""Which architectures each exporter has been proved on: those whose exported logits a test compares with PyTorch's."""

from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError

PROVED = {"ONNX": ("llama", "mistral", "qwen2"), "GGUF": ("llama", "mistral", "qwen2")}


def check_supported(checkpoint: Checkpoint, exporter: str) -> None:
    """Raises UserError when the exporter (a key of `PROVED`) would write something that does not compute the model."""
    config = checkpoint.config
    name, kinds = config.model_type, set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        problem = f"does not know the mixture of attention kinds of this {name!r} model"
        others = []
    elif name not in PROVED[exporter]:
        problem = f"does not know the architecture {name!r} (it knows {', '.join(PROVED[exporter])})"
        others = [other for other, names in PROVED.items() if name in names]
    else:
        return
    instead = "".join(f"export it to {other}, or " for other in others)
    raise UserError(
        f"{checkpoint.path}: the {exporter} export {problem}; {instead}run the checkpoint with transformers "
        f"(`import sola_edge`, then AutoModelForCausalLM)"
    )
