"""Rebuild weights from finished parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bstack.codecs import codec_of_kind
from bstack.models.names import MatrixName
from bstack.models.skeleton import Skeleton
from bstack.workdir import Record
from bstk.frames import unpack

__all__ = ["load_blocks", "rebuild", "weight_view"]


def rebuild(blocks: Sequence[Record]) -> torch.Tensor:
    """Add up the first blocks of a stack; float32, shape (outputs, inputs)."""
    entries = [record.entry for record in blocks]
    kinds = [entry.kind for entry in entries]
    payloads = [unpack(record.read(), record.entry.raw_length) for record in blocks]
    rows, columns = entries[0].shape
    return codec_of_kind(kinds[0]).rebuild(payloads, kinds, [entry.rank for entry in entries], (rows, columns))


def weight_view(skeleton: Skeleton, name: str, blocks: Sequence[Record]) -> torch.Tensor:
    """Return a view of the loaded weight that a stack replaces, as (outputs, inputs)."""
    matrix = MatrixName.parse(name)
    return matrix.view(skeleton.parameter(matrix.parameter), blocks[0].entry.transposed)


def load_blocks(
    skeleton: Skeleton, stacks: Mapping[str, Sequence[Record]], depths: Mapping[str, int] | None = None
) -> None:
    """Overwrite loaded weights with the first blocks of their stacks, or all."""
    with torch.no_grad():
        for name, blocks in stacks.items():
            depth = len(blocks) if depths is None else depths[name]
            weight_view(skeleton, name, blocks).copy_(rebuild(blocks[:depth]))
