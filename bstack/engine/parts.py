"""Which stacks of blocks make up which parameter of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import bstk
from bstack.errors import UnsupportedModelError, holds_unknown
from bstack.kernels.matrix import check_put
from bstack.models.names import MatrixName
from bstk.errors import DamagedError

__all__ = ["check_depth", "parse_name", "part_of", "parts_of"]


def parts_of(
    chunks: Iterable[bstk.Chunk], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[MatrixName, list[bstk.Chunk]]]]:
    """Group blocks by the parameter that they make up.

    `shapes` gives the shape of each parameter of the model. Returns, for each parameter, the name and the blocks of each of its
    parts, in the order of their rows or slices. DamagedError unless the parts fill the parameter without gap or overlap.
    """
    stacks: dict[str, list[bstk.Chunk]] = defaultdict(list)
    for chunk in chunks:
        if chunk.is_block:
            stacks[chunk.name].append(chunk)
    found: dict[str, list[tuple[MatrixName, list[bstk.Chunk]]]] = defaultdict(list)
    for name, blocks in stacks.items():
        matrix = parse_name(name)
        if matrix.parameter not in shapes:
            raise holds_unknown("The file", name)
        part_of(matrix, np.broadcast_to(np.empty(()), shapes[matrix.parameter]), blocks[0])
        found[matrix.parameter].append((matrix, blocks))
    for parameter, parts in found.items():
        length = shapes[parameter][0]
        parts.sort(key=lambda part: _extent(part[0], length))
        end = 0
        for matrix, _ in parts:
            start, stop = _extent(matrix, length)
            if start != end or stop <= start:
                raise DamagedError(
                    f"The stacks of {parameter} fill {end} of its {length} rows or slices, and {matrix} follows."
                )
            end = stop
        if end != length:
            raise DamagedError(f"The stacks of {parameter} fill {end} of its {length} rows or slices.")
    return found


def _extent(matrix: MatrixName, length: int) -> tuple[int, int]:
    """Return the first row or slice of a part and the one after its last, in a parameter of that length."""
    if matrix.index is not None:
        return matrix.index, matrix.index + 1
    return matrix.rows or (0, length)


def parse_name(name: str) -> MatrixName:
    """Parse the name of a stack; bstk.DamagedError if it is invalid."""
    try:
        return MatrixName.parse(name)
    except ValueError as error:
        raise DamagedError(f"{error}; format/SPEC.md defines names of stacks.") from None


def part_of(matrix: MatrixName, tensor: Any, block: bstk.Chunk) -> Any:
    """Return the part of a parameter, an array or tensor, that a stack fills, as (outputs, inputs); DamagedError for another shape."""
    try:
        view = matrix.view(tensor, block.transposed)
    except (IndexError, RuntimeError):
        view = None
    if view is None or tuple(view.shape) != tuple(block.shape):
        raise DamagedError(
            f"The stack {block.name} is {' x '.join(map(str, block.shape))}, which is not what it should fill in a "
            f"parameter of {' x '.join(map(str, tensor.shape))}."
        )
    return view


def check_depth(parts: list[tuple[MatrixName, list[bstk.Chunk]]], shown: str) -> None:
    """Refuse blocks that the kernels do not take."""
    for _, blocks in parts:
        for block in blocks:
            try:
                rows, columns = block.shape
                check_put(rows, columns, block.level, block.kind.code, block.rank, checked=True)
            except ValueError as error:
                raise UnsupportedModelError(
                    f"{shown}: {block.name} has {len(blocks)} blocks, which cannot run packed: {error} Load it with "
                    "bstack.load(..., mode='dense')."
                ) from None
