"""Weights, Hessians of inputs, and what a codec makes of them, for the tests of codecs."""

import torch

import bstk
from bstack.codecs import codec_of_kind


def hessian(n: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    """Of inputs that are independent and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * n, n, generator=generator) * (0.1 + torch.rand(n, generator=generator) * 3)
    return x.t() @ x


def correlated_hessian(n: int) -> torch.Tensor:
    """Of 2000 inputs of one size whose columns go together."""
    mixing = torch.eye(n) + 0.9 * torch.ones(n, n) / n**0.5
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(3)) @ mixing
    return x.t() @ x


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Weights with a few that stick out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    return weight * torch.where(torch.rand(m, n, generator=generator) < 0.02, 8.0, 1.0)


def blocks_of(codec, weight, h, importance=None, tokens=10**6):
    """All blocks of a matrix."""
    importance = torch.ones(weight.shape[0]) if importance is None else importance
    return list(codec.encode(weight, h, tokens, importance))


def rebuilt(blocks, shape, depth=None) -> torch.Tensor:
    """The matrix that the first blocks give."""
    some = blocks[:depth]
    return codec_of_kind(some[0].kind).rebuild(
        [b.payload for b in some], [b.kind for b in some], [b.rank for b in some], tuple(shape)
    )


def outlier_count(blocks, rows):
    """Outliers among the blocks of a matrix with so many rows."""
    return sum(len(b.payload) // 4 - rows - 1 for b in blocks if b.kind is bstk.OUTLIERS)
