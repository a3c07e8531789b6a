"""A matrix that stays packed: where its blocks lie in memory, as the C kernels see it (csrc/bstack.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np

import bstk
from bstk.kinds import BY_CODE

__all__ = [
    "BLOCKS",
    "OUTLIERS",
    "PLAIN",
    "RANK",
    "SIGN",
    "SPQR",
    "TRELLIS",
    "Matrix",
    "block_bytes",
    "check_block",
    "check_put",
    "kind_bits",
    "pointer",
]

SIGN, TRELLIS, SPQR, OUTLIERS = (kind.code for kind in (bstk.SIGN, bstk.TRELLIS, bstk.SPQR, bstk.OUTLIERS))
# Kinds that multiply the inputs themselves; trellis blocks multiply the rotated inputs.
PLAIN = (SIGN, SPQR, OUTLIERS)
# Most blocks of a stack, and highest rank of a sign block.
BLOCKS, RANK = 16, 16


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Return the address of a C-contiguous array, which the caller keeps alive."""
    return ctypes.c_void_p(array.ctypes.data)


class Matrix(ctypes.Structure):
    """A stack of blocks in memory, W of m rows (outputs) and n columns (inputs).

    The owner of the memory fills in levels with `put` and sets `count`: levels 0 to count - 1 are in use. It may raise
    `count` at any time, even while calls read the matrix, because each call reads it once, at its start. It may lower
    `count`, and change levels that were in use, only while no such call runs. Blocks may lie at any address; alignment to
    64 bytes makes products a little faster.

    Attributes
    ----------
    rows, columns : int
        m and n.
    count : int
        Blocks in use; with 0 the matrix is zero.
    kind, rank : array of 16 uint8
        `SIGN`, `TRELLIS`, `SPQR` or `OUTLIERS`, and the record's rank.
    block : array of 16 addresses
        Of the chunks' raw bytes.
    """

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("kind", ctypes.c_uint8 * BLOCKS),
        ("rank", ctypes.c_uint8 * BLOCKS),
        ("block", ctypes.c_void_p * BLOCKS),
    ]

    def put(self, level: int, kind: int, rank: int, address: int, *, checked: bool = False) -> None:
        """Set where the block of a level lies; `count` stays as it is.

        Parameters
        ----------
        level : int
            0 to 15.
        kind, rank : int
            As in the chunk's record; a sign block has rank 16 at most.
        address : int
            Of the block's bytes, which the caller keeps alive and unchanged.
        checked : bool
            Whether the bytes have passed `check_block`, or the container's reader, which checks the same. Required for
            kinds `SPQR` and `OUTLIERS`, which say where to read.

        Raises
        ------
        ValueError
            The matrix does not take such a block.
        """
        check_put(self.rows, self.columns, level, kind, rank, checked)
        self.kind[level], self.rank[level], self.block[level] = kind, rank, address

    @classmethod
    def of(cls, rows: int, columns: int, blocks: Sequence[tuple[int, int, bytes]]) -> Matrix:
        """Make a matrix of payloads, (kind, rank, bytes) of each level, and keep copies of the bytes.

        Raises
        ------
        ValueError
            The shape, or a kind, rank or payload, is not possible.
        """
        if not (1 <= rows < 2**31 and 1 <= columns < 2**31):
            raise ValueError(f"a matrix of {rows} x {columns}; each side is 1 to 2**31 - 1.")
        matrix = cls(rows, columns)
        matrix._kept = [np.frombuffer(payload, np.uint8).copy() for _, _, payload in blocks]
        for level, ((kind, rank, payload), copy) in enumerate(zip(blocks, matrix._kept, strict=True)):
            check_block(rows, columns, kind, rank, payload)
            matrix.put(level, kind, rank, copy.ctypes.data, checked=True)
        matrix.count = len(blocks)
        return matrix

    def payload(self, level: int) -> np.ndarray:
        """Return the bytes of a block, uint8, where they lie; valid as long as the owner keeps them."""
        count = 0
        if self.kind[level] == OUTLIERS:
            count = ctypes.c_uint32.from_address(self.block[level] + 4 * self.rows).value
        length = block_bytes(self.rows, self.columns, self.kind[level], self.rank[level], count)
        return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.block[level]))


def kind_bits(kinds: Iterable[int]) -> int:
    """Return a set of kinds as the C kernels take it: bit k for kind k."""
    return sum(1 << kind for kind in kinds)


def check_put(rows: int, columns: int, level: int, kind: int, rank: int, checked: bool) -> None:
    """Raise ValueError for a block that a matrix does not take; see `Matrix.put`."""
    if not 0 <= level < BLOCKS:
        raise ValueError(f"level is {level}; a matrix has levels 0 to {BLOCKS - 1}.")
    block_bytes(rows, columns, kind, rank)
    if BY_CODE[kind].check is not None and not checked:
        raise ValueError(f"a block of kind {kind} says where to read and has not been checked. Call check_block first.")


def check_block(rows: int, columns: int, kind: int, rank: int, payload: bytes) -> None:
    """Check that products with a block read nothing outside it and its inputs.

    Raises
    ------
    ValueError
        The payload has another length than the container's rule says, or points outside the matrix.
    """
    lengths = _lengths(rows, columns, kind, rank)
    if len(payload) not in lengths:
        raise ValueError(
            f"a block has {len(payload)} bytes; one of {rows} x {columns}, kind {kind}, has {lengths[0]}"
            f"{' and 4 for each outlier' if len(lengths) > 1 else ''}."
        )
    if check := BY_CODE[kind].check:
        check(payload, (rows, columns))


def block_bytes(rows: int, columns: int, kind: int, rank: int, count: int = 0) -> int:
    """Return the length of a block in bytes; `count` is the number of outliers.

    Raises
    ------
    ValueError
        The kernels do not know the kind or the rank.
    """
    return _lengths(rows, columns, kind, rank)[count]


def _lengths(rows: int, columns: int, kind: int, rank: int) -> range:
    """Return the lengths that a block may have: one, or for outliers one for each count."""
    if kind not in (TRELLIS, *PLAIN):
        known = ", ".join(f"{code} ({BY_CODE[code]})" for code in sorted((TRELLIS, *PLAIN)))
        raise ValueError(f"a block of kind {kind}; the kernels know {known}.")
    lengths = BY_CODE[kind].rule((rows, columns), "f16", rank)
    if kind == SIGN and rank > RANK:
        raise ValueError(f"a sign block of rank {rank}; the kernels take 1 to {RANK}.")
    if lengths is None:
        raise ValueError(f"a block of kind {kind} has no fixed length.")
    return lengths if isinstance(lengths, range) else range(lengths, lengths + 1)
