"""How large an error in a weight is where it matters: at the linear's output."""

from __future__ import annotations

import torch

__all__ = ["output_errors"]


def output_errors(residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row of a weight error: the diagonal of R H R^T.

    Parameters
    ----------
    residual : torch.Tensor
        R, float32, shape (outputs, inputs): original minus approximation.
    hessian : torch.Tensor
        H = X^T X, float32, shape (inputs, inputs).

    Returns
    -------
    torch.Tensor
        Float32, shape (outputs,): the squared error of each output summed over the tokens of X. Never negative.
    """
    return ((residual @ hessian) * residual).sum(1).clamp_min(0)
