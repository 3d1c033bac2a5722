"""What the decoder-only architectures are called inside: one row per transformers `model_type`.

A row names the modules of a checkpoint (Hugging Face names). Everything that differs between architectures and is not
in `config.json` belongs here, so adding one is a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sola_edge.errors import UserError

ATTENTION = ("q", "k", "v", "o")
FFN = ("gate", "up", "down")
COMPONENTS = ATTENTION + FFN


@dataclass(frozen=True)
class Architecture:
    """Module names of one architecture, relative to the checkpoint (`layer`, …) or to a layer (`q`, …, `ffn_norm`).

    extra_norms: norms of a layer over hidden channels beside the two that enter attention and FFN; head_norms: norms over
    the channels of one head. post_norms: the outputs of attention and FFN pass through a norm before they are added to the
    residual stream. biases: components that always have a bias; bias_flags: by a config value, those that have one where it
    is true. fused: matrices that transformers stores and runs as one, rows of the named components one below the other;
    such a component is called `<fused matrix>.<component>`, here and in compressed checkpoints.
    """

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
    extra_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    post_norms: bool = False
    biases: tuple[str, ...] = ()
    bias_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def module(self, layer: int, component: str) -> str:
        """Full module name of a component (`q`, `gate`, `attention_norm`, …) of decoder layer `layer`."""
        return f"{self.layer.format(layer)}.{getattr(self, component)}"

    def component_of(self, module: str) -> str | None:
        """The component (`q` … `down`) that a full module name denotes, None for any other module."""
        return next((c for c in COMPONENTS if module.endswith("." + getattr(self, c))), None)

    def biased(self, config: Any) -> set[str]:
        """The components whose dense matrices have a bias."""
        flagged = (parts for flag, parts in self.bias_flags.items() if getattr(config, flag, False))
        return set(self.biases).union(*flagged)

    @property
    def hidden_norms(self) -> tuple[str, ...]:
        """The norms of a layer over hidden channels."""
        return (self.attention_norm, self.ffn_norm, *self.extra_norms)

    def norm_widths(self, config: Any) -> dict[str, int]:
        """Number of channels of each norm of a layer, by its name within the layer."""
        return dict.fromkeys(self.hidden_norms, config.hidden_size) | dict.fromkeys(self.head_norms, head_dim(config))

    def fused_rows(self, config: Any) -> dict[str, dict[str, int]]:
        """Rows of each component of each fused matrix, in their order, by the matrix's name within a layer."""
        return {name: {part: matrix_shape(config, part)[0] for part in parts} for name, parts in self.fused.items()}

    def stored_as(self, name: str) -> tuple[str, int]:
        """The tensor in which transformers keep a tensor of ours, and its place there: 0, 1, … of a fused one, else 0."""
        module, _, kind = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        for fused, parts in self.fused.items():
            if parent.endswith("." + fused) and part in parts:
                return f"{parent}.{kind}", parts.index(part)
        return name, 0


_ATTENTION_BIAS = {"attention_bias": ATTENTION}
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GEMMA: dict[str, Any] = {
    "ffn_norm": "pre_feedforward_layernorm",
    "extra_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "post_norms": True,
    "bias_flags": _ATTENTION_BIAS,
}
_ROWS = (
    Architecture("llama", bias_flags=_ATTENTION_BIAS | {"mlp_bias": FFN}),
    Architecture("mistral"),
    Architecture("qwen2", biases=("q", "k", "v")),
    Architecture("qwen3", head_norms=_HEAD_NORMS, bias_flags=_ATTENTION_BIAS),
    Architecture("gemma2", **_GEMMA),
    Architecture("gemma3_text", head_norms=_HEAD_NORMS, **_GEMMA),
    Architecture(
        "phi3",
        q="self_attn.qkv_proj.q",
        k="self_attn.qkv_proj.k",
        v="self_attn.qkv_proj.v",
        gate="mlp.gate_up_proj.gate",
        up="mlp.gate_up_proj.up",
        fused={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    ),
)
ARCHITECTURES = {row.model_type: row for row in _ROWS}
INSTEAD = {"gemma3": "it is multimodal; give its language model alone, whose model_type is gemma3_text"}


def architecture_of(config: Any) -> Architecture:
    """The row for a transformers config. Raises UserError for an architecture that has none."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        hint = INSTEAD.get(config.model_type) or f"supported: {', '.join(sorted(ARCHITECTURES))}"
        raise UserError(f"the architecture {config.model_type!r} is not supported ({hint})")
    return row


def matrix_shape(config: Any, component: str) -> tuple[int, int]:
    """(n_out, n_in) that the config asks of a component of a dense layer."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, kv_heads(config)
    width = head_dim(config)
    return {
        "q": (heads * width, hidden),
        "k": (kv * width, hidden),
        "v": (kv * width, hidden),
        "o": (hidden, heads * width),
        "gate": (config.intermediate_size, hidden),
        "up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }[component]


def kv_heads(config: Any) -> int:
    """Number of key/value heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def rope_settings(config: Any) -> dict[str, Any]:
    """The rotary embedding's settings; transformers 5 says `rope_parameters` for 4's `rope_scaling`. {} for none.

    Where kinds of layers differ (transformers 5, Gemma 3), those of the layers with full attention.
    """
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return settings.get("full_attention") or settings


def rope_type(config: Any) -> str:
    """Kind of rotary scaling, `default` where nothing is scaled."""
    settings = rope_settings(config)
    return settings.get("rope_type") or settings.get("type") or "default"


def head_dim(config: Any) -> int:
    """Width of one attention head, in channels."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_implementation(config: Any) -> str | None:
    """What to ask transformers for so that attention is the model's own, None for its default.

    Its default in transformers 4, PyTorch's fused kernel, leaves out Gemma 2's cap of attention scores without a word.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None
