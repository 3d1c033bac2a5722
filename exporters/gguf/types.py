"""The tensor types that are written in Python: a row per `--type`.

A row says how matrices are stored, how the embedding and the output head are (4- and 5-bit types keep these two in
Q8_0), how B of a factored matrix is, and what `general.file_type` says. In 4 bits B has one bit more than the rest:
for each byte, rounding it costs two to three times what rounding A costs (`benchmarks/factor_bits.py`; docs/llama_cpp.md).
One-dimensional tensors (norms, biases) are F32, as in llama.cpp's converter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from exporters.gguf.llama_quantize import BLOCKS
from sola_edge.errors import UserError

FALLBACK = GGMLQuantizationType.F16


@dataclass(frozen=True)
class TypeRow:
    """How a `--type` stores matrices, how embedding and head, the file type it is called, and B factors (None: as matrices)."""

    matrix: GGMLQuantizationType
    embedding: GGMLQuantizationType
    file_type: LlamaFileType
    b: GGMLQuantizationType | None = None

    @property
    def rounds(self) -> bool:
        """Whether matrices are stored in blocks of few bits."""
        return GGML_QUANT_SIZES[self.matrix][0] > 1


_Q = GGMLQuantizationType
TYPES = {
    "f32": TypeRow(_Q.F32, _Q.F32, LlamaFileType.ALL_F32),
    "f16": TypeRow(_Q.F16, _Q.F16, LlamaFileType.MOSTLY_F16),
    "bf16": TypeRow(_Q.BF16, _Q.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": TypeRow(_Q.Q8_0, _Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": TypeRow(_Q.Q5_1, _Q.Q8_0, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": TypeRow(_Q.Q5_0, _Q.Q8_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": TypeRow(_Q.Q4_1, _Q.Q8_0, LlamaFileType.MOSTLY_Q4_1, b=_Q.Q5_1),
    "q4_0": TypeRow(_Q.Q4_0, _Q.Q8_0, LlamaFileType.MOSTLY_Q4_0, b=_Q.Q5_0),
}


def type_row(name: str) -> TypeRow:
    """The row of a type by its name in any case. Raises UserError for an unknown one."""
    row = TYPES.get(name.lower())
    if row is None:
        raise UserError(f"type {name!r} is unknown; give one of {', '.join([*TYPES, *BLOCKS])}")
    return row


def fits(shape: Sequence[int], qtype: GGMLQuantizationType) -> bool:
    """Whether rows of a tensor of this shape are whole blocks of the type."""
    return shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0


def stored_bytes(shape: Sequence[int], qtype: GGMLQuantizationType) -> int:
    """Bytes of a tensor of that shape in that type, without padding."""
    block, size = GGML_QUANT_SIZES[qtype]
    return int(np.prod(shape)) // block * size


def encode(values: np.ndarray, qtype: GGMLQuantizationType, name: str) -> np.ndarray:
    """Values (float32) in the type's bytes. Raises UserError when one is not finite, or not in the range of F16."""
    with np.errstate(over="ignore"):
        encoded = quantize(np.ascontiguousarray(values), qtype)
    if not np.isfinite(values if encoded.dtype == np.uint8 else encoded).all():
        if np.isfinite(values).all():
            raise UserError(f"{name} has values beyond the range of {qtype.name}; give --type bf16 or f32")
        raise UserError(f"{name} has values that are not finite; the checkpoint is damaged")
    return encoded
