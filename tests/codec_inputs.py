"""Second moments of inputs, n x n, for the tests of codecs."""

import torch


def moment(n: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    """Of inputs that are independent and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * n, n, generator=generator) * (0.1 + torch.rand(n, generator=generator) * 3)
    return x.t() @ x


def correlated_moment(n: int) -> torch.Tensor:
    """Of 2000 inputs of one size whose columns go together."""
    mixing = torch.eye(n) + 0.9 * torch.ones(n, n) / n**0.5
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(3)) @ mixing
    return x.t() @ x
