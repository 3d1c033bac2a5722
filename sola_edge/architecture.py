"""What the decoder-only architectures are called inside: one row per transformers `model_type`.

A row names the modules of a checkpoint (Hugging Face names). Everything that differs between architectures and is not
in `config.json` belongs here, so adding one is a row.
"""

from dataclasses import dataclass
from typing import Any

from sola_edge.errors import UserError

ATTENTION = ("q", "k", "v", "o")
FFN = ("gate", "up", "down")
COMPONENTS = ATTENTION + FFN


@dataclass(frozen=True)
class Architecture:
    """Module names of one architecture, relative to the checkpoint (`layer`, …) or to a layer (`q`, …, `ffn_norm`)."""

    model_type: str
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"

    def module(self, layer: int, component: str) -> str:
        """Full module name of a component (`q`, `gate`, `attention_norm`, …) of decoder layer `layer`."""
        return f"{self.layer.format(layer)}.{getattr(self, component)}"

    def component_of(self, module: str) -> str | None:
        """The component (`q` … `down`) that a full module name denotes, None for any other module."""
        return next((c for c in COMPONENTS if module.endswith("." + getattr(self, c))), None)


ARCHITECTURES = {row.model_type: row for row in (Architecture("llama"), Architecture("mistral"))}


def architecture_of(config: Any) -> Architecture:
    """The row for a transformers config. Raises UserError for an architecture that has none."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"the architecture {config.model_type!r} is not supported (supported: {known})")
    return row


def kv_heads(config: Any) -> int:
    """Number of key/value heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def rope_settings(config: Any) -> dict[str, Any]:
    """The rotary embedding's settings; transformers 5 says `rope_parameters` for 4's `rope_scaling`. {} for none."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def rope_type(config: Any) -> str:
    """Kind of rotary scaling, `default` where nothing is scaled."""
    settings = rope_settings(config)
    return settings.get("rope_type") or settings.get("type") or "default"


def head_dim(config: Any) -> int:
    """Width of one attention head, in channels."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
