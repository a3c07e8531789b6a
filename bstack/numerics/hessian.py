"""A better estimate of a Hessian than the sample's own, when tokens are few."""

from __future__ import annotations

import torch

__all__ = ["shrinkage"]

ROWS_TOGETHER = 512


def shrinkage(hessian: torch.Tensor, tokens: int) -> tuple[float, float]:
    """How far to pull a sample Hessian towards a multiple of the identity: (1 - r) H + r mean(diag H) I.

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
    kept, ridge : float
        1 - r and r mean(diag H): the better estimate is kept * H + ridge * I.
    """
    n = hessian.shape[0]
    trace = float(hessian.diagonal().sum(dtype=torch.float64))
    # A few rows at a time: the squares and their float64 copy would be three times the hessian.
    square = sum(float(rows.square().sum(dtype=torch.float64)) for rows in hessian.split(ROWS_TOGETHER))
    spread = square - trace**2 / n
    if trace <= 0 or spread <= 0:
        share = 1.0
    else:
        share = min(1.0, ((1 - 2 / n) * square + trace**2) / ((tokens + 1 - 2 / n) * spread))
    return 1 - share, share * trace / n
