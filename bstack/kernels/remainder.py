"""Code what a prediction lacks to the original (exact chunks of format/SPEC.md): the C kernels, or the reference with the same bits.

How large the difference may be, counted in the floats between the two, is the weight's class: from the scale of its row, a running
mean of its column and the magnitude of the prediction. Symbols of one class lie together, which zstd then codes by their
frequencies.
"""

from __future__ import annotations

import ctypes

import numpy as np

from bstack.kernels.matrix import pointer
from bstk.kinds import EXACT_CLASSES, exact_head, exact_low_bits

__all__ = ["Remainder", "code"]

ESCAPE = -128
PADDING = bytes(4)  # that the kernels may read after the low bits
_BYTES = np.array([0, 8, 16, 24], np.uint32)


class _State(ctypes.Structure):
    """A bstack_exact of csrc/bstack.h."""

    _fields_ = [
        ("columns", ctypes.c_int32),
        ("trailing", ctypes.c_int32),
        ("profile", ctypes.c_void_p),
        ("symbol", ctypes.c_void_p * EXACT_CLASSES),
        ("stop", ctypes.c_void_p * EXACT_CLASSES),
        ("low", ctypes.c_void_p),
        ("escape", ctypes.c_void_p),
        ("bits", ctypes.c_size_t),
        ("escapes", ctypes.c_size_t),
        ("all_escapes", ctypes.c_size_t),
        ("count", ctypes.c_size_t * EXACT_CLASSES),
    ]


def code(
    native: ctypes.CDLL | None, predicted: np.ndarray, scales: np.ndarray, values: np.ndarray, trailing: int
) -> list[bytes]:
    """Return an exact chunk's raw bytes, in the parts of `bstk.pack_parts`.

    Parameters
    ----------
    native : ctypes.CDLL or None
        The C kernels; None for the reference.
    predicted, values : np.ndarray
        float32, and bits in single precision, uint32, shape (m, n), C-contiguous.
    scales : np.ndarray
        Codes of the row scales, uint8, shape (m,).
    trailing : int
        Bits at the end that are 0 in every value.
    """
    columns = values.shape[1]
    if native is None:
        coded = _Rows(columns, trailing)
        coded.encode(predicted, scales, values)
        low, escaped = coded.low_bits(), np.array(coded.escaped, np.uint32)
        counts = [sum(map(len, symbols)) for symbols in coded.symbols]
        symbols = np.concatenate([part for symbols in coded.symbols for part in symbols]).astype(np.int8)
        planes = (escaped >> _BYTES[:, None]).astype(np.uint8)
    else:
        profile = np.ones(columns, np.float32)
        state = _State(columns=columns, trailing=trailing, profile=profile.ctypes.data)
        arguments = ctypes.byref(state), pointer(predicted), pointer(scales), len(values), pointer(values)
        native.bstack_exact_encode(*arguments)  # counts only
        counts = list(state.count)
        low = np.zeros(-(-state.bits // 8) + len(PADDING), np.uint8)
        symbols, planes = np.empty(values.size, np.int8), np.empty((4, state.escapes), np.uint8)
        profile[:] = 1
        state.low, state.escape, state.all_escapes = low.ctypes.data, planes.ctypes.data, state.escapes
        state.bits = state.escapes = 0
        state.symbol[:] = _places(symbols, counts)
        native.bstack_exact_encode(*arguments)
        low = low[: -len(PADDING)]
    head = np.array([trailing, *counts], "<u4").tobytes() + scales.tobytes()
    parts = [*np.split(symbols, np.cumsum(counts)[:-1]), low, *planes]
    return [head, *(part.tobytes() for part in parts)]


class Remainder:
    """Give the original from its prediction, some rows at a time.

    Parameters
    ----------
    native : ctypes.CDLL or None
        The C kernels; None for the reference.
    payload : bytes
        An exact chunk's raw bytes, which the container's reader has checked.
    rows, columns : int
    """

    def __init__(self, native: ctypes.CDLL | None, payload: bytes, rows: int, columns: int):
        self._native, self._next = native, 0
        self._payload = np.frombuffer(payload + PADDING, np.uint8)
        trailing, *counts = self._payload[: 4 * (1 + EXACT_CLASSES)].view("<u4").tolist()
        head = exact_head(rows)
        self._scales = self._payload[head - rows : head].copy()
        symbols = self._payload[head : head + rows * columns].view(np.int8)
        parts = np.split(symbols, np.cumsum(counts)[:-1])
        shifts = [exact_low_bits(trailing, number) for number in range(EXACT_CLASSES)]
        escapes = [np.count_nonzero(part == ESCAPE) for part in parts]
        bits = sum(k * (len(part) - out) for k, part, out in zip(shifts, parts, escapes, strict=True))
        low = self._payload[head + rows * columns :]
        escaped = low[-(-bits // 8) :]
        if native is None:
            planes = escaped[: 4 * sum(escapes)].reshape(4, -1).astype(np.uint32)
            self._rows = _Rows(columns, trailing)
            self._rows.read(parts, low, planes[0] | planes[1] << 8 | planes[2] << 16 | planes[3] << 24)
            return
        self._profile = np.ones(columns, np.float32)
        self._state = _State(columns=columns, trailing=trailing, profile=self._profile.ctypes.data)
        self._state.symbol[:] = _places(symbols, counts)
        self._state.stop[:] = [at + count for at, count in zip(self._state.symbol, counts, strict=True)]
        self._state.low, self._state.escape = low.ctypes.data, escaped.ctypes.data
        self._state.all_escapes = sum(escapes)

    def rows(self, predicted: np.ndarray) -> np.ndarray:
        """Return the next rows as bits in single precision, uint32, from their prediction, float32, C-contiguous.

        Raises
        ------
        ValueError
            The chunk asks for other symbols than it has.
        """
        scales = self._scales[self._next : self._next + len(predicted)]
        self._next += len(predicted)
        if self._native is None:
            return self._rows.decode(predicted, scales)
        out = np.empty(predicted.shape, np.uint32)
        if self._native.bstack_exact_decode(
            ctypes.byref(self._state), pointer(predicted), pointer(scales), len(predicted), pointer(out)
        ):
            raise ValueError("a class has fewer symbols than its weights ask for.")
        return out


def _places(symbols: np.ndarray, counts: list[int]) -> list[int]:
    """Return the address of the first symbol of each class."""
    return [symbols.ctypes.data + at for at in (0, *np.cumsum(counts)[:-1].tolist())]


class _Rows:
    """The reference: a row at a time, its columns side by side."""

    def __init__(self, columns: int, trailing: int):
        self.trailing = trailing
        self.profile = np.ones(columns, np.float32)
        self.shifts = np.array([exact_low_bits(trailing, number) for number in range(EXACT_CLASSES)])
        self.symbols: list[list[np.ndarray]] = [[] for _ in range(EXACT_CLASSES)]
        self.low: list[np.ndarray] = []
        self.escaped: list[int] = []

    def _classify(self, p: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]:
        """Return class, f and M(p) of each weight of a row, and the row's scale."""
        t = self.trailing
        row_scale = np.uint32((134 + int(scale)) << 22).view(np.float32)
        v, b = (row_scale * self.profile).view(np.int32), np.where(np.isnan(p), np.float32(0), p).view(np.uint32)
        low = (v >> 23) - 4
        floor = (low << 23 - t) - 1
        own = (b >> 23 & 255).astype(np.int32)
        number = np.clip((v >> 22) - 2 * (np.maximum(own, low) + t - 23) + 8, 0, EXACT_CLASSES - 1)
        magnitude = ((b & 0x7FFFFFFF) + np.uint32(1 << t >> 1) >> t).astype(np.int32)
        m = np.maximum(magnitude, floor) - floor
        return number, floor, np.where(b >> 31, -m, m), row_scale

    def _adapt(self, p: np.ndarray, bits: np.ndarray, row_scale: np.float32) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            y = np.abs(bits.view(np.float32) - p) * (np.float32(1) / row_scale)
            y = np.where(y < 16, y, np.float32(16))
        y = np.maximum(y, np.float32(2**-12))
        self.profile += (y - self.profile) * np.float32(2**-6)

    def encode(self, predicted: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
        for p, scale, bits in zip(predicted, scales, values, strict=True):
            number, floor, m, row_scale = self._classify(p, scale)
            a = ((bits & 0x7FFFFFFF) >> self.trailing).astype(np.int32) - floor
            with np.errstate(over="ignore"):
                d = np.where(bits >> 31, -a, a) - m
            shift = self.shifts[number]
            symbol = d >> shift
            escaped = (a <= 0) | (symbol <= ESCAPE) | (symbol > 127)
            symbol[escaped] = ESCAPE
            for c in set(number.tolist()):
                self.symbols[c].append(symbol[number == c].astype(np.int8))
            self.escaped += bits[escaped].tolist()
            for low, k in zip(d[~escaped], shift[~escaped], strict=True):
                self.low.append(low >> np.arange(k) & 1)
            self._adapt(p, bits, row_scale)

    def low_bits(self) -> np.ndarray:
        return np.packbits(np.concatenate([np.empty(0, np.uint8), *self.low]).astype(np.uint8), bitorder="little")

    def read(self, symbols: list[np.ndarray], low: np.ndarray, escaped: np.ndarray) -> None:
        self._left, self._low, self._escaped, self._bit, self._at = symbols, low, escaped, 0, 0

    def decode(self, predicted: np.ndarray, scales: np.ndarray) -> np.ndarray:
        out = np.empty(predicted.shape, np.uint32)
        for p, scale, bits in zip(predicted, scales, out, strict=True):
            number, floor, m, row_scale = self._classify(p, scale)
            symbol = np.empty(len(p), np.int32)
            for c in set(number.tolist()):
                own = number == c
                taken, self._left[c] = np.split(self._left[c], [np.count_nonzero(own)])
                if len(taken) < np.count_nonzero(own):
                    raise ValueError("a class has fewer symbols than its weights ask for.")
                symbol[own] = taken
            escaped = symbol == ESCAPE
            shift = np.where(escaped, 0, self.shifts[number])
            ends = self._bit + np.cumsum(shift)
            first = ends - shift
            four = self._low[(first >> 3)[:, None] + np.arange(4)].astype(np.uint32) << _BYTES
            low = np.bitwise_or.reduce(four, 1) >> (first & 7) & (1 << shift) - 1
            self._bit = int(ends[-1])
            m = (m.astype(np.int64) + (symbol.astype(np.int64) << shift) + low).astype(np.int32).astype(np.int64)
            magnitude = (np.abs(m) + floor << self.trailing) & 0x7FFFFFFF
            bits[:] = np.where(m < 0, magnitude | 0x80000000, magnitude)
            ended = self._at + int(np.count_nonzero(escaped))
            bits[escaped] = self._escaped[self._at : ended]
            self._at = ended
            self._adapt(p, bits, row_scale)
        return out
