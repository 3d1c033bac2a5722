"""What the decoder-only architectures are called inside: one row per transformers `model_type`.

A row names the modules of a checkpoint (Hugging Face names). Everything that differs between architectures and is not
in `config.json` belongs here, so adding one is a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sola_edge.errors import UserError

ATTENTION = ("q", "k", "v", "o")
FFN = ("gate", "up", "down")
COMPONENTS = ATTENTION + FFN
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of attention, as transformers calls them


@dataclass(frozen=True)
class Architecture:
    """Module names of one architecture, relative to the checkpoint (`layer`, …) or to a layer (`q`, …, `ffn_norm`).

    extra_norms: norms of a layer over hidden channels beside the two that enter attention and FFN; head_norms: norms over
    the channels of one head. post_norms: the outputs of attention and FFN pass through a norm before they are added to the
    residual stream. biases: components that always have a bias; bias_flags: by a config value, those that have one where it
    is true. fused: matrices that transformers stores and runs as one, rows of the named components one below the other;
    such a component is called `<fused matrix>.<component>`, here and in compressed checkpoints.

    sliding: the layers that see no more than the config's `sliding_window`: none, all, or those that `layer_types` names.
    unit_norms: a norm multiplies by 1 + its stored weight. scaled_embedding: the embedding is multiplied by the square root
    of its width. caps_attention: attention scores are bent below `attn_logit_softcapping`. wide_stream: the residual stream
    outgrows fp16.
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
    unit_norms: bool = False
    scaled_embedding: bool = False
    caps_attention: bool = False
    wide_stream: bool = False
    sliding: Literal["", "all", "layer_types"] = ""
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
    "unit_norms": True,
    "scaled_embedding": True,
    "wide_stream": True,
    "sliding": "layer_types",
    "bias_flags": _ATTENTION_BIAS,
}
_ROWS = (
    Architecture("llama", bias_flags=_ATTENTION_BIAS | {"mlp_bias": FFN}),
    Architecture("mistral", sliding="all"),
    Architecture("qwen2", biases=("q", "k", "v"), sliding="layer_types"),
    Architecture("qwen3", head_norms=_HEAD_NORMS, bias_flags=_ATTENTION_BIAS, sliding="layer_types"),
    Architecture("gemma2", caps_attention=True, **_GEMMA),
    Architecture("gemma3_text", head_norms=_HEAD_NORMS, **_GEMMA),
    Architecture(
        "phi3",
        q="self_attn.qkv_proj.q",
        k="self_attn.qkv_proj.k",
        v="self_attn.qkv_proj.v",
        gate="mlp.gate_up_proj.gate",
        up="mlp.gate_up_proj.up",
        sliding="all",
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


def rotated_channels(config: Any) -> int:
    """Channels of a head that the rotary embedding turns; the others pass as they are."""
    share = rope_settings(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(head_dim(config) * (share or 1))


def attention_kinds(config: Any) -> tuple[str, ...]:
    """The kind of attention of each layer, as transformers runs it; a `layer_types` that the model class ignores is no kind."""
    sliding = architecture_of(config).sliding
    if sliding == "layer_types" and getattr(config, "layer_types", None):
        return tuple(config.layer_types)
    windowed = sliding == "all" and config.sliding_window is not None
    return (SLIDING if windowed else FULL,) * config.num_hidden_layers


def attention_scale(config: Any) -> float:
    """What attention scores are multiplied by."""
    return float(getattr(config, "query_pre_attn_scalar", None) or head_dim(config)) ** -0.5


def attention_cap(config: Any) -> float | None:
    """The bound below which attention scores are bent, None for none. transformers' Gemma 3 has the value and ignores it."""
    return config.attn_logit_softcapping if architecture_of(config).caps_attention else None


def activation(config: Any) -> str:
    """Name of the FFN's activation function; Gemma's config has another key for it."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def attention_implementation(config: Any) -> str | None:
    """What to ask transformers for so that attention is the model's own, None for its default.

    Its default in transformers 4, PyTorch's fused kernel, leaves out Gemma 2's cap of attention scores without a word.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None
