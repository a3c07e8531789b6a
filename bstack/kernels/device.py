"""Products with packed matrices on a GPU, in Triton. Import it only where triton is installed.

A matrix is a row of a table in device memory: the number of its blocks, then address and form of each. Kernels read the
table when they run, so blocks that come or go need no compilation and no new launch parameters.

What the CPU kernels compute in integers these compute in single precision: results agree to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl

from bstack.kernels.device_spqr import add_rows, dense_sums, half, outlier_sums
from bstack.kernels.matrix import BLOCKS, OUTLIERS, ROTATED, SIGN, SPQR, TRELLIS, TRELLIS5, check_put
from bstack.kernels.reference import TABLE, TABLE5

__all__ = ["DeviceMatrix", "MatrixTable", "decode", "multiply"]

# Of a row of the table: the count, and for each block its address and its form (kind * 256 + rank).
FIELDS = 1 + 2 * BLOCKS
_TRELLIS: tl.constexpr = tl.constexpr(TRELLIS)
_TRELLIS5: tl.constexpr = tl.constexpr(TRELLIS5)
_SIGN: tl.constexpr = tl.constexpr(SIGN)
_SPQR: tl.constexpr = tl.constexpr(SPQR)
_OUTLIERS: tl.constexpr = tl.constexpr(OUTLIERS)


class MatrixTable:
    """Rows for some matrices in device memory.

    Parameters
    ----------
    matrices : int
        How many.
    device : torch.device
    """

    def __init__(self, matrices: int, device: torch.device):
        self.rows = torch.zeros(matrices, FIELDS, dtype=torch.int64, device=device)
        self.values = torch.tensor(TABLE + TABLE5, dtype=torch.float32, device=device)


class DeviceMatrix:
    """As `bstack.kernels.matrix.Matrix`, but its blocks lie in device memory.

    Parameters
    ----------
    rows, columns : int
        m and n.
    table : MatrixTable
    place : int
        Its row there.
    """

    def __init__(self, rows: int, columns: int, table: MatrixTable, place: int):
        self.rows, self.columns, self.table = rows, columns, table
        self.entry = table.rows[place]
        self.kind, self.rank = [0] * BLOCKS, [0] * BLOCKS
        self._count = 0

    @property
    def count(self) -> int:
        """Blocks in use."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self.entry[0] = count
        self._count = count

    def put(self, level: int, kind: int, rank: int, address: int, *, checked: bool = False) -> None:
        """Say where the block of a level lies; `count` stays as it is. Raises ValueError as `Matrix.put`."""
        check_put(self.rows, self.columns, level, kind, rank, checked)
        self.entry[1 + 2 * level : 3 + 2 * level] = torch.tensor([address, 256 * kind + rank])
        self.kind[level], self.rank[level] = kind, rank


def multiply(matrix: DeviceMatrix, x: torch.Tensor, turned: torch.Tensor, out: torch.Tensor) -> None:
    """y = x W^T for few tokens, without building W.

    Parameters
    ----------
    matrix : DeviceMatrix
    x, turned : torch.Tensor
        Inputs and rotated inputs, float32, contiguous, shape (t, n).
    out : torch.Tensor
        Where y goes, float32, shape (t, m), the last axis contiguous.
    """
    block_rows = 16
    _multiply[(triton.cdiv(matrix.rows, block_rows), x.shape[0])](
        matrix.entry,
        matrix.table.values,
        x,
        turned,
        out,
        matrix.rows,
        matrix.columns,
        out.stride(0),
        BLOCK_ROWS=block_rows,
        BLOCK=64,
    )


def decode(matrix: DeviceMatrix, kinds: Collection[int], index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the sum of a matrix's blocks of some kinds; see `bstack.kernels.multiply.decode_rows`.

    Parameters
    ----------
    matrix : DeviceMatrix
    kinds : collection of int
        ROTATED (of the matrix that multiplies rotated inputs), or PLAIN.
    index : torch.Tensor
        Which rows, int64, shape (k,).
    dtype : torch.dtype

    Returns
    -------
    torch.Tensor
        Shape (k, n).
    """
    spqr = {*ROTATED}.isdisjoint(kinds) and not {SPQR, OUTLIERS}.isdisjoint(matrix.kind)
    out = torch.empty(index.numel(), matrix.columns, dtype=torch.float32 if spqr else dtype, device=index.device)
    if out.numel():
        block_rows, block = 16, 64
        grid = (triton.cdiv(index.numel(), block_rows), triton.cdiv(triton.cdiv(matrix.columns, 4), block), 4)
        _decode[grid](
            matrix.entry,
            matrix.table.values,
            index,
            out,
            index.numel(),
            matrix.rows,
            matrix.columns,
            ROTATED=not {*ROTATED}.isdisjoint(kinds),
            BLOCK_ROWS=block_rows,
            BLOCK=block,
        )
        if spqr:
            add_rows[(triton.cdiv(index.numel(), block_rows), triton.cdiv(matrix.columns, block))](
                matrix.entry,
                index,
                out,
                index.numel(),
                matrix.rows,
                matrix.columns,
                BLOCK_ROWS=block_rows,
                SUBTILES=block // 16,
                BLOCK=block,
            )
    return out.to(dtype)


@triton.jit
def _trellis_values(block, values, row, byte, mask, quarter_bytes, quarter, five):
    """Table values of a tile: rows, and the columns of one quarter. The oldest row of codes is stored at the row's own place."""
    place = block + row[:, None] * quarter_bytes + byte[None, :]
    window = tl.zeros([row.shape[0], byte.shape[0]], dtype=tl.int32)
    for earlier in tl.static_range(5):
        there = mask & ((earlier < 4) | five)
        codes = (tl.load(place + earlier * quarter_bytes, mask=there, other=0).to(tl.int32) >> (2 * quarter)) & 3
        if earlier == 4:
            mixed = 4 * (codes ^ (window >> 2) ^ (window >> 6)) & 12
            window = tl.where(five, 256 + ((window & 3) | mixed | (window & 48)), window)
        else:
            window = window * 4 + codes
    return tl.load(values + window)


@triton.jit
def _trellis_scale(block, row, inside, rows, quarter_bytes, five):
    earlier = tl.where(five, 4, 3)
    return half(block + (rows.to(tl.int64) + earlier) * quarter_bytes + 2 * row, inside)


@triton.jit
def _sign_weights(block, row, column, mask, rows, columns, rank):
    stride = (columns + 7) // 8
    bits = tl.load(block + row[:, None] * stride + (column // 8)[None, :], mask=mask, other=0).to(tl.int32)
    sign = (((bits >> (column % 8)[None, :]) & 1) * 2 - 1).to(tl.float32)
    left = block + rows.to(tl.int64) * stride
    right = left + 2 * rows.to(tl.int64) * rank
    size = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for r in range(rank):
        u = half(left + 2 * (row * rank + r), row < rows)
        v = half(right + 2 * (column.to(tl.int64) * rank + r), column < columns)
        size += u[:, None] * v[None, :]
    return sign * size


@triton.jit
def _multiply(entry, values, x, turned, out, rows, columns, stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    inside = row < rows
    quarter_bytes = (columns + 3) // 4
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for level in range(tl.load(entry)):
        block = tl.load(entry + 1 + 2 * level).to(tl.pointer_type(tl.uint8))
        form = tl.load(entry + 2 + 2 * level).to(tl.int32)
        sums = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
        five = form // 256 == _TRELLIS5
        if (form // 256 == _TRELLIS) | five:
            for start in range(0, quarter_bytes, BLOCK):
                byte = start + tl.arange(0, BLOCK)
                mask = inside[:, None] & (byte < quarter_bytes)[None, :]
                for quarter in tl.static_range(4):
                    column = quarter * quarter_bytes + byte
                    given = tl.load(
                        turned + token * columns + column, mask=(byte < quarter_bytes) & (column < columns), other=0.0
                    )
                    weights = _trellis_values(block, values, row, byte, mask, quarter_bytes, quarter, five)
                    sums += tl.sum(weights * given[None, :], 1)
            total += sums * _trellis_scale(block, row, inside, rows, quarter_bytes, five)
        elif form // 256 == _SPQR:
            total += dense_sums(block, row, rows, columns, x + token * columns, form % 256, BLOCK // 16)
        elif form // 256 == _OUTLIERS:
            total += outlier_sums(block, row, rows, x + token * columns, BLOCK)
        else:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                mask = inside[:, None] & (column < columns)[None, :]
                given = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
                weights = _sign_weights(block, row, column, mask, rows, columns, form % 256)
                sums += tl.sum(weights * given[None, :], 1)
            total += sums
    tl.store(out + token * stride + row, total, mask=inside)


@triton.jit
def _decode(
    entry,
    values,
    index,
    out,
    wanted,
    rows,
    columns,
    ROTATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    row = tl.load(index + which, mask=which < wanted, other=rows)
    inside = row < rows
    quarter_bytes = (columns + 3) // 4
    quarter = tl.program_id(2)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = quarter * quarter_bytes + byte
    right = (byte < quarter_bytes) & (column < columns)
    mask = inside[:, None] & right[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK], dtype=tl.float32)
    for level in range(tl.load(entry)):
        block = tl.load(entry + 1 + 2 * level).to(tl.pointer_type(tl.uint8))
        form = tl.load(entry + 2 + 2 * level).to(tl.int32)
        if ROTATED:
            five = form // 256 == _TRELLIS5
            if (form // 256 == _TRELLIS) | five:
                scale = _trellis_scale(block, row, inside, rows, quarter_bytes, five)
                total += scale[:, None] * _trellis_values(block, values, row, byte, mask, quarter_bytes, quarter, five)
        elif form // 256 == _SIGN:
            total += _sign_weights(block, row, column, mask, rows, columns, form % 256)
    tl.store(out + which[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=mask)
