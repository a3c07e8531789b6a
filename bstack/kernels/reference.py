"""Computes what the C kernels do, in plain numpy with the same bits: the oracle of their tests, used where they are missing."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from bstack.kernels.matrix import OUTLIERS, PLAIN, ROTATED, SIGN, SPQR, TRELLIS, Matrix
from bstack.kernels.spqr import ROWS, Dense, Outliers

if TYPE_CHECKING:
    import torch

__all__ = [
    "EARLIER5",
    "LIMIT",
    "SIGN_LIMIT",
    "TABLE",
    "TABLE5",
    "decode_rows",
    "encode_columns",
    "lookup",
    "multiply",
    "places",
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
# That of trellis5 blocks, made in the same way from what one to four blocks have left (11.4, 22.9, 34.2 and 45 dB).
TABLE5 = tuple(
    int(value)
    for value in """
    22 -87 81 6 -41 41 24 -22 66 10 -35 42 -10 -33 -1 -63
    -52 -7 25 37 -15 29 -8 5 15 -37 -50 -87 52 124 93 -30
    -18 54 -37 21 -61 -17 -127 82 67 13 40 -40 19 -60 4 -9
    8 -10 1 57 -64 -36 40 -53 -21 31 -21 -21 45 77 -80 19
    """.split()
)
Codes = TypeVar("Codes", np.ndarray, "torch.Tensor")
BITS = 2
CODES = 1 << BITS
# Rows of codes stored above the first row of a trellis block, and of a trellis5 block.
EARLIER, EARLIER5 = 3, 4
STATES = CODES**EARLIER5

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
        rotated = _Operand(rotate(x)) if {*ROTATED} & {*matrix.kind[: matrix.count]} else None
        for level in range(matrix.count):
            if matrix.kind[level] in ROTATED:
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
        out[k] = unrotate(decode_rows(matrix, ROTATED, row, row + 1))
        _add_rows(matrix, PLAIN, row, row + 1, out[k : k + 1])
    return out


def _add_rows(matrix: Matrix, kinds: Collection[int], start: int, stop: int, out: np.ndarray) -> None:
    for level in range(matrix.count):
        kind = matrix.kind[level]
        if kind not in kinds:
            continue
        if kind in ROTATED:
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
    old = matrix.kind[level] == TRELLIS
    earlier = EARLIER if old else EARLIER5
    quarter = -(-matrix.columns // 4)
    length = (matrix.rows + earlier) * quarter
    packed = payload[:length].reshape(-1, 1, quarter)[rows.start : rows.stop + earlier]
    codes = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(packed), -1)[:, : matrix.columns]
    scale = payload[length:].view(np.dtype("<f2"))[rows].astype(np.float32)
    if not old:
        return np.array(TABLE5, np.int8)[places(codes)], scale
    windows = codes[EARLIER:].copy()
    for above in range(1, EARLIER + 1):
        windows |= codes[EARLIER - above : -above] << 2 * above
    return np.array(TABLE, np.int8)[windows], scale


def places(codes: Codes) -> Codes:
    """Return the place in TABLE5 of each code, uint8, shape (m, n), for codes of shape (4 + m, n), four rows above first."""
    own, first, second, third, fourth = (codes[EARLIER5 - k : len(codes) - k] for k in range(EARLIER5 + 1))
    return first | (own ^ second ^ fourth) << 2 | third << 4


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
    *,
    first: int | None = None,
    segment: int = 0,
    margin: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode some columns of a trellis5 block: a Viterbi search (G. D. Forney, Proc. IEEE 61, 1973) down each column.

    With `first`, as on a GPU: rows are cut into segments, the first of so many rows, others of `segment`. Where two meet, a search of
    `margin` rows to each side chooses the state; then each segment is searched from state to state.
    """
    columns, rows = target.shape
    codes = np.empty((columns, EARLIER5 + rows), np.uint8)
    errors = np.empty((columns, rows), np.float32)
    inverse = np.float32(1) / scale
    for j in range(columns):
        x = target[j] * inverse
        ends = [] if first is None else list(range(first, rows, segment))
        states = [_state(x, weight, table, slice(max(end - margin, 0), end + margin), end) for end in ends]
        for start, stop, before, after in zip([0, *ends], [*ends, rows], [None, *states], [*states, None], strict=True):
            found = _search_column(x[start:stop], weight[start:stop], table, before, after)
            codes[j, start : EARLIER5 + stop] = found
        errors[j] = original[j] - scale * table[places(codes[j])]
        for t in range(j + 1, columns):
            target[t] += feedback[j, t] * errors[j]
    return codes, errors


def _state(x: np.ndarray, weight: np.ndarray, table: np.ndarray, rows: slice, end: int) -> int:
    """Return the state between rows `end` - 1 and `end` on the cheapest path through some rows around them."""
    codes = _search_column(x[rows], weight[rows], table)[end - rows.start :]
    return sum(int(codes[EARLIER5 - 1 - k]) << BITS * k for k in range(EARLIER5))


def _search_column(
    x: np.ndarray, weight: np.ndarray, table: np.ndarray, before: int | None = None, after: int | None = None
) -> np.ndarray:
    """Find the codes of the cheapest path through a column, uint8, four above the first row; from and to a state if given."""
    rows = x.shape[0]
    window = np.arange(CODES * STATES)
    table = table[places(np.stack([window >> BITS * k & CODES - 1 for k in range(EARLIER5, -1, -1)]))[0]]
    cost = np.zeros(STATES, np.float32)
    if before is not None:
        cost[:] = np.inf
        cost[before] = 0
    oldest = np.empty((rows, STATES), np.uint8)
    for i in range(rows):
        difference = x[i] - table
        reached = np.repeat(cost, CODES) + weight[i] * (difference * difference)
        by_oldest = reached.reshape(CODES, STATES)
        oldest[i] = by_oldest.argmin(0)
        cost = by_oldest.min(0)
        if i & 15 == 15:
            cost = cost - cost[0]
    codes = np.empty(EARLIER5 + rows, np.uint8)
    state = int(cost.argmin()) if after is None else after
    for i in range(rows - 1, -1, -1):
        codes[EARLIER5 + i] = state & (CODES - 1)
        state = (state + int(oldest[i, state]) * STATES) >> BITS
    for i in range(EARLIER5 - 1, -1, -1):
        codes[i] = state & (CODES - 1)
        state >>= BITS
    return codes
