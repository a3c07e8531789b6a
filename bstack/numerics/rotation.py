"""Rotates inputs orthogonally so that weights look Gaussian: random signs, then Hadamard blocks.

The rotation spreads large inputs over all others, and makes the weights of a row behave like independent draws, which suits
a code for Gaussian sources (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456). The width decides everything, so nothing is
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

__all__ = ["block_size", "rotate", "rotate_hessian", "signs", "unrotate"]

MASK = (1 << 64) - 1
TILE = 512
# Numbers that are rotated together, which the near cache then holds.
NUMBERS_TOGETHER = 2**18


def block_size(width: int) -> int:
    """Return the largest power of two that divides the width."""
    return width & -width


@cache
def signs(width: int) -> torch.Tensor:
    """Return the signs of the inputs, +1 or -1, float32, shape (width,).

    Entry j is -1 where the top bit of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), its state at j, is set.
    """
    return torch.tensor([-1.0 if _splitmix64(j) >> 63 else 1.0 for j in range(width)])


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def rotate(matrix: torch.Tensor) -> torch.Tensor:
    """Rotate the last axis: (x * signs) H for each row x, H block-diagonal with normalised Hadamard blocks."""
    return _hadamard(matrix * signs(matrix.shape[-1]).to(matrix))


def unrotate(matrix: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`; H is symmetric and its own inverse."""
    return _hadamard(matrix) * signs(matrix.shape[-1]).to(matrix)


def rotate_hessian(hessian: torch.Tensor, rotate_rows: Callable[[torch.Tensor], torch.Tensor] = rotate) -> torch.Tensor:
    """Compute the hessian of rotated inputs from that of the inputs; shape (width, width), contiguous.

    It equals ``rotate(rotate(hessian).t())``, but needs the memory of one matrix beside the hessian, not of four.
    """
    rotated = hessian.clone(memory_format=torch.contiguous_format)
    together = max(1, NUMBERS_TOGETHER // len(rotated))
    for rows in rotated.split(together):
        rows.copy_(rotate_rows(rows))
    _transpose(rotated)
    for rows in rotated.split(together):
        rows.copy_(rotate_rows(rows))
    return rotated


def _transpose(square: torch.Tensor) -> None:
    """Transpose a square matrix in place, tile by tile."""
    for top in range(0, square.shape[0], TILE):
        rows = slice(top, top + TILE)
        square[rows, rows] = square[rows, rows].t().clone()
        for left in range(top + TILE, square.shape[0], TILE):
            columns = slice(left, left + TILE)
            tile = square[rows, columns].t().clone()
            square[rows, columns] = square[columns, rows].t()
            square[columns, rows] = tile


def _hadamard(matrix: torch.Tensor) -> torch.Tensor:
    size = block_size(matrix.shape[-1])
    blocks = matrix.reshape(-1, size)
    # Transform a block of 2^a * 2^b along both of its axes: two small products instead of many passes.
    first = 1 << (size.bit_length() - 1) // 2
    left, right = _hadamard_matrix(first).to(matrix), _hadamard_matrix(size // first).to(matrix)
    rotated = left @ blocks.reshape(-1, first, size // first) @ right
    return rotated.reshape(matrix.shape)


def _hadamard_matrix(size: int) -> torch.Tensor:
    """Make Sylvester's Hadamard matrix, normalised: entry (i, j) is (-1)^popcount(i & j) / sqrt(size)."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5
