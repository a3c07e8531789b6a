"""What a chunk can be: the one table. A new kind is a rule function and one line here, and a section in ``SPEC.md``.

A rule takes what the record says (shape, dtype name, rank) and returns the raw length these determine, or None where
they determine none; it raises ValueError, with words for the user, where they contradict the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from . import dtypes

Rule = Callable[[tuple[int, ...], str, int], "int | None"]


@dataclass(frozen=True)
class Kind:
    """A kind of chunk.

    Attributes
    ----------
    code : int
        Its number in the index.
    name : str
        Its name for people and for JSON.
    is_weight : bool
        It is part of the model's weights, so its raw length counts as memory.
    is_block : bool
        It is one block of a linear's stack, so one name may have many of it, at levels 0, 1, 2...
    feature : int
        The bits of the preamble's incompatible-flags word that announce it; 0 for the kinds of version 1.0, which every
        reader knows. They are set in a file if and only if the file has a chunk of the kind.
    """

    code: int
    name: str
    is_weight: bool
    is_block: bool
    rule: Rule = field(repr=False, compare=False)
    feature: int = 0

    def __str__(self) -> str:
        return self.name


def _file(shape: tuple[int, ...], dtype: str, rank: int) -> int | None:
    if shape or dtype != "none" or rank:
        raise ValueError(f"a file has no shape, dtype or rank, found {shape}, {dtype}, {rank}")
    return None


def _tensor(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    if dtype == "none" or rank:
        raise ValueError(f"a tensor has a dtype and no rank, found {dtype}, rank {rank}")
    return math.prod(shape) * dtypes.BY_NAME[dtype].size


def _sign(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    if len(shape) != 2:
        raise ValueError(f"a sign block has two dimensions, found shape {shape}")
    rows, columns = shape
    if dtype != "f16":
        raise ValueError(f"the factors of a sign block are f16, found {dtype}")
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"the rank of a {rows} x {columns} sign block is 1 to {min(rows, columns)}, found {rank}")
    return rows * ((columns + 7) // 8) + dtypes.BY_NAME[dtype].size * rank * (rows + columns)


def _trellis(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    if len(shape) != 2:
        raise ValueError(f"a trellis block has two dimensions, found shape {shape}")
    rows, columns = shape
    if dtype != "f16":
        raise ValueError(f"the scales of a trellis block are f16, found {dtype}")
    if rank != 2:
        raise ValueError(f"the rank of a trellis block is its bits per code, 2, found {rank}")
    return (rows + 3) * ((columns + 3) // 4) + dtypes.BY_NAME[dtype].size * rows


FILE = Kind(1, "file", is_weight=False, is_block=False, rule=_file)
TENSOR = Kind(2, "tensor", is_weight=True, is_block=False, rule=_tensor)
SIGN = Kind(3, "sign", is_weight=True, is_block=True, rule=_sign)
TRELLIS = Kind(4, "trellis", is_weight=True, is_block=True, rule=_trellis)

BY_CODE = {kind.code: kind for kind in (FILE, TENSOR, SIGN, TRELLIS)}


def known_features() -> int:
    """Return the incompatible-flag bits that this package understands."""
    bits = 0
    for kind in BY_CODE.values():
        bits |= kind.feature
    return bits
