"""Computes what the C kernels do, in plain numpy with the same bits: the oracle of their tests, used where they are missing."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import cast

import numpy as np

from bstack.kernels.matrix import OUTLIERS, PLAIN, SIGN, SPQR, TRELLIS, Matrix
from bstack.kernels.spqr import ROWS, Dense, Outliers

__all__ = [
    "EARLIER",
    "LIMIT",
    "SIGN_LIMIT",
    "TABLE",
    "decode_rows",
    "encode_columns",
    "lookup",
    "multiply",
    "quantise",
    "rotate",
    "unrotate",
]

# The table T of trellis blocks (format/SPEC.md, section 6), the value of each of the 256 windows: centroids of a Viterbi
# search over Gaussian samples, iterated to convergence and rounded to 8 bits (11.2 dB at 2 bits per sample; the limit is
# 12.04).
TABLE = tuple(
    int(value)
    for value in """
    -44 33 -9 98 14 -37 47 -3 -72 17 -17 57 9 -48 40 -12
    -109 15 -25 50 3 -64 36 -18 77 -2 -46 34 -9 -77 25 -28
    56 -3 -47 24 -18 118 13 -39 50 -10 -59 24 -23 63 10 -49
    42 -17 -86 12 -27 44 4 -56 27 -32 89 3 -35 30 -5 -72
    22 -29 63 0 -51 33 -11 -127 16 -46 50 -10 -73 19 -20 76
    2 -48 46 -15 -83 12 -27 57 -3 -58 26 -19 88 4 -34 34
    -14 -75 17 -31 69 -8 -49 28 -12 -90 13 -37 50 -11 -54 21
    -20 80 16 -48 41 -18 -79 14 -28 56 7 -56 32 -22 125 9
    -20 56 14 -62 31 -25 83 11 -37 37 1 -88 29 -28 68 8
    -52 34 -11 91 22 -36 61 2 -62 28 -12 70 9 -40 44 -5
    -95 11 -25 49 4 -54 38 -16 79 4 -43 39 -6 -68 26 -28
    70 3 -43 36 -11 107 25 -36 49 -10 -63 21 -16 70 13 -45
    40 -18 -88 21 -25 60 8 -52 39 -25 88 10 -34 45 -2 -65
    26 -24 64 5 -45 34 -5 -120 17 -38 52 -1 -62 25 -16 75
    9 -43 44 -11 -91 12 -24 61 1 -53 37 -12 99 7 -34 44
    -7 -72 31 -25 65 2 -43 32 -10 -86 24 -33 55 -9 -55 21
    """.split()
)
BITS = 2
CODES = 1 << BITS
STATES = len(TABLE) // CODES
# Rows of codes stored above the first row of a trellis block.
EARLIER = 3

# Largest code of a quantised input, so that its high byte and its low byte, taken as signed, both fit 8 bits.
LIMIT = 32639
# The same for a sum of four inputs of a sign block.
SIGN_LIMIT = 8159


def rotate(x: np.ndarray) -> np.ndarray:
    """Rotate rows x, float32, shape (t, n): (x * signs) H; see format/SPEC.md, section 6."""
    return _hadamard(x * _signs(x.shape[1]))


def unrotate(x: np.ndarray) -> np.ndarray:
    """Undo `rotate`: (x H) * signs."""
    return _hadamard(x) * _signs(x.shape[1])


@cache
def _signs(columns: int) -> np.ndarray:
    z = np.arange(columns, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.where(z >> np.uint64(63), np.float32(-1), np.float32(1))


def _hadamard(x: np.ndarray) -> np.ndarray:
    size = x.shape[1] & -x.shape[1]
    half = 1
    while half < size:
        pairs = x.reshape(-1, 2, half)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(x.shape)
        half *= 2
    return x * np.float32(1 / np.sqrt(np.float64(size)))


def quantise(x: np.ndarray, limit: int = LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Round each row of x, float32, shape (t, n), to scale * codes; codes are int16, from -limit to limit, ties to even.

    The scale, float32, shape (t,), is NaN for a row with a value that is not finite, and 0 for one whose values are all
    below 1e-30; the codes are 0 there.
    """
    largest = np.abs(x).max(1)
    usable = np.isfinite(largest) & (largest >= np.float32(1e-30))
    inverse = np.float32(limit) / np.where(usable, largest, np.float32(1))
    codes = np.rint(np.where(usable[:, None], x, np.float32(0)) * inverse[:, None]).astype(np.int16)
    scale = np.where(usable, largest / np.float32(limit), np.float32(0))
    scale = np.where(np.isfinite(largest), scale, np.float32(np.nan))
    return codes, scale.astype(np.float32)


def multiply(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """Compute x W^T, float32, shape (t, m), for x of shape (t, n)."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = _spqr_sums(matrix, x)
        rotated = _Operand(rotate(x)) if TRELLIS in matrix.kind[: matrix.count] else None
        for level in range(matrix.count):
            if matrix.kind[level] == TRELLIS:
                values, scale = _trellis(matrix, level, slice(0, matrix.rows))
                y += cast(_Operand, rotated).sums(values) * scale
            elif matrix.kind[level] == SIGN:
                bits, u, v = _sign(matrix, level)
                total = np.zeros_like(y)
                for r in range(matrix.rank[level]):
                    total += _Operand(x * v[:, r], SIGN_LIMIT).sums(bits.astype(np.int8) * 2 - 1) * u[:, r]
                y += total
    return y


def _spqr_sums(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """Multiply by the SpQR blocks, which come first whatever their level and share one scale."""
    total = np.zeros((x.shape[0], matrix.rows), np.float32)
    kinds = matrix.kind[: matrix.count]
    if SPQR not in kinds and OUTLIERS not in kinds:
        return total
    codes, scale = quantise(x)
    for level, kind in enumerate(kinds):
        if kind == SPQR:
            dense = Dense.unpack(matrix.payload(level), matrix.columns, matrix.rank[level], 0, matrix.rows)
            total += dense.sums(codes)[:, : matrix.rows]
        elif kind == OUTLIERS:
            total += Outliers.unpack(matrix.payload(level), matrix.rows).sums(codes)
    return scale[:, None] * total


class _Operand:
    """Quantised inputs."""

    def __init__(self, x: np.ndarray, limit: int = LIMIT):
        self.codes, self.scale = quantise(x, limit)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the columns exactly (in float64, which holds integers below 2**53), then multiply by the scale."""
        exact = self.codes.astype(np.float64) @ values.astype(np.float64).T
        return exact.astype(np.float32) * self.scale[:, None]


def decode_rows(matrix: Matrix, kinds: Collection[int], start: int, stop: int) -> np.ndarray:
    """Add up rows start to stop - 1 of a matrix's blocks of some kinds, float32, shape (stop - start, n)."""
    out = np.zeros((stop - start, matrix.columns), np.float32)
    _add_rows(matrix, kinds, start, stop, out)
    return out


def lookup(matrix: Matrix, index: np.ndarray) -> np.ndarray:
    """Return rows of W itself, float32, shape (k, n), for indices of shape (k,)."""
    out = np.empty((len(index), matrix.columns), np.float32)
    for k, row in enumerate(index.tolist()):
        out[k] = unrotate(decode_rows(matrix, (TRELLIS,), row, row + 1))
        _add_rows(matrix, PLAIN, row, row + 1, out[k : k + 1])
    return out


def _add_rows(matrix: Matrix, kinds: Collection[int], start: int, stop: int, out: np.ndarray) -> None:
    for level in range(matrix.count):
        kind = matrix.kind[level]
        if kind not in kinds:
            continue
        if kind == TRELLIS:
            values, scale = _trellis(matrix, level, slice(start, stop))
            out += values.astype(np.float32) * scale[:, None]
        elif kind == SIGN:
            bits, u, v = _sign(matrix, level)
            product = np.zeros_like(out)
            for r in range(matrix.rank[level]):
                product += u[start:stop, r, None] * v[:, r]
            out += np.where(bits[start:stop], product, -product)
        elif kind == SPQR:
            dense = Dense.unpack(matrix.payload(level), matrix.columns, matrix.rank[level], start, stop)
            out += dense.weights()[start % ROWS :][: stop - start]
        else:
            Outliers.unpack(matrix.payload(level), matrix.rows).add_to(out, start)


def _trellis(matrix: Matrix, level: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Decode the table values of some rows of a block, int8, and their scales, float32."""
    payload = matrix.payload(level)
    quarter = -(-matrix.columns // 4)
    length = (matrix.rows + EARLIER) * quarter
    packed = payload[:length].reshape(-1, 1, quarter)[rows.start : rows.stop + EARLIER]
    codes = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(packed), -1)[:, : matrix.columns]
    windows = codes[EARLIER:].copy()
    for above in range(1, EARLIER + 1):
        windows |= codes[EARLIER - above : -above] << 2 * above
    scale = payload[length:].view(np.dtype("<f2"))[rows].astype(np.float32)
    return np.array(TABLE, np.int8)[windows], scale


def _sign(matrix: Matrix, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack the sign bits of a block, 0 or 1, uint8, (m, n), and its factors, float32, (m, k) and (n, k)."""
    payload, m, n, rank = matrix.payload(level), matrix.rows, matrix.columns, matrix.rank[level]
    stride = -(-n // 8)
    bits = np.unpackbits(payload[: m * stride].reshape(m, stride), axis=1, count=n, bitorder="little")
    factors = payload[m * stride :].copy().view("<f2").astype(np.float32)
    return bits, factors[: m * rank].reshape(m, rank), factors[m * rank :].reshape(n, rank)


def encode_columns(
    target: np.ndarray,
    original: np.ndarray,
    feedback: np.ndarray,
    table: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode some columns of a trellis block: a Viterbi search (G. D. Forney, Proc. IEEE 61, 1973) down each column."""
    columns, rows = target.shape
    codes = np.empty((columns, EARLIER + rows), np.uint8)
    errors = np.empty((columns, rows), np.float32)
    inverse = np.float32(1) / scale
    for j in range(columns):
        codes[j], values = _search_column(target[j] * inverse, weight, table)
        errors[j] = original[j] - scale * values
        for t in range(j + 1, columns):
            target[t] += feedback[j, t] * errors[j]
    return codes, errors


def _search_column(x: np.ndarray, weight: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the codes of the cheapest path through a column, uint8, and the table values along it."""
    rows = x.shape[0]
    cost = np.zeros(STATES, np.float32)
    oldest = np.empty((rows, STATES), np.uint8)
    for i in range(rows):
        difference = x[i] - table
        reached = np.repeat(cost, CODES) + weight[i] * (difference * difference)
        by_oldest = reached.reshape(CODES, STATES)
        oldest[i] = by_oldest.argmin(0)
        cost = by_oldest.min(0)
        if i & 15 == 15:
            cost = cost - cost[0]
    codes = np.empty(EARLIER + rows, np.uint8)
    values = np.empty(rows, np.float32)
    state = int(cost.argmin())
    for i in range(rows - 1, -1, -1):
        window = state + int(oldest[i, state]) * STATES
        codes[EARLIER + i] = window & (CODES - 1)
        values[i] = table[window]
        state = window >> BITS
    for i in range(EARLIER - 1, -1, -1):
        codes[i] = state & (CODES - 1)
        state >>= BITS
    return codes, values
