"""Weights of the model in construction, rebuilt from finished parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import bstk
from bstack.codecs import codec_of_kind
from bstack.compression.assemble import Source
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton
from bstk.frames import unpack

__all__ = ["put", "rebuild", "weight_view"]


def rebuild(blocks: Sequence[Source]) -> torch.Tensor:
    """Add up the first blocks of a stack; float32, shape (outputs, inputs)."""
    records = [record for record, _ in blocks]
    kinds = [bstk.kinds.BY_CODE[record.kind] for record in records]
    payloads = [unpack(read(), record.raw_length) for record, read in blocks]
    return codec_of_kind(kinds[0]).rebuild(payloads, kinds, [r.rank for r in records], tuple(records[0].shape))


def weight_view(skeleton: Skeleton, name: str, blocks: Sequence[Source]) -> torch.Tensor:
    """The loaded weight that a stack stands for, as (outputs, inputs); a view."""
    matrix = MatrixName.parse(name)
    return matrix.view(skeleton.parameter(matrix.parameter), blocks[0][0].transposed)


def put(skeleton: Skeleton, stacks: Mapping[str, Sequence[Source]], depths: Mapping[str, int] | None = None) -> None:
    """Overwrite loaded weights with stacks, each to its depth or whole."""
    with torch.no_grad():
        for name, blocks in stacks.items():
            depth = len(blocks) if depths is None else depths[name]
            weight_view(skeleton, name, blocks).copy_(rebuild(blocks[:depth]))
