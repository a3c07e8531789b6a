"""What a chunk can be: the one table. A new kind is a rule function and one line here, and a section in ``SPEC.md``.

A rule takes what the record says (shape, dtype name, rank) and returns the raw length these determine, a range of lengths
where they leave a choice, or None where any is right; it raises ValueError, with words for the user, where they contradict
the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from . import contents, dtypes

Length = int | range | None
Rule = Callable[[tuple[int, ...], str, int], Length]


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
    first : bool
        It may be the first chunk of its name.
    on : tuple of str
        Names of the kinds that the block below it may be of.
    check : callable or None
        Takes a chunk's raw bytes and shape, after their length has been checked, and raises ValueError where a decoder
        would be led outside the matrix.
    """

    code: int
    name: str
    is_weight: bool
    is_block: bool
    rule: Rule = field(repr=False, compare=False)
    feature: int = 0
    first: bool = True
    on: tuple[str, ...] = ()
    check: Callable[[bytes, tuple[int, ...]], None] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.name


def _file(shape: tuple[int, ...], dtype: str, rank: int) -> Length:
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


class SpqrParts(NamedTuple):
    """Bytes of the parts of an spqr block, zeros between them counted to the first."""

    permutation: int
    codes: int
    statistics: int


def spqr_parts(shape: tuple[int, ...], rank: int) -> SpqrParts:
    """Return what the parts of an spqr block take; `rank` is one that the kind's rule allows."""
    rows, columns = shape
    bits, group = rank % 16, rank // 16 * 16
    tiles = -(-rows // 16) * -(-columns // group)
    return SpqrParts(-(-2 * columns // 64) * 64, tiles * 2 * bits * group, tiles * 20)


def _spqr(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    if len(shape) != 2:
        raise ValueError(f"an spqr block has two dimensions, found shape {shape}")
    columns = shape[1]
    if dtype != "f16":
        raise ValueError(f"the statistics of an spqr block are f16, found {dtype}")
    subtiles, bits = divmod(rank, 16)
    if bits not in (3, 4) or subtiles not in (1, 2, 4, 8):
        raise ValueError(
            f"the rank of an spqr block is its columns in a group, 16, 32, 64 or 128, plus its bits per code, 3 or 4; found {rank}"
        )
    if columns > MAX_SPARSE_COLUMNS:
        raise ValueError(f"an spqr block has at most {MAX_SPARSE_COLUMNS} columns, found {columns}")
    return sum(spqr_parts(shape, rank))


def _outliers(shape: tuple[int, ...], dtype: str, rank: int) -> range:
    if len(shape) != 2:
        raise ValueError(f"an outliers block has two dimensions, found shape {shape}")
    rows, columns = shape
    if dtype != "f16":
        raise ValueError(f"the values of an outliers block are f16, found {dtype}")
    if rank:
        raise ValueError(f"the rank of an outliers block is 0, found {rank}")
    if columns > MAX_SPARSE_COLUMNS:
        raise ValueError(f"an outliers block has at most {MAX_SPARSE_COLUMNS} columns, found {columns}")
    least = 4 * (rows + 1)
    return range(least, least + 4 * rows * columns + 1, 4)


MAX_SPARSE_COLUMNS = 2**16 - 1
"""Columns that the 16-bit positions of the spqr and outliers kinds reach."""

FILE = Kind(1, "file", is_weight=False, is_block=False, rule=_file)
TENSOR = Kind(2, "tensor", is_weight=True, is_block=False, rule=_tensor)
SIGN = Kind(3, "sign", is_weight=True, is_block=True, rule=_sign, on=("sign",))
TRELLIS = Kind(4, "trellis", is_weight=True, is_block=True, rule=_trellis, on=("trellis", "spqr", "outliers"))
SPQR = Kind(5, "spqr", is_weight=True, is_block=True, rule=_spqr, feature=1 << 0, check=contents.check_spqr)
OUTLIERS = Kind(
    6,
    "outliers",
    is_weight=True,
    is_block=True,
    rule=_outliers,
    feature=1 << 1,
    first=False,
    on=("spqr",),
    check=contents.check_outliers,
)

BY_CODE = {kind.code: kind for kind in (FILE, TENSOR, SIGN, TRELLIS, SPQR, OUTLIERS)}


def known_features() -> int:
    """Return the incompatible-flag bits that this package understands."""
    bits = 0
    for kind in BY_CODE.values():
        bits |= kind.feature
    return bits
