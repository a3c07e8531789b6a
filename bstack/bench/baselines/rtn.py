"""Baseline: round every weight to the nearest value of its group's grid; 64 weights a group, asymmetric. No calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["GROUP", "GridMatrix", "fit", "nearest", "packed_bits", "round_to_nearest"]

GROUP = 64


def fit(weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the grid of each row of one group: from its smallest to its largest weight, with 0 on the grid.

    Returns the scales as stored, in half precision, and the codes that stand for 0, uint8; shape (rows,) both.
    """
    low, high = weights.amin(1).clamp_max(0), weights.amax(1).clamp_min(0)
    levels = 2**bits - 1
    # At least the smallest normal half number: a smaller scale would lose its digits.
    scale = ((high - low) / levels).clamp(2.0**-14, 65504.0).half()
    zero = (-low / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return scale, zero


def nearest(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of the nearest grid values; `scale` and `zero` broadcast against `weights`."""
    return (weights / scale.float() + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)


@dataclass(frozen=True)
class GridMatrix:
    """A quantised matrix: uint8 codes (rows, columns), scales in half precision and uint8 zeros (rows, groups)."""

    bits: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def dense(self) -> torch.Tensor:
        """Return the weights, float32, shape (rows, columns)."""
        columns = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(GROUP, 1)[:, :columns]
        zero = self.zero.float().repeat_interleave(GROUP, 1)[:, :columns]
        return (self.codes.float() - zero) * scale

    def payload(self) -> bytes:
        """Return the bytes that a file would hold: codes and zeros bit by bit without gaps, scales in half precision."""
        scale = self.scale.contiguous().numpy().astype("<f2").tobytes()
        return packed_bits(self.codes, self.bits) + packed_bits(self.zero, self.bits) + scale


def packed_bits(values: torch.Tensor, bits: int) -> bytes:
    """Pack numbers below 2**bits one after the other, lowest bit first."""
    flat = values.contiguous().numpy().reshape(-1, 1)
    return np.packbits(np.unpackbits(flat, axis=1, count=bits, bitorder="little"), bitorder="little").tobytes()


def round_to_nearest(weight: torch.Tensor, bits: int) -> GridMatrix:
    """Quantise a float32 matrix (outputs, inputs); groups run along the inputs, the last may be shorter."""
    codes, scales, zeros = [], [], []
    for group in weight.split(GROUP, 1):
        scale, zero = fit(group, bits)
        codes.append(nearest(group, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    return GridMatrix(bits, torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1))
