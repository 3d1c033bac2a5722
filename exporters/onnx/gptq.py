"""Rounding to blocks that knows the inputs: GPTQ (Frantar et al., ICLR 2023), with the Gram matrices of our own calibration.

Columns of W (n_out, n_in) are rounded one after the other, and what each loses is taken up by those not rounded yet, so that
tr(Δ S Δᵀ) is small rather than tr(Δ Δᵀ); S = E[x xᵀ]. With U upper triangular and Uᵀ U = (S + λ I)⁻¹, the rest of row i takes
up -e U[j, j+1:] / U[j, j] after an error e in column j. A block's scale is chosen when the first of its columns is reached.
"""

import numpy as np
import torch

from exporters.onnx.blocks import Blocks, Quantized, packed, quantized, unpacked

DAMPING = 10.0  # λ, of S's mean diagonal; the paper's 0.01 is worse than nearest levels on SmolLM2 (docs/log.md)


def calibrated(weight: torch.Tensor, blocks: Blocks, gram: torch.Tensor) -> Quantized:
    """W (n_out, n_in) in blocks for inputs with that S (n_in, n_in); nearest levels where S is a multiple of the identity."""
    rest, root = weight.float().clone(), _root(gram)
    n_out, n_in = rest.shape
    values = np.zeros((n_out, -(-n_in // blocks.size), blocks.size), dtype=np.uint8)
    grids = []
    for number, start in enumerate(range(0, n_in, blocks.size)):
        part = slice(start, min(start + blocks.size, n_in))
        grid = quantized(rest[:, part], blocks)
        scale, zero = torch.from_numpy(grid.scales), _zero(grid, blocks)
        levels, errors = _block(rest[:, part], root[part, part], scale, zero, 2**blocks.bits - 1)
        rest[:, part.stop :] -= errors @ root[part, part.stop :]
        values[:, number] = zero.numpy()  # what fills up the last block is worth 0
        values[:, number, : part.stop - start] = levels.numpy()
        grids.append((grid.scales, zero))
    scales = np.concatenate([scale for scale, _ in grids], axis=1)
    zeros = None if blocks.symmetric else packed(np.concatenate([z.numpy() for _, z in grids], axis=1), blocks.bits)
    return Quantized(packed(values, blocks.bits), scales, zeros)


def _block(
    weight: torch.Tensor, root: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(levels uint8, errors / U[j, j]) of one block's columns, both (n_out, columns).

    root: U's rows and columns of them; scale float32, zero uint8: (n_out, 1); top: the highest level.
    """
    weight, levels, errors = weight.clone(), torch.zeros(weight.shape, dtype=torch.uint8), torch.zeros_like(weight)
    step, middle = scale[:, 0], zero[:, 0].float()
    inverse = torch.where(step == 0, 0.0, 1 / step)
    for j in range(weight.shape[1]):
        found = (weight[:, j] * inverse + middle).round().clamp(0, top)
        errors[:, j] = (weight[:, j] - (found - middle) * step) / root[j, j]
        weight[:, j:] -= errors[:, j, None] * root[j, j:]
        levels[:, j] = found.to(torch.uint8)
    return levels, errors


def _zero(grid: Quantized, blocks: Blocks) -> torch.Tensor:
    """The zero point of one block a row, (n_out, 1) uint8."""
    if grid.zeros is None:
        return torch.full((len(grid.scales), 1), 2 ** (blocks.bits - 1), dtype=torch.uint8)
    return torch.from_numpy(unpacked(grid.zeros, blocks.bits)[:, :1].copy())


def _root(gram: torch.Tensor) -> torch.Tensor:
    """U (n_in, n_in) of S (n_in, n_in), upper triangular, float32."""
    damped = gram.float().clone()
    mean = damped.diagonal().mean().clamp_min(torch.finfo(damped.dtype).tiny)
    damped.diagonal().add_(DAMPING * mean)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
