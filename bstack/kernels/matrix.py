"""A matrix that stays packed: where its blocks lie in memory, as the C kernels see it (csrc/bstack.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np

from bstack.kernels.spqr import Outliers, dense_bytes, outlier_bytes

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
]

# Kinds by their codes in the container (format/SPEC.md, section 6).
SIGN, TRELLIS, SPQR, OUTLIERS = 3, 4, 5, 6
# Those that multiply the inputs themselves; trellis blocks multiply the rotated ones.
PLAIN = (SIGN, SPQR, OUTLIERS)
# Blocks of a stack and rank of a sign block, at most.
BLOCKS, RANK = 16, 16


class Matrix(ctypes.Structure):
    """A stack of blocks in memory, W of m rows (outputs) and n columns (inputs).

    The owner of the memory fills in levels with `put`, and sets `count`: levels 0 to count - 1 are in use. It may
    raise `count` at any time, also while calls read the matrix: each takes it once, at its start. It may lower it, and
    change levels that were in use, whenever no such call is running. Nothing has to be rebuilt. Blocks may lie at any address, 64-byte alignment helps a little.

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
        """Say where the block of a level lies; `count` stays as it is.

        Parameters
        ----------
        level : int
            0 to 15.
        kind : int
            `SIGN`, `TRELLIS`, `SPQR` or `OUTLIERS`.
        rank : int
            1 to 16 for a sign block; 2, the bits of a code, for a trellis block; bits and group of an SpQR block; 0 for outliers.
        address : int
            Of the block's bytes, which the caller keeps alive and unchanged.
        checked : bool
            `check_block` has found nothing wrong with these bytes. Blocks of kind `SPQR` and `OUTLIERS`, which say where to
            read, are not taken without it.

        Raises
        ------
        ValueError
        """
        check_put(self.rows, self.columns, level, kind, rank, checked)
        self.kind[level], self.rank[level], self.block[level] = kind, rank, address

    @classmethod
    def of(cls, rows: int, columns: int, blocks: Sequence[tuple[int, int, bytes]]) -> Matrix:
        """A matrix of payloads: (kind, rank, bytes) of each level. It keeps copies of the bytes.

        Raises
        ------
        ValueError
            For a shape, kind, rank or length that cannot be.
        """
        if not (1 <= rows < 2**31 and 1 <= columns < 2**31):
            raise ValueError(f"a matrix of {rows} x {columns}; each side is 1 to 2**31 - 1.")
        matrix = cls(rows, columns)
        matrix._kept = [np.frombuffer(payload, np.uint8).copy() for _, _, payload in blocks]
        for level, ((kind, rank, _), bytes_) in enumerate(zip(blocks, matrix._kept, strict=True)):
            check_block(rows, columns, kind, rank, bytes_)
            matrix.put(level, kind, rank, bytes_.ctypes.data, checked=True)
        matrix.count = len(blocks)
        return matrix

    def payload(self, level: int) -> np.ndarray:
        """The bytes of a block, uint8, where they lie; valid as long as the owner keeps them."""
        count = 0
        if self.kind[level] == OUTLIERS:
            count = ctypes.c_uint32.from_address(
                self.block[level] + 4 * self.rows
            ).value  # a row pointer need not be aligned
        length = block_bytes(self.rows, self.columns, self.kind[level], self.rank[level], count)
        return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.block[level]))


def kind_bits(kinds: Iterable[int]) -> int:
    """A set of kinds as the C kernels take it: bit k for kind k."""
    return sum(1 << kind for kind in kinds)


def check_put(rows: int, columns: int, level: int, kind: int, rank: int, checked: bool) -> None:
    """Raise ValueError for a block that a matrix does not take; see `Matrix.put`."""
    if not 0 <= level < BLOCKS:
        raise ValueError(f"level is {level}; a matrix has levels 0 to {BLOCKS - 1}.")
    block_bytes(rows, columns, kind, rank)
    if kind in (SPQR, OUTLIERS) and not checked:
        raise ValueError(
            f"a block of kind {kind} that has not been checked; it says where to read. Call check_block first."
        )


def check_block(rows: int, columns: int, kind: int, rank: int, payload: bytes | np.ndarray) -> None:
    """See that products with a block read nothing outside of it and of its inputs.

    Parameters
    ----------
    rows, columns : int
    kind, rank : int
    payload : bytes or array of uint8
        The chunk's raw bytes.

    Raises
    ------
    ValueError
        For another length than `block_bytes`, an order of inputs that is no permutation, or outliers out of place.
    """
    bytes_ = np.frombuffer(payload, np.uint8)
    if kind == OUTLIERS:
        block_bytes(rows, columns, kind, rank)
        Outliers.unpack(bytes_, rows, columns)
        return
    expected = block_bytes(rows, columns, kind, rank)
    if bytes_.size != expected:
        raise ValueError(f"a block has {bytes_.size} bytes; one of {rows} x {columns}, kind {kind}, has {expected}.")
    if kind == SPQR:
        order = bytes_[: 2 * columns].view("<u2")
        if order.max() >= columns or (np.bincount(order, minlength=columns) != 1).any():
            raise ValueError(f"the order of an SpQR block's inputs is no permutation of 0 to {columns - 1}.")


def block_bytes(rows: int, columns: int, kind: int, rank: int, count: int = 0) -> int:
    """Length of a block in bytes; `count` is that of outliers.

    Raises
    ------
    ValueError
        For a kind or a rank that the kernels do not know.
    """
    if kind == TRELLIS:
        if rank != 2:
            raise ValueError(f"a trellis block of rank {rank}; it has 2 bits per code.")
        return (rows + 3) * -(-columns // 4) + 2 * rows
    if kind == SPQR:
        return dense_bytes(rows, columns, rank)
    if kind == OUTLIERS:
        if rank:
            raise ValueError(f"a block of outliers of rank {rank}; it has rank 0.")
        return outlier_bytes(rows, count)
    if kind != SIGN:
        raise ValueError(
            f"a block of kind {kind}; the kernels know {SIGN} (sign), {TRELLIS} (trellis), {SPQR} (SpQR) and {OUTLIERS} (outliers)."
        )
    if not 1 <= rank <= RANK:
        raise ValueError(f"a sign block of rank {rank}; the kernels take 1 to {RANK}.")
    return rows * -(-columns // 8) + 2 * rank * (rows + columns)
