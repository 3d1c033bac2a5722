"""Rotary position embedding: transformers' own frequencies, and their tables.

cos and sin of position × frequency, times the attention scaling, both (positions, rotated channels / 2), in fp32 as
transformers computes them. Rotary types whose frequencies depend on the length of the input (dynamic, longrope) have no
fixed table. A model may rotate its sliding layers by other frequencies than the rest (Gemma 3), or a part of each head only.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sola_edge.architecture import FULL, SLIDING, rope_type
from sola_edge.errors import UserError

FIXED_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryTables:
    """`positions` rows of `frequencies.numel()` angles; the tables themselves are computed when asked for.

    suffix: for names, of what differs from the model's main table.
    """

    positions: int
    frequencies: torch.Tensor  # (rotated channels / 2,), radians per position
    scaling: float
    suffix: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.positions, self.frequencies.numel()

    def cos(self) -> torch.Tensor:
        return self._angles().cos_().mul_(self.scaling)

    def sin(self) -> torch.Tensor:
        return self._angles().sin_().mul_(self.scaling)

    def _angles(self) -> torch.Tensor:
        return torch.outer(torch.arange(self.positions, dtype=torch.float32), self.frequencies)


def rotary_tables(config: Any, kind: str = FULL) -> RotaryTables:
    """Tables for every position of the model's context, in layers of this kind of attention.

    Raises UserError for a rotary type without fixed ones.
    """
    own = _of_kind(config, kind)
    name = rope_type(own)
    if name not in FIXED_TYPES:
        known = ", ".join(FIXED_TYPES)
        raise UserError(
            f"rope type {name!r} cannot be exported to ONNX (supported: {known}); it depends on the input's length"
        )
    rotary = LlamaRotaryEmbedding(own)
    frequencies = rotary.inv_freq.detach().to("cpu", torch.float32)
    suffix = "" if own is config or kind == FULL else f".{kind}"
    return RotaryTables(config.max_position_embeddings, frequencies, float(rotary.attention_scaling), suffix)


def _of_kind(config: Any, kind: str) -> Any:
    """The config whose rotary settings layers of this kind have: the model's own where all have the same."""
    by_kind = getattr(config, "rope_parameters", None) or {}  # transformers 5
    base = getattr(config, "rope_local_base_freq", None)  # transformers 4
    if kind in by_kind:
        own = copy.deepcopy(config)
        own.rope_parameters = by_kind[kind]
    elif kind == SLIDING and base is not None:
        own = copy.deepcopy(config)
        own.rope_theta, own.rope_scaling = base, {"rope_type": "default"}
    else:
        return config
    return own
