"""What a checkpoint's modules are called in GGUF, and which of their rows GGUF reorders.

Names come from gguf's own table.
"""

import gguf
import numpy as np

from sola_edge.architecture import ARCHITECTURES, kv_heads
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError
from sola_edge.gguf_source import INTERLEAVED_ROPE

COMMON = ARCHITECTURES["llama"]  # what its matrices are called in GGUF they are called in every architecture


class Names:
    """GGUF names of one checkpoint's modules under a GGUF architecture such as "llama"."""

    def __init__(self, checkpoint: Checkpoint, gguf_architecture: str) -> None:
        layers, self._row = checkpoint.config.num_hidden_layers, checkpoint.architecture
        self._table, self._common = _table(gguf_architecture, layers), _table(COMMON.model_type, layers)
        self._heads: dict[str, int] = {}
        if gguf_architecture in INTERLEAVED_ROPE:
            for i in range(layers):
                self._heads[self._row.module(i, "q")] = checkpoint.config.num_attention_heads
                self._heads[self._row.module(i, "k")] = kv_heads(checkpoint.config)

    def base(self, module: str) -> str:
        """`model.layers.0.mlp.gate_proj` → `blk.0.ffn_gate`. Raises UserError if GGUF has no name for the module."""
        table, known, component = self._table, module, self._row.component_of(module)
        if component:
            table, known = self._common, module.removesuffix(getattr(self._row, component)) + getattr(COMMON, component)
        name = table.get_name(f"{known}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"GGUF has no name for the module {module}; this checkpoint cannot be exported")
        return name.removesuffix(".weight")

    def permuted_heads(self, module: str) -> int | None:
        """Number of heads if GGUF stores the module's output rows in interleaved pairs, else None."""
        return self._heads.get(module)


def _table(gguf_architecture: str, layers: int) -> gguf.TensorNameMap:
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if gguf_architecture not in by_name:
        raise UserError(f"the installed gguf package does not know {gguf_architecture!r}; update it")
    return gguf.get_tensor_name_map(by_name[gguf_architecture], layers)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (x0, x1, …, y0, y1, …) to pairs (x0, y0, x1, y1, …); values (rows, …)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
