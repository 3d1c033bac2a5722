"""Rotary position embedding as GGUF holds it: a base, and for some kinds of scaling what plain frequencies are divided by.

llama3 has one such tensor. longrope has one for contexts up to the length that the model was first trained on and one for
longer ones, and a factor on cos and sin. llama.cpp chooses between these two by the context that is set, transformers by the
length of the text.
"""

from collections.abc import Callable
from typing import Any

import torch
from gguf import GGUFValueType, Keys

from exporters.gguf.metadata import Value
from sola_edge.architecture import rope_settings, rope_type

Divisors = dict[str, Callable[[], torch.Tensor]]  # tensor name → values, (rotated channels / 2,)


def rope_theta(config: Any) -> float:
    """Base of the frequencies."""
    return float(rope_settings(config).get("rope_theta") or config.rope_theta)


def rope_divisors(config: Any) -> Divisors:
    """The tensors for the model's kind of scaling; none for kinds that metadata hold."""
    if rope_type(config) == "llama3":
        return {"rope_freqs.weight": lambda: _divisors(config)}
    if rope_type(config) == "longrope":
        return {
            "rope_factors_long.weight": lambda: _divisors(config, tokens=_first_length(config) + 1),
            "rope_factors_short.weight": lambda: _divisors(config, tokens=1),
        }
    return {}


def rope_metadata(config: Any) -> dict[str, Value]:
    """Keys ({arch}.…) that llama.cpp's converter leaves out for some architectures, or writes beside weights only."""
    values = {Keys.Rope.FREQ_BASE: Value(rope_theta(config), GGUFValueType.FLOAT32, None)}
    if rope_type(config) == "longrope":
        _, attention = _scaled(config)
        values[Keys.Rope.SCALING_TYPE] = Value("longrope", GGUFValueType.STRING, None)
        values[Keys.Rope.SCALING_ATTN_FACTOR] = Value(attention, GGUFValueType.FLOAT32, None)
    return values


def _first_length(config: Any) -> int:
    own = rope_settings(config).get("original_max_position_embeddings")
    return int(own or config.original_max_position_embeddings)


def _divisors(config: Any, tokens: int | None = None) -> torch.Tensor:
    scaled, _ = _scaled(config, tokens)
    size = scaled.shape[0]
    return rope_theta(config) ** -(torch.arange(size, dtype=torch.float32) / size) / scaled


def _scaled(config: Any, tokens: int | None = None) -> tuple[torch.Tensor, float]:
    """transformers' frequencies for a text of so many tokens, and its factor on cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention = ROPE_INIT_FUNCTIONS[rope_type(config)](config, torch.device("cpu"), seq_len=tokens)
    return frequencies, float(attention)
