"""What the C kernels compute, in plain numpy, bit for bit: the oracle of their tests, and what runs without them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import numpy as np

from bstack.kernels.matrix import OUTLIERS, PLAIN, SIGN, SPQR, TRELLIS, Matrix
from bstack.kernels.spqr import ROWS, Dense, Outliers
from bstack.kernels.table import TABLE

__all__ = ["LIMIT", "SIGN_LIMIT", "decode_rows", "lookup", "multiply", "quantise", "rotate", "unrotate"]

# Largest code of a quantised input: its high byte and its low byte, taken as signed, both fit 8 bits.
LIMIT = 32639
# Of one of a sign block: so do those of a sum of four.
SIGN_LIMIT = 8159
EARLIER = 3


def rotate(x: np.ndarray) -> np.ndarray:
    """(x * signs) H for rows x, float32, shape (t, n); see format/SPEC.md, section 6."""
    return _hadamard(x * _signs(x.shape[1]))


def unrotate(x: np.ndarray) -> np.ndarray:
    """The inverse of `rotate`, (x H) * signs."""
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
    """Round each row to multiples of its largest absolute value divided by `limit`.

    Parameters
    ----------
    x : np.ndarray
        float32, shape (t, n).
    limit : int

    Returns
    -------
    codes : np.ndarray
        int16, shape (t, n), from -limit to limit; ties go to even. 0 where the scale is 0 or NaN.
    scale : np.ndarray
        float32, shape (t,), so that x ~ scale * codes: NaN for a row with a value that is not finite, 0 for one whose
        values are all below 1e-30.
    """
    largest = np.abs(x).max(1)
    usable = np.isfinite(largest) & (largest >= np.float32(1e-30))
    inverse = np.float32(limit) / np.where(usable, largest, np.float32(1))
    codes = np.rint(np.where(usable[:, None], x, np.float32(0)) * inverse[:, None]).astype(np.int16)
    scale = np.where(
        np.isfinite(largest), np.where(usable, largest / np.float32(limit), np.float32(0)), np.float32(np.nan)
    )
    return codes, scale.astype(np.float32)


def multiply(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """x W^T, float32, shape (t, m), for x of shape (t, n)."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = _direct(matrix, x)
        turned = _Operand(rotate(x)) if TRELLIS in matrix.kind[: matrix.count] else None
        for level in range(matrix.count):
            if matrix.kind[level] == TRELLIS:
                values, scale = _trellis(matrix, level, slice(0, matrix.rows))
                y += turned.sums(values) * scale
            elif matrix.kind[level] == SIGN:
                bits, u, v = _sign(matrix, level)
                total = np.zeros_like(y)
                for r in range(matrix.rank[level]):
                    total += _Operand(x * v[:, r], SIGN_LIMIT).sums(bits * np.int8(2) - np.int8(1)) * u[:, r]
                y += total
    return y


def _direct(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """What the blocks of SpQR contribute: their sums come first, whatever their level, and are scaled together."""
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
            total += Outliers.unpack(matrix.payload(level), matrix.rows, matrix.columns).sums(codes)
    return scale[:, None] * total


class _Operand:
    def __init__(self, x: np.ndarray, limit: int = LIMIT):
        self.codes, self.scale = quantise(x, limit)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Exact sums over the columns, as floats times the scale; in float64, which holds integers below 2**53."""
        exact = self.codes.astype(np.float64) @ values.astype(np.float64).T
        return exact.astype(np.float32) * self.scale[:, None]


def decode_rows(matrix: Matrix, kinds: Collection[int], start: int, stop: int) -> np.ndarray:
    """Rows start to stop - 1 of the sum of a matrix's blocks of some kinds, float32, shape (stop - start, n)."""
    out = np.zeros((stop - start, matrix.columns), np.float32)
    _add_rows(matrix, kinds, start, stop, out)
    return out


def lookup(matrix: Matrix, index: np.ndarray) -> np.ndarray:
    """Rows of W itself, float32, shape (k, n), for indices of shape (k,)."""
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
            Outliers.unpack(matrix.payload(level), matrix.rows, matrix.columns).add_to(out, start)


def _trellis(matrix: Matrix, level: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Table values of some rows of a block, int8, and their scales, float32."""
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
    """Sign bits of a block, 0 or 1, uint8, (m, n), and its factors, float32, (m, k) and (n, k)."""
    payload, m, n, rank = matrix.payload(level), matrix.rows, matrix.columns, matrix.rank[level]
    stride = -(-n // 8)
    bits = np.unpackbits(payload[: m * stride].reshape(m, stride), axis=1, count=n, bitorder="little")
    factors = payload[m * stride :].copy().view("<f2").astype(np.float32)
    return bits, factors[: m * rank].reshape(m, rank), factors[m * rank :].reshape(n, rank)
