"""Perplexity of a model on windows of tokens."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["perplexity"]


def perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    """Return the exponential of the mean negative log likelihood of every token but the first of each window.

    Windows are token ids, int64, shape (windows, length), each run on its own; infinite when the likelihood underflows.
    """
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
