"""What a decoder may rely on inside a block: indices that point into the matrix. Checked when a chunk is read.

A length that fits its shape (`kinds`) is enough for the kinds whose bytes are codes and numbers: any byte is a valid one.
A block that holds positions needs a look at them.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from itertools import compress, islice
from itertools import count as numbers
from operator import le

_WORDS = {2: "H", 4: next(code for code in "IL" if array(code).itemsize == 4)}


def check_spqr(raw: bytes, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an spqr block begins with a permutation of its columns.

    Parameters
    ----------
    raw : bytes
        The block, of the length that its rule asks for.
    shape : tuple of int
        (rows, columns).
    """
    columns = shape[1]
    permutation = _integers(raw, 0, columns, 2)
    if max(permutation) >= columns or len(set(permutation)) != columns:
        raise ValueError(f"its permutation does not name each of the {columns} columns once")


def check_outliers(raw: bytes, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the rows of an outliers block split its values, and their columns rise within the matrix.

    Parameters
    ----------
    raw : bytes
        The block, of a length that its rule allows.
    shape : tuple of int
        (rows, columns).
    """
    rows, columns = shape
    count = outlier_count(shape, len(raw))
    pointer = _integers(raw, 0, rows + 1, 4)
    if pointer[0] or not all(map(le, pointer, islice(pointer, 1, None))):
        raise ValueError("its row pointer does not start at 0, or falls")
    if pointer[-1] != count:
        raise ValueError(f"its row pointer ends at {pointer[-1]}, but its length has room for {count} values")
    places = _integers(raw, 4 * (rows + 1), count, 2)
    if count and max(places) >= columns:
        raise ValueError(f"it has a value in column {max(places)}; the matrix has {columns} columns")
    # Where a column does not rise, a row must begin. Looked at one by one: there may be as many as values.
    row = 0
    for fall in compress(numbers(1), map(le, islice(places, 1, None), places)):
        row = bisect_left(pointer, fall, row)
        if pointer[row] != fall:
            raise ValueError(f"the columns of row {row - 1} do not rise")


def outlier_count(shape: tuple[int, ...], raw_length: int) -> int:
    """Return how many values an outliers block has, of a length that its rule allows."""
    return raw_length // 4 - (shape[0] + 1)


def _integers(raw: bytes, start: int, count: int, size: int) -> array:
    """Little-endian unsigned integers of 2 or 4 bytes."""
    values = array(_WORDS[size])
    values.frombytes(memoryview(raw)[start : start + size * count])
    if sys.byteorder == "big":
        values.byteswap()
    return values
