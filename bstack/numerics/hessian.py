"""Output errors from a hessian H = X^T X, and a better estimate of H when tokens are few."""

from __future__ import annotations

import torch

__all__ = ["output_errors", "shrinkage"]

NUMBERS_TOGETHER = 2**18


def output_errors(residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Compute the squared output error of each row of a weight error: the diagonal of R H R^T.

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


def shrinkage(hessian: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Choose how far to pull a sample hessian towards a multiple of the identity: (1 - r) H + r mean(diag H) I.

    Directions that a small sample missed look free of cost, and error feedback would push all errors there. r is the
    oracle approximating shrinkage of Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Process. 58 (2010), equation 23:
    near 1 for fewer tokens than inputs of equal strength, near 0 for the spectra and token counts of real models.

    Parameters
    ----------
    hessian : torch.Tensor
        H = X^T X, float32, shape (inputs, inputs).
    tokens : int
        Rows of X.

    Returns
    -------
    keep, ridge : float
        1 - r and r mean(diag H): the better estimate is keep * H + ridge * I.
    """
    n = hessian.shape[0]
    trace = float(hessian.diagonal().sum(dtype=torch.float64))
    # A few rows at a time, since the squares and their float64 copy would be three times the hessian.
    square = sum(float(rows.square().sum(dtype=torch.float64)) for rows in hessian.split(max(1, NUMBERS_TOGETHER // n)))
    spread = square - trace**2 / n
    if trace <= 0 or spread <= 0:
        pull = 1.0
    else:
        pull = min(1.0, ((1 - 2 / n) * square + trace**2) / ((tokens + 1 - 2 / n) * spread))
    return 1 - pull, pull * trace / n
