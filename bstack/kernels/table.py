"""Matrices whose blocks lie in a GPU's memory, as its kernels see them.

A matrix is a row of a table in device memory: the number of its blocks, then address and form of each. Kernels read the
table when they run, so adding or removing blocks needs no compilation and no new launch parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate

import torch

from bstack.kernels.matrix import BLOCKS, check_put
from bstack.kernels.reference import TABLE, TABLE5

__all__ = ["DeviceMatrix", "MatrixTable", "Stacked"]

# A row of the table holds the count, and for each block its address and its form (kind * 256 + rank).
FIELDS = 1 + 2 * BLOCKS


class MatrixTable:
    """A table with a row for each of `matrices` matrices, in device memory."""

    def __init__(self, matrices: int, device: torch.device):
        self.rows = torch.zeros(matrices, FIELDS, dtype=torch.int64, device=device)
        self.values = torch.tensor(TABLE + TABLE5, dtype=torch.float32, device=device)


class Stacked:
    """Matrices of a table that lie one under the other, and have the same columns; a product with all of them is one launch."""

    def __init__(self, matrices: Sequence[DeviceMatrix]):
        self.matrices, self.table = list(matrices), matrices[0].table
        self.rows, self.columns = sum(matrix.rows for matrix in matrices), matrices[0].columns
        ends = accumulate(matrix.rows for matrix in matrices)
        rows = [(m.entry.data_ptr(), m.rows, end - m.rows) for m, end in zip(matrices, ends, strict=True)]
        #: Address of a matrix's row of the table, its rows, and those above it.
        self.parts = torch.tensor(rows, device=self.table.rows.device)
        self.starts = [start for _, _, start in rows]

    @property
    def kinds(self) -> set[int]:
        return set().union(*(matrix.kinds for matrix in self.matrices))


class DeviceMatrix:
    """A `bstack.kernels.matrix.Matrix` whose blocks lie in device memory, described by row `place` of a table.

    `kinds` are those of its whole stack, whatever part of it is in memory: the kernels that a product launches follow from them,
    so that launches which were recorded stay right when the number of blocks changes.
    """

    def __init__(self, rows: int, columns: int, table: MatrixTable, place: int, kinds: Iterable[int] = ()):
        self.rows, self.columns, self.table, self.place = rows, columns, table, place
        self.kinds = {*kinds}
        self.entry = table.rows[place]
        self.kind, self.rank = [0] * BLOCKS, [0] * BLOCKS
        self._count = 0

    @cached_property
    def alone(self) -> Stacked:
        """Return the matrix as a stack of one."""
        return Stacked([self])

    @property
    def count(self) -> int:
        """Return the number of blocks in use."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self.entry[0] = count
        self._count = count

    def put(self, level: int, kind: int, rank: int, address: int, *, checked: bool = False) -> None:
        """Set where the block of a level lies, as `Matrix.put` does; ValueError unless the address is a multiple of 4."""
        check_put(self.rows, self.columns, level, kind, rank, checked)
        if address % 4:
            raise ValueError(f"a block at {address:#x}; a GPU's kernels read words at multiples of 4.")
        self.entry[1 + 2 * level : 3 + 2 * level] = torch.tensor([address, 256 * kind + rank])
        self.kind[level], self.rank[level] = kind, rank
        self.kinds.add(kind)
