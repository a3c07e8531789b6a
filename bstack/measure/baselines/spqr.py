"""Baseline: SpQR as the codec makes it, at one size: dense part and 1 % outliers, no blocks on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import bstk
from bstack.codecs.spqr import SpqrCodec

__all__ = ["SpqrMatrix", "spqr"]


@dataclass(frozen=True)
class SpqrMatrix:
    """A quantised matrix.

    Attributes
    ----------
    dense_part, outliers : bytes
        The blocks; no outliers, no bytes.
    rank : int
        Of the dense part's block.
    shape : tuple of int
        (outputs, inputs).
    """

    dense_part: bytes
    outliers: bytes
    rank: int
    shape: tuple[int, int]

    def payload(self) -> bytes:
        """All its bytes."""
        return self.dense_part + self.outliers

    def dense(self) -> torch.Tensor:
        """The matrix, float32."""
        blocks = [(self.dense_part, bstk.SPQR, self.rank), (self.outliers, bstk.OUTLIERS, 0)]
        return SpqrCodec.rebuild(*zip(*(block for block in blocks if block[0]), strict=True), self.shape)


def spqr(weights: Mapping[str, tuple[torch.Tensor, torch.Tensor, int]], bits: int) -> dict[str, SpqrMatrix]:
    """Quantise the matrices of a layer together.

    Parameters
    ----------
    weights : mapping
        By name: weight (outputs, inputs), moment (inputs, inputs), tokens.
    bits : int
        3 or 4.
    """
    # Every output counts alike, as in the paper.
    tasks = {
        name: (weight.contiguous(), moment, tokens, torch.ones(weight.shape[0]))
        for name, (weight, moment, tokens) in weights.items()
    }
    codec = SpqrCodec(bits, planes=0).for_layer(tasks.values())
    found = {}
    for name, task in tasks.items():
        dense_part, *outliers = codec.encode(*task)
        payload = b"".join(block.payload for block in outliers)
        found[name] = SpqrMatrix(dense_part.payload, payload, dense_part.rank, tuple(task[0].shape))
    return found
