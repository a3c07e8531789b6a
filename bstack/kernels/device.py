"""Products with packed matrices on a GPU, in Triton. Import it only where triton is installed.

Matrices are those of bstack.kernels.table. Blocks are read byte by byte, because their rows begin at any address.

These kernels compute in single precision where the CPU kernels use integers: results agree to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl

from bstack.kernels.matrix import OUTLIERS, ROTATED, SIGN, SPQR, TRELLIS, TRELLIS5
from bstack.kernels.table import DeviceMatrix

__all__ = ["decode", "multiply"]

# Rows of a program, and the columns or packed bytes that it takes at a time.
ROWS, BYTES = 16, 64
_TRELLIS: tl.constexpr = tl.constexpr(TRELLIS)
_TRELLIS5: tl.constexpr = tl.constexpr(TRELLIS5)
_SIGN: tl.constexpr = tl.constexpr(SIGN)
_SPQR: tl.constexpr = tl.constexpr(SPQR)
_OUTLIERS: tl.constexpr = tl.constexpr(OUTLIERS)
_TILE: tl.constexpr = tl.constexpr(16)
_STATISTICS: tl.constexpr = tl.constexpr(20)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_BYTES: tl.constexpr = tl.constexpr(BYTES)
_SUBTILES: tl.constexpr = tl.constexpr(BYTES // 16)


def multiply(matrix: DeviceMatrix, x: torch.Tensor, rotated: torch.Tensor, out: torch.Tensor) -> None:
    """Compute y = x W^T for few tokens, without building W.

    Parameters
    ----------
    matrix : DeviceMatrix
    x, rotated : torch.Tensor
        Inputs and rotated inputs, float32, contiguous, shape (t, n).
    out : torch.Tensor
        Where y goes, float32, shape (t, m), the last axis contiguous.
    """
    _multiply[(triton.cdiv(matrix.rows, ROWS), x.shape[0])](
        matrix.entry, matrix.table.values, x, rotated, out, matrix.rows, matrix.columns, out.stride(0)
    )


def decode(matrix: DeviceMatrix, kinds: Collection[int], index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Add up rows of a matrix's blocks of some kinds; see `bstack.kernels.multiply.decode_rows`.

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
        sizes = index.numel(), matrix.rows, matrix.columns
        parts, quarter_bytes = triton.cdiv(index.numel(), ROWS), triton.cdiv(matrix.columns, 4)
        rotated = not {*ROTATED}.isdisjoint(kinds)
        _decode[parts, triton.cdiv(quarter_bytes, BYTES), 4](
            matrix.entry, matrix.table.values, index, out, *sizes, rotated
        )
        if spqr:
            _add_rows[parts, triton.cdiv(matrix.columns, BYTES)](matrix.entry, index, out, *sizes)
    return out.to(dtype)


@triton.jit
def _word(place, mask):
    low = tl.load(place, mask=mask, other=0).to(tl.int32)
    return low | (tl.load(place + 1, mask=mask, other=0).to(tl.int32) << 8)


@triton.jit
def _half(place, mask):
    """Load numbers of half precision."""
    return _word(place, mask).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _trellis_values(block, values, row, byte, mask, quarter_bytes, quarter, five):
    """Look up the values of a tile, some rows by some columns of one quarter.

    A row's first code row, that of the row three above it (four in trellis5 blocks), is stored at the row's own place.
    """
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
    return _half(block + (rows.to(tl.int64) + earlier) * quarter_bytes + 2 * row, inside)


@triton.jit
def _sign_weights(block, row, column, mask, rows, columns, rank):
    stride = (columns + 7) // 8
    bits = tl.load(block + row[:, None] * stride + (column // 8)[None, :], mask=mask, other=0).to(tl.int32)
    sign = (((bits >> (column % 8)[None, :]) & 1) * 2 - 1).to(tl.float32)
    left = block + rows.to(tl.int64) * stride
    right = left + 2 * rows.to(tl.int64) * rank
    size = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for r in range(rank):
        u = _half(left + 2 * (row * rank + r), row < rows)
        v = _half(right + 2 * (column.to(tl.int64) * rank + r), column < columns)
        size += u[:, None] * v[None, :]
    return sign * size


@triton.jit
def _statistic(at, first, row, mask):
    """Compute start + slope * code, from the codes' bytes at `at` and the two numbers at `first`."""
    three = at + 3 * (row % 16 // 8)[:, None]
    field = _word(three, mask) | (tl.load(three + 2, mask=mask, other=0).to(tl.int32) << 16)
    code = (field >> (3 * (row % 8)).to(tl.int32)[:, None]) & 7
    return _half(first, mask) + _half(first + 2, mask) * code.to(tl.float32)


@triton.jit
def _subtiles(block, row, rows, columns, sub, rank):
    """Load the codes of some rows in some subtiles, (r, s, 16), and their scale and zero, (r, s)."""
    bits = rank % 16
    subtiles = rank // 16
    groups = (columns + 16 * subtiles - 1) // (16 * subtiles)
    tile_bytes = subtiles * bits * 32 + _STATISTICS
    tiles = block + (2 * columns + 63) // 64 * 64
    group = (sub // subtiles).to(tl.int64)
    mask = (row < rows)[:, None] & (group < groups)[None, :]
    tile = tiles + ((row // 16)[:, None] * groups + group[None, :]) * tile_bytes
    at = tile + tile_bytes - _STATISTICS
    scale = _statistic(at, at + 12, row, mask)
    zero = _statistic(at + 6, at + 16, row, mask)
    codes = (tile + (sub % subtiles)[None, :] * bits * 32)[:, :, None]
    j = tl.arange(0, _TILE)[None, None, :]
    byte = 4 * (row % 16)[:, None, None] + j % 4
    mask = mask[:, :, None]
    if bits == 4:
        code = (tl.load(codes + 64 * (j // 8) + byte, mask=mask, other=0).to(tl.int32) >> (j & 4)) & 15
    else:
        low = (tl.load(codes + byte, mask=mask, other=0).to(tl.int32) >> 2 * (j // 4)) & 3
        third = tl.load(codes + 64 + 8 * (j // 4) + byte // 8, mask=mask, other=0).to(tl.int32) >> (byte % 8).to(
            tl.int32
        )
        code = low | ((third & 1) << 2)
    return code.to(tl.float32), scale, zero


@triton.jit
def _columns(block, columns, sub):
    """Load the columns of some subtiles, (s, 16), and which of them there are."""
    place = 16 * sub[:, None] + tl.arange(0, _TILE)[None, :]
    return _word(block + 2 * place, place < columns), place < columns


@triton.jit
def _dense_sums(block, row, rows, columns, x, rank):
    """Multiply some rows of a dense part with the inputs of a token."""
    sums = tl.zeros([row.shape[0]], dtype=tl.float32)
    for start in range(0, (columns + 15) // 16, _SUBTILES):
        sub = start + tl.arange(0, _SUBTILES)
        column, valid = _columns(block, columns, sub)
        given = tl.load(x + column, mask=valid, other=0.0)
        codes, scale, zero = _subtiles(block, row, rows, columns, sub, rank)
        product = tl.sum(codes * given[None, :, :], 2)
        sums += tl.sum(scale * (product - zero * tl.sum(given, 1)[None, :]), 1)
    return sums


@triton.jit
def _pointer(block, row, inside):
    at = block + 4 * row
    return (_word(at, inside) | (_word(at + 2, inside) << 16)).to(tl.int64)


@triton.jit
def _outliers(block, row, rows):
    """Find the outliers of some rows: where each row begins and ends, and where all columns and all values begin."""
    start, stop = _pointer(block, row, row < rows), _pointer(block, row + 1, row < rows)
    index = block + 4 * (rows.to(tl.int64) + 1)
    return start, stop, index, index + 2 * _pointer(block, rows.to(tl.int64), True)


@triton.jit
def _outlier_sums(block, row, rows, x):
    """Multiply the outliers of some rows with the inputs of a token."""
    start, stop, index, value = _outliers(block, row, rows)
    sums = tl.zeros([row.shape[0]], dtype=tl.float32)
    for done in range(0, tl.max(stop - start, 0), _BYTES):
        at = start[:, None] + done + tl.arange(0, _BYTES)[None, :]
        mask = at < stop[:, None]
        given = tl.load(x + _word(index + 2 * at, mask), mask=mask, other=0.0)
        sums += tl.sum(_half(value + 2 * at, mask) * given, 1)
    return sums


@triton.jit
def _multiply(entry, values, x, rotated, out, rows, columns, stride):
    row = (tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    inside = row < rows
    quarter_bytes = (columns + 3) // 4
    total = tl.zeros([_ROWS], dtype=tl.float32)
    for level in range(tl.load(entry)):
        block = tl.load(entry + 1 + 2 * level).to(tl.pointer_type(tl.uint8))
        form = tl.load(entry + 2 + 2 * level).to(tl.int32)
        sums = tl.zeros([_ROWS], dtype=tl.float32)
        five = form // 256 == _TRELLIS5
        if (form // 256 == _TRELLIS) | five:
            for start in range(0, quarter_bytes, _BYTES):
                byte = start + tl.arange(0, _BYTES)
                mask = inside[:, None] & (byte < quarter_bytes)[None, :]
                for quarter in tl.static_range(4):
                    column = quarter * quarter_bytes + byte
                    given = tl.load(
                        rotated + token * columns + column, mask=(byte < quarter_bytes) & (column < columns), other=0.0
                    )
                    weights = _trellis_values(block, values, row, byte, mask, quarter_bytes, quarter, five)
                    sums += tl.sum(weights * given[None, :], 1)
            total += sums * _trellis_scale(block, row, inside, rows, quarter_bytes, five)
        elif form // 256 == _SPQR:
            total += _dense_sums(block, row, rows, columns, x + token * columns, form % 256)
        elif form // 256 == _OUTLIERS:
            total += _outlier_sums(block, row, rows, x + token * columns)
        else:
            for start in range(0, columns, _BYTES):
                column = start + tl.arange(0, _BYTES)
                mask = inside[:, None] & (column < columns)[None, :]
                given = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
                weights = _sign_weights(block, row, column, mask, rows, columns, form % 256)
                sums += tl.sum(weights * given[None, :], 1)
            total += sums
    tl.store(out + token * stride + row, total, mask=inside)


@triton.jit
def _decode(entry, values, index, out, wanted, rows, columns, ROTATED: tl.constexpr):
    which = (tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)).to(tl.int64)
    row = tl.load(index + which, mask=which < wanted, other=rows)
    inside = row < rows
    quarter_bytes = (columns + 3) // 4
    quarter = tl.program_id(2)
    byte = tl.program_id(1) * _BYTES + tl.arange(0, _BYTES)
    column = quarter * quarter_bytes + byte
    right = (byte < quarter_bytes) & (column < columns)
    mask = inside[:, None] & right[None, :]
    total = tl.zeros([_ROWS, _BYTES], dtype=tl.float32)
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


@triton.jit
def _add_rows(entry, index, out, wanted, rows, columns):
    """Add rows of all SpQR blocks to `out`, float32; a program takes some subtiles, the first one also the outliers."""
    which = (tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)).to(tl.int64)
    row = tl.load(index + which, mask=which < wanted, other=rows)
    inside = row < rows
    to = out + which * columns
    for level in range(tl.load(entry)):
        block = tl.load(entry + 1 + 2 * level).to(tl.pointer_type(tl.uint8))
        form = tl.load(entry + 2 + 2 * level).to(tl.int32)
        if form // 256 == _SPQR:
            sub = tl.program_id(1) * _SUBTILES + tl.arange(0, _SUBTILES)
            column, valid = _columns(block, columns, sub)
            codes, scale, zero = _subtiles(block, row, rows, columns, sub, form % 256)
            weights = scale[:, :, None] * (codes - zero[:, :, None])
            mask = inside[:, None, None] & valid[None, :, :]
            # Each block has its own order of columns, so two programs may add to one weight.
            tl.atomic_add(to[:, None, None] + column[None, :, :], weights, mask=mask)
        if (form // 256 == _OUTLIERS) & (tl.program_id(1) == 0):
            start, stop, first, value = _outliers(block, row, rows)
            for done in range(0, tl.max(stop - start, 0), _BYTES):
                at = start[:, None] + done + tl.arange(0, _BYTES)[None, :]
                mask = at < stop[:, None]
                tl.atomic_add(to[:, None] + _word(first + 2 * at, mask), _half(value + 2 * at, mask), mask=mask)
