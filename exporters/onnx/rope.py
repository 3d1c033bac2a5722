"""Rotary position embedding tables, from transformers' own frequencies.

cos and sin of position × frequency, times the attention scaling, both (positions, head_dim / 2), in fp32 as transformers
computes them. Rotary types whose frequencies depend on the length of the input (dynamic, longrope) have no fixed table.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sola_edge.architecture import rope_type
from sola_edge.errors import UserError

FIXED_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryTables:
    """`positions` rows of `frequencies.numel()` angles; the tables themselves are computed when asked for."""

    positions: int
    frequencies: torch.Tensor  # (head_dim / 2,), radians per position
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.positions, self.frequencies.numel()

    def cos(self) -> torch.Tensor:
        return self._angles().cos_().mul_(self.scaling)

    def sin(self) -> torch.Tensor:
        return self._angles().sin_().mul_(self.scaling)

    def _angles(self) -> torch.Tensor:
        return torch.outer(torch.arange(self.positions, dtype=torch.float32), self.frequencies)


def rotary_tables(config: Any) -> RotaryTables:
    """Tables for every position of the model's context. Raises UserError for a rotary type without fixed ones."""
    kind = rope_type(config)
    if kind not in FIXED_TYPES:
        known = ", ".join(FIXED_TYPES)
        raise UserError(
            f"rope type {kind!r} cannot be exported to ONNX (supported: {known}); it depends on the input's length"
        )
    rotary = LlamaRotaryEmbedding(config)
    frequencies = rotary.inv_freq.detach().to("cpu", torch.float32)
    return RotaryTables(config.max_position_embeddings, frequencies, float(rotary.attention_scaling))
