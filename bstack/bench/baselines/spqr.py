"""Baseline: SpQR as the codec makes it, at one size: dense part and outliers, no blocks on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import bstk
from bstack.bench.options import Choice
from bstack.codecs.spqr import SpqrCodec
from bstk.errors import error_prefix

__all__ = ["SpqrMatrix", "check_targets", "spqr"]


@dataclass(frozen=True)
class SpqrMatrix:
    """A quantised matrix: the block of the dense part, of that rank, and the block of the outliers if there are any."""

    blocks: tuple[bytes, ...]
    rank: int
    shape: tuple[int, int]

    def payload(self) -> bytes:
        """Return all its bytes."""
        return b"".join(self.blocks)

    def dense(self) -> torch.Tensor:
        """Return the matrix, float32."""
        count = len(self.blocks)
        return SpqrCodec.rebuild(self.blocks, (bstk.SPQR, bstk.OUTLIERS)[:count], (self.rank, 0)[:count], self.shape)


def check_targets(choices: Sequence[Choice], layers: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Check that the linears, whose shapes are given by layer, can have the bits per weight that the choices ask for."""
    for choice in choices:
        if choice.bpw is not None:
            with error_prefix(f"against {choice.name}"):
                groups = [[[shape] for shape in shapes] for shapes in layers]
                SpqrCodec(choice.bits, bpw=choice.bpw).check_shapes(groups)


def spqr(
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor, int]], bits: int, bpw: float | None = None
) -> dict[str, SpqrMatrix]:
    """Quantise the matrices of a layer together, given as weight (outputs, inputs), hessian and tokens by name.

    `bpw` bounds their bits per weight together; without it 1 % of the weights are outliers.
    """
    # All outputs have equal weight, as in the paper.
    tasks = {
        name: (weight.contiguous(), hessian, tokens, torch.ones(weight.shape[0]))
        for name, (weight, hessian, tokens) in weights.items()
    }
    codec = SpqrCodec(bits, bpw=bpw, planes=0).for_layer(tasks.values())
    found = {}
    for name, task in tasks.items():
        blocks = list(codec.encode(*task))
        found[name] = SpqrMatrix(
            tuple(block.payload for block in blocks), blocks[0].rank, (task[0].shape[0], task[0].shape[1])
        )
    return found
