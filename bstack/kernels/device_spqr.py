"""Blocks of SpQR on a GPU, in Triton: what `bstack.kernels.device` calls. Bytes are read one by one: any address will do."""

from __future__ import annotations

import triton
import triton.language as tl

from bstack.kernels.matrix import OUTLIERS, SPQR

__all__ = ["add_rows", "dense_sums", "half", "outlier_sums"]

_SPQR: tl.constexpr = tl.constexpr(SPQR)
_OUTLIERS: tl.constexpr = tl.constexpr(OUTLIERS)
_TILE: tl.constexpr = tl.constexpr(16)
_STATISTICS: tl.constexpr = tl.constexpr(20)


@triton.jit
def _word(place, mask):
    low = tl.load(place, mask=mask, other=0).to(tl.int32)
    return low | (tl.load(place + 1, mask=mask, other=0).to(tl.int32) << 8)


@triton.jit
def half(place, mask):
    """Half precision at any address: blocks of odd lengths come before it."""
    return _word(place, mask).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _statistic(at, first, row, mask):
    """start + slope * code: the codes' bytes are at `at`, the two numbers at `first`."""
    three = at + 3 * (row % 16 // 8)[:, None]
    field = _word(three, mask) | (tl.load(three + 2, mask=mask, other=0).to(tl.int32) << 16)
    code = (field >> (3 * (row % 8)).to(tl.int32)[:, None]) & 7
    return half(first, mask) + half(first + 2, mask) * code.to(tl.float32)


@triton.jit
def _subtiles(block, row, rows, columns, sub, rank):
    """Codes of some rows in some subtiles, (r, s, 16), and their scale and zero, (r, s)."""
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
def dense_sums(block, row, rows, columns, x, rank, SUBTILES: tl.constexpr):
    """Products of some rows of a dense part with the inputs of a token."""
    sums = tl.zeros([row.shape[0]], dtype=tl.float32)
    for start in range(0, (columns + 15) // 16, SUBTILES):
        sub = start + tl.arange(0, SUBTILES)
        place = 16 * sub[:, None] + tl.arange(0, _TILE)[None, :]
        column = _word(block + 2 * place, place < columns)
        given = tl.load(x + column, mask=place < columns, other=0.0)
        codes, scale, zero = _subtiles(block, row, rows, columns, sub, rank)
        product = tl.sum(codes * given[None, :, :], 2)
        sums += tl.sum(scale * (product - zero * tl.sum(given, 1)[None, :]), 1)
    return sums


@triton.jit
def _pointer(block, row, inside):
    at = block + 4 * row
    return (_word(at, inside) | (_word(at + 2, inside) << 16)).to(tl.int64)


@triton.jit
def outlier_sums(block, row, rows, x, BLOCK: tl.constexpr):
    """Products of the outliers of some rows with the inputs of a token."""
    inside = row < rows
    start, stop = _pointer(block, row, inside), _pointer(block, row + 1, inside)
    index = block + 4 * (rows.to(tl.int64) + 1)
    value = index + 2 * _pointer(block, rows.to(tl.int64), True)
    sums = tl.zeros([row.shape[0]], dtype=tl.float32)
    for done in range(0, tl.max(stop - start, 0), BLOCK):
        at = start[:, None] + done + tl.arange(0, BLOCK)[None, :]
        mask = at < stop[:, None]
        given = tl.load(x + _word(index + 2 * at, mask), mask=mask, other=0.0)
        sums += tl.sum(half(value + 2 * at, mask) * given, 1)
    return sums


@triton.jit
def add_rows(
    entry, index, out, wanted, rows, columns, BLOCK_ROWS: tl.constexpr, SUBTILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add rows of all blocks of SpQR to `out`, float32: a program takes some subtiles, the first one the outliers, too."""
    which = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    row = tl.load(index + which, mask=which < wanted, other=rows)
    inside = row < rows
    to = out + which * columns
    for level in range(tl.load(entry)):
        block = tl.load(entry + 1 + 2 * level).to(tl.pointer_type(tl.uint8))
        form = tl.load(entry + 2 + 2 * level).to(tl.int32)
        if form // 256 == _SPQR:
            sub = tl.program_id(1) * SUBTILES + tl.arange(0, SUBTILES)
            place = 16 * sub[:, None] + tl.arange(0, _TILE)[None, :]
            column = _word(block + 2 * place, place < columns)
            codes, scale, zero = _subtiles(block, row, rows, columns, sub, form % 256)
            weights = scale[:, :, None] * (codes - zero[:, :, None])
            mask = inside[:, None, None] & (place < columns)[None, :, :]
            # Another block has another order, so two programs may add to one weight.
            tl.atomic_add(to[:, None, None] + column[None, :, :], weights, mask=mask)
        if (form // 256 == _OUTLIERS) & (tl.program_id(1) == 0):
            start, stop = _pointer(block, row, inside), _pointer(block, row + 1, inside)
            first = block + 4 * (rows.to(tl.int64) + 1)
            value = first + 2 * _pointer(block, rows.to(tl.int64), True)
            for done in range(0, tl.max(stop - start, 0), BLOCK):
                at = start[:, None] + done + tl.arange(0, BLOCK)[None, :]
                mask = at < stop[:, None]
                tl.atomic_add(to[:, None] + _word(first + 2 * at, mask), half(value + 2 * at, mask), mask=mask)
