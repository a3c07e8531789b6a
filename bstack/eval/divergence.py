"""Divergence of one model's next-token distribution from another's."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Divergence", "divergence"]


class Divergence(NamedTuple):
    """Per position: D(original || model) in nats, and 1 where both find the same token most likely, else 0."""

    kl: torch.Tensor
    same_top: torch.Tensor


def divergence(original: torch.Tensor, logits: torch.Tensor) -> Divergence:
    """Compare a model's logits with the original's log probabilities, both of shape (positions, vocabulary)."""
    reference, candidate = original.float(), logits.float().log_softmax(-1)
    kl = (reference.exp() * (reference - candidate)).sum(-1).clamp_min(0)
    same = reference.argmax(-1) == candidate.argmax(-1)
    return Divergence(kl, same.float())
