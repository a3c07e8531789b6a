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
    """A quantised matrix.

    Attributes
    ----------
    blocks : tuple of bytes
        The dense part, and the outliers if there are any.
    rank : int
        Of the dense part's block.
    shape : tuple of int
        (outputs, inputs).
    """

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
    """Check that the linears can have the bits per weight that the choices ask for.

    Parameters
    ----------
    choices : sequence of Choice
    layers : sequence
        By layer, the shapes (outputs, inputs) of its linears.

    Raises
    ------
    bstk.UsageError
    """
    for choice in choices:
        if choice.bpw is not None:
            with error_prefix(f"against {choice.name}"):
                SpqrCodec(choice.bits, bpw=choice.bpw).check_shapes(
                    [[[shape] for shape in shapes] for shapes in layers]
                )


def spqr(
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor, int]], bits: int, bpw: float | None = None
) -> dict[str, SpqrMatrix]:
    """Quantise the matrices of a layer together.

    Parameters
    ----------
    weights : mapping
        By name: weight (outputs, inputs), hessian (inputs, inputs), tokens.
    bits : int
        3 or 4.
    bpw : float, optional
        Bits per weight that they may take together; None: 1 % of the weights are outliers.
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
