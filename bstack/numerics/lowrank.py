"""The leading singular triplets of a matrix by block iteration."""

from __future__ import annotations

import torch

__all__ = ["leading_triplets"]

# Measured on |R| of real weights: within 0.3 % of the exact residual norm (docs/method.md).
OVERSAMPLE = 8
ITERATIONS = 4


def leading_triplets(
    matrix: torch.Tensor,
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    iterations: int = ITERATIONS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Approximate the leading singular triplets of a matrix.

    Subspace iteration with oversampling: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM
    Review 53 (2011), algorithm 4.4. The start is fixed, not random: the row sums (for a matrix of magnitudes,
    almost the first left singular vector) and columns spread evenly over the matrix.

    Parameters
    ----------
    matrix : torch.Tensor
        Floating, shape (m, n).
    rank : int
        Number of triplets, at most min(m, n).
    oversample, iterations : int
        Extra columns of the subspace, and number of iterations.

    Returns
    -------
    u : torch.Tensor
        Shape (m, rank), orthonormal columns.
    s : torch.Tensor
        Shape (rank,), falling.
    v : torch.Tensor
        Shape (n, rank), orthonormal columns.
    """
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    spread = torch.linspace(0, n - 1, max(width - 1, 1)).round().long()[: width - 1]
    start = torch.cat([matrix.sum(1, keepdim=True), matrix[:, spread]], dim=1)
    q = torch.linalg.qr(start).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    small = q.t() @ matrix
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vh[:rank].t()
