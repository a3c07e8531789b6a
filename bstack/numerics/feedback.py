"""Error feedback between columns: later columns make up for the errors of earlier ones.

With H + d I = M D M^T, M unit upper triangular, column j becomes Q(w_j + sum_{k<j} (w_k - q_k) M_kj), and the error
is tr(D) times that of the quantiser (LDLQ, QuIP, arXiv 2307.13304, section 3; the same as GPTQ's updates).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["choose_damping", "factorise", "spectrum_sample"]

# Above this width double precision would not fit in memory; single precision is enough with damping.
DOUBLE_WIDTH = 8192
# Relative to the mean eigenvalue: smaller ones are noise in a sample of a few thousand tokens.
MIN_DAMPING = 1e-3
PIECE = 2**22
BLOCK = 512
# Of a wide matrix fewer: each reads all of it, and the damping changes by a ten thousandth.
LANCZOS_STEPS, LANCZOS_STEPS_WIDE = 64, 24
NOT_FINITE = "The hessian holds NaN or infinite values, so it has no feedback factor."


def factorise(hessian: Callable[[], torch.Tensor], damping: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Compute M and D of hessian() + damping I = M D M^T.

    The factor overwrites the hessian: another matrix of its size would take 0.8 GB at a width of 14336.

    Parameters
    ----------
    hessian : callable
        Returns H, float32, shape (inputs, inputs), contiguous; called again where rounding spoils a factor.
    damping : float
        d, positive; the larger it is, the weaker the feedback.

    Returns
    -------
    factor : torch.Tensor
        M, float32, unit upper triangular, shape (inputs, inputs).
    cost : torch.Tensor
        The diagonal of D, float32, shape (inputs,): the cost of an error of 1 in a column after the later columns have made
        up for what they can of it. Its inverse is the diagonal of GPTQ's inverse factor, squared.
    damping : float
        d as it was used: larger where rounding spoiled the factor of the given one.

    Raises
    ------
    ValueError
        The hessian holds NaN or infinite values.
    """
    while (factor := _cholesky(hessian(), damping)) is None:
        damping *= 10  # rounding made a tiny eigenvalue negative
        if not (math.isfinite(damping) and bool(hessian().diagonal().isfinite().all())):
            raise ValueError(NOT_FINITE)
    # LAPACK's factor is stored column by column, so its transpose is the one that is contiguous.
    upper = _flip(factor.t()).t()
    diagonal = upper.diagonal().clone()
    if not bool(diagonal.isfinite().all()):
        raise ValueError(NOT_FINITE)
    return upper.div_(diagonal).float(), diagonal.square().float(), damping


def _cholesky(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Return the Cholesky factor of the flipped, damped hessian, in its own memory if it is wide; None where there is none."""
    wide = len(hessian) > DOUBLE_WIDTH
    flipped = _flip(hessian if wide else hessian.double())
    flipped.diagonal().add_(damping)
    if wide:
        return flipped.t() if _cholesky_of_blocks(flipped) else None
    columns = flipped.t()  # as LAPACK wants it; it is symmetric
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return None if int(failed) else columns


def _cholesky_of_blocks(square: torch.Tensor) -> bool:
    """Overwrite a matrix by its upper triangular factor R, R^T R; in three quarters of LAPACK's time. Return whether there is one."""
    for start in range(0, len(square), BLOCK):
        stop = min(start + BLOCK, len(square))
        own, right = square[start:stop, start:stop], square[start:stop, stop:]
        square[start:stop, start:].addmm_(square[:start, start:stop].t(), square[:start, start:], alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(own)
        if int(failed):
            return False
        own.copy_(lower.t())
        right.copy_(torch.linalg.solve_triangular(lower, right, upper=False))
        square[stop:, start:stop] = 0
    return True


def _flip(square: torch.Tensor) -> torch.Tensor:
    """Reverse the order of rows and of columns of a contiguous matrix, in place."""
    flat = square.view(-1)
    half = flat.numel() // 2
    for start in range(0, half, PIECE):
        stop = min(start + PIECE, half)
        front, back = flat[start:stop], flat[flat.numel() - stop : flat.numel() - start]
        flipped = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(flipped)
    return square


def choose_damping(eigenvalues: torch.Tensor, weights: torch.Tensor, later: float) -> float:
    """Choose the damping that serves a block and `later` more blocks on top of it best.

    Full feedback leaves the smallest error, but its spectrum is that of the inverse of H, and such a residual costs the next
    block more. With n_i = 1 / (l_i + d) the shape of the error at a fixed determinant (which is what the number of
    bits fixes), the error now is mean(l n) / gmean(n) and the size of the residual, which each later block inherits,
    mean(n) / gmean(n). The minimum of log mean(l n) + later * log mean(n) - (1 + later) * mean(log n) is where

        mean(l / (l + d)) = 1 / (1 + later).

    Parameters
    ----------
    eigenvalues, weights : torch.Tensor
        A sample of the spectrum l of H and the fraction of each value, float64, shape (values,).
    later : float
        How many later blocks count; positive.

    Returns
    -------
    float
        d, at least a thousandth of the mean eigenvalue, and positive.
    """
    spectrum = eigenvalues.clamp_min(0)
    mean = float((spectrum * weights).sum())
    if mean <= 0:
        return 1.0
    # The left side falls from 1 to 0 as d grows; halve the interval on a logarithmic scale.
    low, high = math.log(MIN_DAMPING * mean), math.log(1e6 * mean)
    for _ in range(60):
        middle = (low + high) / 2
        if float((weights * spectrum / (spectrum + math.exp(middle))).sum()) > 1 / (1 + later):
            low = middle
        else:
            high = middle
    return math.exp(low)


def spectrum_sample(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the spectrum of a symmetric matrix by stochastic Lanczos quadrature.

    Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. 38 (2017).
    The starting vectors are fixed, so the estimate is too. An exact decomposition of a 14336-wide hessian would take minutes.

    Parameters
    ----------
    hessian : torch.Tensor
        Float32, shape (n, n).

    Returns
    -------
    eigenvalues, weights : torch.Tensor
        Float64, shape (values,), in the CPU's memory; the weights sum to 1.
    """
    n = hessian.shape[0]
    steps = min(LANCZOS_STEPS if n <= 2048 else LANCZOS_STEPS_WIDE, n)
    # Each vector averages over the whole width.
    probes = 8 if n <= 4096 else 2
    generator = torch.Generator().manual_seed(0)
    v = ((torch.randint(0, 2, (probes, n), generator=generator) * 2.0 - 1.0) / math.sqrt(n)).to(hessian)
    basis = hessian.new_zeros(probes, steps, n)
    alpha, beta = hessian.new_zeros(2, probes, steps, dtype=torch.float64)
    counts = torch.full((probes,), steps, device=hessian.device)
    for k in range(steps):
        basis[:, k] = v
        w = v @ hessian  # all vectors at once, since each product reads the whole hessian
        alpha[:, k] = (w * v).sum(1)
        # Orthogonalise against all earlier vectors, twice: otherwise Lanczos finds the large values again and again.
        known = basis[:, : k + 1]
        for _ in range(2):
            w = w - ((known @ w[:, :, None]).mT @ known)[:, 0]
        norm = w.norm(dim=1)
        ended = (norm <= 1e-6 * alpha[:, : k + 1].abs().amax(1)) & (counts == steps)
        counts[ended] = k + 1  # what follows is rounding
        beta[:, k] = norm
        v = w / norm.clamp_min(1e-30)[:, None]
    values, weights = [], []
    alpha, beta = alpha.cpu(), beta.cpu()  # small from here on
    for probe, count in enumerate(counts.tolist()):
        off = beta[probe, : count - 1]
        inner = torch.diag(alpha[probe, :count]) + torch.diag(off, 1) + torch.diag(off, -1)
        theta, vectors = torch.linalg.eigh(inner)
        values.append(theta)
        weights.append(vectors[0].square() / probes)
    return torch.cat(values), torch.cat(weights)
