"""Baseline: round every weight to the nearest value of its group's grid. No calibration."""

from __future__ import annotations

import torch

from bstack.bench.baselines.grid import GROUP, GridMatrix, fit, nearest

__all__ = ["round_to_nearest"]


def round_to_nearest(weight: torch.Tensor, bits: int) -> GridMatrix:
    """Quantise a matrix.

    Parameters
    ----------
    weight : torch.Tensor
        Float32, shape (outputs, inputs); groups run along the inputs, the last may be shorter.
    bits : int
        2 to 8.
    """
    codes, scales, zeros = [], [], []
    for group in weight.split(GROUP, 1):
        scale, zero = fit(group, bits)
        codes.append(nearest(group, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    return GridMatrix(bits, torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1))
