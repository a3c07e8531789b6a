"""Element types and kinds of chunks: the only tables of both.

A new kind is a rule function and one line here, and a section in ``SPEC.md``. A rule takes the shape, dtype name and rank of a
record and returns the raw length that these determine, a range of lengths where they leave a choice, or None where any is
valid. It raises ValueError, with a message for the user, where they contradict the kind.
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from itertools import compress, count, islice
from operator import le, or_
from typing import NamedTuple


class DType(NamedTuple):
    """An element type: its code in the index, its name in the API, its size in bytes."""

    code: int
    name: str
    size: int


# In the order of their codes. Files have no elements; a bool is one byte, 0 or 1.
_NAMES = ("none", "f32", "f16", "bf16", "f64", "i8", "u8", "i16", "i32", "i64", "bool")
_SIZES = (0, 4, 2, 2, 8, 1, 1, 2, 4, 8, 1)
DTYPE_BY_CODE = {code: DType(code, *named) for code, named in enumerate(zip(_NAMES, _SIZES, strict=True))}
DTYPE_BY_NAME = {dtype.name: dtype for dtype in DTYPE_BY_CODE.values()}

EXACT_CLASSES, EXACT_TRAILING = 64, 22
"""Classes of an exact chunk, and the most bits that it leaves out at the end of every value."""

MAX_SPARSE_COLUMNS = 2**16 - 1
"""Columns that the 16-bit positions of the spqr and outliers kinds reach."""

SPQR_GROUPS, SPQR_BITS = (16, 32, 64, 128), (3, 4)
"""Columns of a group of an spqr block, and bits of a code."""

_WORDS = {2: "H", 4: next(code for code in "IL" if array(code).itemsize == 4)}

Length = int | range | None
Rule = Callable[[tuple[int, ...], str, int], Length]


@dataclass(frozen=True)
class Kind:
    """A kind of chunk, with its number in the index and its name for people and for JSON.

    Attributes
    ----------
    is_weight : bool
        Its raw length counts as memory.
    is_block : bool
        It is one block of a linear's stack, so one name may have many of it, at levels 0, 1, 2...
    rule : callable
        Returns the raw length for a shape, dtype name and rank.
    feature : int
        The bits of the preamble's incompatible flags that announce it; 0 for the kinds of version 1.0, which every reader
        knows. They are set in a file if and only if the file has a chunk of the kind.
    first : bool
        It may be the first chunk of its name.
    on : tuple of str
        Names of the kinds that the block below it may have.
    restores : bool
        It restores the original and is none of the model: it stands after all other chunks.
    check : callable or None
        Takes a chunk's raw bytes, of a checked length, and its shape; raises ValueError if they point outside the matrix.
    """

    code: int
    name: str
    is_weight: bool
    is_block: bool
    rule: Rule = field(repr=False, compare=False)
    feature: int = 0
    first: bool = True
    on: tuple[str, ...] = ()
    restores: bool = False
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
    return math.prod(shape) * DTYPE_BY_NAME[dtype].size


def _matrix(name: str, numbers: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Return the rows and columns of a block whose `numbers` are float16."""
    if len(shape) != 2:
        raise ValueError(f"{name} block has two dimensions, found shape {shape}")
    if dtype != "f16":
        raise ValueError(f"the {numbers} of {name} block are f16, found {dtype}")
    return shape[0], shape[1]


def _sign(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    rows, columns = _matrix("a sign", "factors", shape, dtype)
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"the rank of a {rows} x {columns} sign block is 1 to {min(rows, columns)}, found {rank}")
    return rows * ((columns + 7) // 8) + DTYPE_BY_NAME[dtype].size * rank * (rows + columns)


def _codes(name: str, earlier: int) -> Rule:
    """Return the rule of a kind of trellis block, which has codes for `earlier` rows above the first."""

    def rule(shape: tuple[int, ...], dtype: str, rank: int) -> int:
        rows, columns = _matrix(f"a {name}", "scales", shape, dtype)
        if rank != 2:
            raise ValueError(f"the rank of a {name} block is its bits per code, 2, found {rank}")
        return (rows + earlier) * ((columns + 3) // 4) + DTYPE_BY_NAME[dtype].size * rows

    return rule


def one_of(numbers: tuple[int, ...]) -> str:
    """Return numbers for a message, such as ``2, 3 or 4``."""
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


class SpqrParts(NamedTuple):
    """Bytes of the parts of an spqr block, zeros between them counted to the first."""

    permutation: int
    codes: int
    statistics: int


def spqr_form(rank: int) -> tuple[int, int]:
    """Return the bits of a code and the columns of a group of an spqr block."""
    return rank % 16, rank // 16 * 16


def spqr_parts(shape: tuple[int, ...], rank: int) -> SpqrParts:
    """Return what the parts of an spqr block take; `rank` is one that the kind's rule allows."""
    rows, columns = shape
    bits, group = spqr_form(rank)
    tiles = -(-rows // 16) * -(-columns // group)
    return SpqrParts(-(-2 * columns // 64) * 64, tiles * 2 * bits * group, tiles * 20)


def _spqr(shape: tuple[int, ...], dtype: str, rank: int) -> int:
    _, columns = _matrix("an spqr", "statistics", shape, dtype)
    bits, group = spqr_form(rank)
    if bits not in SPQR_BITS or group not in SPQR_GROUPS:
        raise ValueError(
            f"the rank of an spqr block is its columns in a group, {one_of(SPQR_GROUPS)}, plus its bits per code, "
            f"{one_of(SPQR_BITS)}; found {rank}"
        )
    if columns > MAX_SPARSE_COLUMNS:
        raise ValueError(f"an spqr block has at most {MAX_SPARSE_COLUMNS} columns, found {columns}")
    return sum(spqr_parts(shape, rank))


def _outliers(shape: tuple[int, ...], dtype: str, rank: int) -> range:
    rows, columns = _matrix("an outliers", "values", shape, dtype)
    if rank:
        raise ValueError(f"the rank of an outliers block is 0, found {rank}")
    if columns > MAX_SPARSE_COLUMNS:
        raise ValueError(f"an outliers block has at most {MAX_SPARSE_COLUMNS} columns, found {columns}")
    empty = 4 * (rows + 1)
    return range(empty, empty + 4 * rows * columns + 1, 4)


def _exact(shape: tuple[int, ...], dtype: str, rank: int) -> range:
    if len(shape) != 2:
        raise ValueError(f"an exact chunk has two dimensions, found shape {shape}")
    if dtype not in ("f32", "f16", "bf16") or rank:
        raise ValueError(f"an exact chunk is of f32, f16 or bf16 and has rank 0, found {dtype}, rank {rank}")
    weights = math.prod(shape)
    least = exact_head(shape[0]) + weights
    return range(least, least + 4 * weights + 1)


def exact_head(rows: int) -> int:
    """Return the bytes of an exact chunk before its symbols."""
    return 4 + 4 * EXACT_CLASSES + rows


def exact_low_bits(trailing: int, number: int) -> int:
    """Return the low bits that follow a symbol of a class of an exact chunk."""
    return min(max(number // 2 - 5, 0), EXACT_TRAILING - trailing)


def check_exact(raw: bytes, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the parts of an exact chunk have the lengths that its head says."""
    trailing, *counts = _integers(raw, 0, 1 + EXACT_CLASSES, 4)
    if trailing > EXACT_TRAILING:
        raise ValueError(f"it leaves out {trailing} bits of a value; allowed are 0 to {EXACT_TRAILING}")
    if sum(counts) != math.prod(shape):
        raise ValueError(f"its classes have {sum(counts)} symbols, but the matrix has {math.prod(shape)} weights")
    start, bits, escapes = exact_head(shape[0]), 0, 0
    for number, symbols in enumerate(counts):
        escaped = raw.count(b"\x80", start, start + symbols)
        bits += exact_low_bits(trailing, number) * (symbols - escaped)
        escapes += escaped
        start += symbols
    if len(raw) != (length := start + -(-bits // 8) + 4 * escapes):
        raise ValueError(f"it has {len(raw)} bytes, but its symbols ask for {length}")


def check_spqr(raw: bytes, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an spqr block begins with a permutation of its columns."""
    columns = shape[1]
    permutation = _integers(raw, 0, columns, 2)
    if max(permutation) >= columns or len(set(permutation)) != columns:
        raise ValueError(f"its permutation does not name each of the {columns} columns once")


def check_outliers(raw: bytes, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the rows of an outliers block split its values, and their columns rise within the matrix."""
    rows, columns = shape
    values = outlier_count(shape, len(raw))
    pointer = _integers(raw, 0, rows + 1, 4)
    if pointer[0] or not all(map(le, pointer, islice(pointer, 1, None))):
        raise ValueError("its row pointer does not start at 0, or falls")
    if pointer[-1] != values:
        raise ValueError(f"its row pointer ends at {pointer[-1]}, but its length has room for {values} values")
    places = _integers(raw, 4 * (rows + 1), values, 2)
    if values and max(places) >= columns:
        raise ValueError(f"it has a value in column {max(places)}; the matrix has {columns} columns")
    # Where a column does not rise, a row must begin.
    row = 0
    for fall in compress(count(1), map(le, islice(places, 1, None), places)):
        row = bisect_left(pointer, fall, row)
        if pointer[row] != fall:
            raise ValueError(f"the columns of row {row - 1} do not rise")


def outlier_count(shape: tuple[int, ...], raw_length: int) -> int:
    """Return how many values an outliers block has, of a length that its rule allows."""
    return raw_length // 4 - (shape[0] + 1)


def _integers(raw: bytes, start: int, length: int, size: int) -> array[int]:
    """Return little-endian unsigned integers of 2 or 4 bytes."""
    values = array(_WORDS[size])
    values.frombytes(memoryview(raw)[start : start + size * length])
    if sys.byteorder == "big":
        values.byteswap()
    return values


_BLOCKS = ("sign", "trellis", "spqr", "outliers", "trellis5")

# code, name, is_weight, is_block, rule, feature
FILE = Kind(1, "file", False, False, _file)
TENSOR = Kind(2, "tensor", True, False, _tensor)
SIGN = Kind(3, "sign", True, True, _sign, on=("sign",))
TRELLIS = Kind(4, "trellis", True, True, _codes("trellis", 3), on=("trellis", "spqr", "outliers"))
SPQR = Kind(5, "spqr", True, True, _spqr, 1 << 0, check=check_spqr)
OUTLIERS = Kind(6, "outliers", True, True, _outliers, 1 << 1, first=False, on=("spqr",), check=check_outliers)
TRELLIS5 = Kind(7, "trellis5", True, True, _codes("trellis5", 4), 1 << 2, on=("trellis5", "spqr", "outliers"))
EXACT = Kind(8, "exact", False, False, _exact, 1 << 3, False, _BLOCKS, restores=True, check=check_exact)
ORIGINAL = Kind(9, "original", False, False, _file, 1 << 4, restores=True)

BY_CODE = {kind.code: kind for kind in (FILE, TENSOR, SIGN, TRELLIS, SPQR, OUTLIERS, TRELLIS5, EXACT, ORIGINAL)}


def known_features() -> int:
    """Return the incompatible-flag bits that this package understands."""
    return reduce(or_, (kind.feature for kind in BY_CODE.values()))
