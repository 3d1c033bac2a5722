"""Weights in blocks of 4 or 8 bits, as com.microsoft's MatMulNBits takes them; rounded by ONNX Runtime's own tools.

A row of W (n_out, n_in) is cut into blocks of `size` input channels, the last one filled up with zeros. A block is stored
as unsigned integers q with one scale s and one zero point z: w ≈ s (q - z), z in the middle of the range where the blocks
are symmetric.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from sola_edge.errors import UserError

Bytes = npt.NDArray[np.uint8]
SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Blocks:
    """How weights are quantized. Raises UserError for what MatMulNBits or the rounding does not know.

    bits: 4 or 8. size: input channels in a block. symmetric: without zero points. int8_activations: inputs are rounded to
    8 bits by block as well, which is what the runtime is fastest at.
    """

    bits: int
    size: int = 32
    symmetric: bool = True
    int8_activations: bool = True

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"block {self.size} is out of range: choose one of {', '.join(map(str, SIZES))}")

    @property
    def accuracy_level(self) -> int:
        """MatMulNBits' attribute: 1 multiplies in fp32, 4 in integers."""
        return 4 if self.int8_activations else 1

    def shapes(self, n_out: int, n_in: int) -> dict[str, tuple[int, ...]]:
        """Shapes of `values`, `scales` and, where there are any, `zeros` of a matrix."""
        blocks = -(-n_in // self.size)
        found: dict[str, tuple[int, ...]] = {"values": (n_out, blocks, self.size * self.bits // 8)}
        found["scales"] = (n_out, blocks)
        if not self.symmetric:
            found["zeros"] = (n_out, -(-blocks * self.bits // 8))
        return found


def lookup_blocks(blocks: Blocks, channels: int) -> Blocks | None:
    """The blocks in which a row of that many channels can be looked up too: none is cut short, 4-bit ones have no zero points
    (the lookup and the product pack those differently). None where no size fits.
    """
    size = next((size for size in reversed(SIZES) if size <= blocks.size and channels % size == 0), None)
    if size is None:
        return None
    return replace(blocks, size=size) if blocks.bits == 8 else replace(blocks, size=size, symmetric=True)


@dataclass(frozen=True)
class Quantized:
    """values (n_out, blocks, bytes), scales (n_out, blocks) float32, zeros (n_out, bytes) or None; see `Blocks.shapes`."""

    values: Bytes
    scales: npt.NDArray[np.float32]
    zeros: Bytes | None

    def part(self, name: str) -> torch.Tensor:
        """One of `values`, `scales`, `zeros`."""
        return torch.from_numpy(getattr(self, name))


def quantized(weight: torch.Tensor, blocks: Blocks) -> Quantized:
    """W (n_out, n_in) in blocks, each value rounded to the nearest level."""
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    config = tools.DefaultWeightOnlyQuantConfig(block_size=blocks.size, is_symmetric=blocks.symmetric, bits=blocks.bits)
    transposed = np.ascontiguousarray(weight.float().numpy().T)
    values, scales, zeros = tools.DefaultWeightOnlyQuantizer(config).qbits_block_quant(transposed)
    return Quantized(values, scales, None if blocks.symmetric else zeros)


def dequantized(found: Quantized, blocks: Blocks, n_in: int) -> npt.NDArray[np.float32]:
    """The W (n_out, n_in) that blocks stand for."""
    n_out, count = found.scales.shape
    values = unpacked(found.values.reshape(n_out, -1), blocks.bits).reshape(n_out, count, blocks.size)
    middle = np.full((n_out, count), 2 ** (blocks.bits - 1))
    zeros = middle if found.zeros is None else unpacked(found.zeros, blocks.bits)[:, :count]
    exact = (values.astype(np.float32) - zeros[:, :, None]) * found.scales[:, :, None]
    return exact.reshape(n_out, -1)[:, :n_in].astype(np.float32)


def unpacked(stored: Bytes, bits: int) -> Bytes:
    """Rows of small integers out of bytes, two 4-bit ones from each, the low half first."""
    if bits == 8:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)


def packed(values: Bytes, bits: int) -> Bytes:
    """Small integers (…, n) as bytes (…, ⌈n bits / 8⌉), as `unpacked` reads them."""
    if bits == 8:
        return values
    even = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    return np.bitwise_or(even[..., 0::2], even[..., 1::2] << 4, dtype=np.uint8)
