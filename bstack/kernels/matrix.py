"""A matrix that stays packed: where its blocks lie in memory, as the C kernels see it (csrc/bstack.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

__all__ = ["BLOCKS", "RANK", "SIGN", "TRELLIS", "Matrix", "block_bytes"]

# Kinds by their codes in the container (format/SPEC.md, section 6).
SIGN, TRELLIS = 3, 4
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
        `SIGN` or `TRELLIS`, and the rank of a sign block.
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

    def put(self, level: int, kind: int, rank: int, address: int) -> None:
        """Say where the block of a level lies; `count` stays as it is.

        Parameters
        ----------
        level : int
            0 to 15.
        kind : int
            `SIGN` or `TRELLIS`.
        rank : int
            1 to 16 for a sign block; 2, the bits of a code, for a trellis block.
        address : int
            Of `block_bytes` bytes, which the caller keeps alive and unchanged.

        Raises
        ------
        ValueError
        """
        if not 0 <= level < BLOCKS:
            raise ValueError(f"level is {level}; a matrix has levels 0 to {BLOCKS - 1}.")
        block_bytes(self.rows, self.columns, kind, rank)
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
            expected = block_bytes(rows, columns, kind, rank)
            if bytes_.size != expected:
                raise ValueError(f"block {level} has {bytes_.size} bytes; one of {rows} x {columns} has {expected}.")
            matrix.put(level, kind, rank, bytes_.ctypes.data)
        matrix.count = len(blocks)
        return matrix

    def payload(self, level: int) -> np.ndarray:
        """The bytes of a block, uint8, where they lie; valid as long as the owner keeps them."""
        length = block_bytes(self.rows, self.columns, self.kind[level], self.rank[level])
        return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.block[level]))


def block_bytes(rows: int, columns: int, kind: int, rank: int) -> int:
    """Length of a block in bytes.

    Raises
    ------
    ValueError
        For a kind or a rank that the kernels do not know.
    """
    if kind == TRELLIS:
        if rank != 2:
            raise ValueError(f"a trellis block of rank {rank}; it has 2 bits per code.")
        return (rows + 3) * -(-columns // 4) + 2 * rows
    if kind != SIGN:
        raise ValueError(f"a block of kind {kind}; the kernels know {SIGN} (sign) and {TRELLIS} (trellis).")
    if not 1 <= rank <= RANK:
        raise ValueError(f"a sign block of rank {rank}; the kernels take 1 to {RANK}.")
    return rows * -(-columns // 8) + 2 * rank * (rows + columns)
