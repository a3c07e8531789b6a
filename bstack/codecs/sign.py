"""Sign planes: activation-aware absolute value decomposition, the codec of BitStack (arXiv 2410.23918, section 3).

On the scaled residual R diag(s), s_j the L2 norm of input channel j:

    S = sign(R)  (0 counts as +1),    |R diag(s)| ~ U V^T  (rank k),    block = (S, U, V / s)

    R <- R - S * (U (V / s)^T)       with U and V / s as stored, in half precision

The scale goes into V, so nothing in the rest of the model changes. Each block subtracts what was stored, so that
the next one repairs its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import bstk
from bstack.codecs.contract import Block, Codec
from bstack.numerics.groups import to_half
from bstack.numerics.hessian import output_errors

__all__ = ["KIND", "SignCodec", "choose_rank"]

KIND = bstk.SIGN
RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
# The rounding of half-precision factors leaves about this fraction of the squared error, however well the rank fits.
MIN_LEFT = 2.0**-22
# Within 0.3 % of the exact residual norm on |R| of real weights, of random matrices and of block and diagonal ones.
OVERSAMPLE, ITERATIONS = 8, 4


@dataclass(frozen=True)
class SignCodec(Codec):
    """Sign planes with low-rank magnitudes.

    Parameters
    ----------
    planes : int
        Number of blocks, 1 to 64.
    rank : int or "auto"
        Rank k of the magnitudes, 1 to 256, or chosen for each matrix by `choose_rank`. Capped by the matrix's
        smaller side.

    Raises
    ------
    bstk.UsageError
    """

    name = "sign"
    kinds = (KIND,)

    planes: int = 8
    rank: int | str = "auto"

    def __post_init__(self) -> None:
        self._check_number("planes", int, "1 to 64", lambda planes: 1 <= planes <= 64)
        if self.rank != "auto":
            self._check_number("rank", int, "1 to 256, or auto", lambda rank: 1 <= rank <= 256)

    def encode(
        self, weight: torch.Tensor, hessian: torch.Tensor, tokens: int, importance: torch.Tensor
    ) -> Iterator[Block]:
        scale = channel_norms(hessian)
        residual = weight.clone()
        rank = min(self.rank, *weight.shape) if self.rank != "auto" else choose_rank(weight * scale)
        errors = output_errors(residual, hessian)
        for _ in range(self.planes):
            signs = residual >= 0
            u, v = _magnitudes((residual * scale).abs(), scale, rank)
            residual -= _contribution(signs, u, v)
            before, errors = errors, output_errors(residual, hessian)
            yield Block(_pack(signs, u, v), KIND, rank, before, errors)

    @staticmethod
    def rebuild(
        payloads: Sequence[bytes], kinds: Sequence[bstk.Kind], ranks: Sequence[int], shape: tuple[int, int]
    ) -> torch.Tensor:
        total = torch.zeros(shape)
        for payload, rank in zip(payloads, ranks, strict=True):
            total += _contribution(*_unpack(payload, shape, rank))
        return total


def channel_norms(hessian: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of every input channel, from the diagonal of H; float32, shape (inputs,).

    Channels that calibration never excited get a small fraction of the mean, so that their weights are kept coarsely.
    """
    norms = hessian.diagonal().clamp_min(0).sqrt()
    mean = norms.mean()
    return norms.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(norms)


def choose_rank(scaled: torch.Tensor) -> int:
    """Choose the rank that removes the most error per bit from a matrix.

    After a plane of rank k the squared residual is ||A||^2 - sum of the k leading squared singular values of |A|.
    The choice is the k of `RANKS` with the largest fall of its logarithm per bit of m n + 16 k (m + n), for
    `scaled` A = W diag(s), shape (m, n). No rank gets below the rounding of half precision.
    """
    m, n = scaled.shape
    ranks = [k for k in RANKS if k <= min(m, n)]
    _, s, _ = _leading_triplets(scaled.abs(), ranks[-1])
    total = scaled.square().sum(dtype=torch.float64)
    if total == 0:
        return 1
    removed = s.double().square().cumsum(0) / total
    return max(ranks, key=lambda k: float(-(1 - removed[k - 1]).clamp_min(MIN_LEFT).log()) / (m * n + 16 * k * (m + n)))


def _leading_triplets(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Approximate the leading singular triplets of a matrix: U, shape (m, rank), s falling, V, shape (n, rank).

    Subspace iteration with oversampling: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM
    Review 53 (2011), algorithm 4.4. It starts from the row sums (for a matrix of magnitudes, almost the first left
    singular vector) and from mixtures of all columns with fixed Gaussian weights: equal matrices give equal results.
    Columns of the matrix instead of mixtures miss directions of block-shaped ones, up to 80 % of the residual.
    """
    n = matrix.shape[1]
    width = min(rank + OVERSAMPLE, *matrix.shape)
    mixture = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    mixture[:, 0] = 1
    q = torch.linalg.qr(matrix @ mixture).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vh[:rank].t()


def _magnitudes(absolute: torch.Tensor, scale: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half-precision factors of |R diag(s)| ~ U V^T, the scale taken out of V."""
    u, s, v = _leading_triplets(absolute, rank)
    root = s.clamp_min(0).sqrt()
    u, v = u * root, v * root / scale[:, None]
    # Only the product matters; balance the factors so that neither leaves the range of half precision.
    top_u, top_v = u.abs().amax(0).clamp_min(1e-30), v.abs().amax(0).clamp_min(1e-30)
    balance = (top_v / top_u).sqrt()
    u, v = u * balance, v / balance
    return to_half(u), to_half(v)


def _contribution(signs: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute what a block adds to the matrix: S * (U V^T)."""
    product = u.float() @ v.float().t()
    return torch.where(signs, product, -product)


def _pack(signs: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> bytes:
    """Lay a block out: signs row by row, bit j % 8 of byte j // 8, rows padded to whole bytes; then U; then V."""
    bits = np.packbits(signs.numpy(), axis=1, bitorder="little")
    return b"".join([bits.tobytes(), *(factor.contiguous().numpy().astype("<f2").tobytes() for factor in (u, v))])


def _unpack(payload: bytes, shape: tuple[int, int], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = shape
    row = (n + 7) // 8
    bits = np.frombuffer(payload, np.uint8, m * row).reshape(m, row)
    signs = np.unpackbits(bits, axis=1, count=n, bitorder="little").astype(bool)
    factors = np.frombuffer(payload, "<f2", offset=m * row).astype(np.float16)
    u, v = factors[: m * rank].reshape(m, rank), factors[m * rank :].reshape(n, rank)
    return torch.from_numpy(signs), torch.from_numpy(u.copy()), torch.from_numpy(v.copy())
