"""Baseline: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, arXiv 2210.17323, algorithm 1), group 64.

Columns are rounded one by one; the error of each is spread over the columns that follow, weighted by the Cholesky
factor of the inverse of H = X^T X (full Hessians, 1 % of the mean diagonal added). A group's grid is fitted to
its weights as updated when the first of them is reached.
"""

from __future__ import annotations

import torch

from bstack.bench.baselines.rtn import GROUP, GridMatrix, fit, nearest

__all__ = ["DAMPING", "gptq"]

DAMPING = 0.01
# Columns updated together, a multiple of the group. It changes the result by rounding only.
BLOCK = 128


def gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> GridMatrix:
    """Quantise a float32 matrix (outputs, inputs) with H = X^T X, shape (inputs, inputs)."""
    columns = weight.shape[1]
    hessian = hessian.double()
    dead = hessian.diagonal() <= 0
    hessian = hessian + torch.diag(dead.double())
    weight = weight.clone()
    # An input that is always 0 may have any weight, and every grid has 0.
    weight[:, dead] = 0
    factor = _inverse_factor(hessian)
    grids = []
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(weight.shape[0], stop - start)
        for j in range(start, stop):
            if j % GROUP == 0:
                grids.append(fit(weight[:, j : j + GROUP], bits))
            scale, zero = grids[-1]
            codes[:, j] = nearest(weight[:, j], scale, zero, bits)
            rounded = (codes[:, j].float() - zero.float()) * scale.float()
            error = (weight[:, j] - rounded) / factor[j, j]
            weight[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    scales, zeros = (torch.stack(part, 1) for part in zip(*grids, strict=True))
    return GridMatrix(bits, codes, scales, zeros)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped H, float32."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
