"""Exact chunks: what the blocks of a matrix lack to the original, coded by the C kernels or the reference (format/SPEC.md).

The prediction of a weight is what `lookup` gives, the same bits everywhere. The difference from the original is counted in the
floats between the two. How large it may be, in these floats, is the weight's class: from the scale of its row, a running mean
of its column and the magnitude of the prediction. Symbols of one class lie together, which zstd then codes by their frequencies.
"""

from __future__ import annotations

import ctypes

import numpy as np

from bstack.kernels.matrix import Matrix, pointer
from bstack.kernels.multiply import lookup
from bstack.kernels.native import library
from bstk.kinds import EXACT_CLASSES, EXACT_TRAILING, exact_head, exact_low_bits

__all__ = ["ROWS_TOGETHER", "Decoder", "encode", "narrow", "predict", "restore", "widen"]

ROWS_TOGETHER = 64
ESCAPE = -128
PADDING = bytes(3)  # that the kernels may read after the low bits
_QUIET = {"over": "ignore", "invalid": "ignore"}


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


def widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the single-precision bits, uint32, of values given as the bits of their type ("f32", "f16", "bf16")."""
    if dtype == "bf16":
        return values.astype(np.uint32) << np.uint32(16)
    if dtype == "f32":
        return values
    wide = values.view(np.float16).astype(np.float32).view(np.uint32)
    sign, rest = (values & 0x8000).astype(np.uint32) << 16, (values & 0x7FFF).astype(np.uint32) << 13
    # Processors set a bit of a NaN.
    return np.where(rest >= 0x7C00 << 13, sign | rest | np.uint32(0x7F800000), wide)


def narrow(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Undo `widen`."""
    if dtype == "bf16":
        return (bits >> 16).astype(np.uint16)
    if dtype == "f32":
        return bits
    with np.errstate(**_QUIET):
        short = bits.view(np.float32).astype(np.float16).view(np.uint16)
    special = bits >> 16 & 0x8000 | 0x7C00 | bits >> 13 & 0x3FF
    return np.where(bits & 0x7F800000 == 0x7F800000, special.astype(np.uint16), short)


def predict(stack: Matrix) -> np.ndarray:
    """Return what the blocks of a matrix say of it, float32, shape (m, n), the same bits everywhere."""
    return lookup(stack, np.arange(stack.rows))


def encode(stack: Matrix, values: np.ndarray, dtype: str) -> list[bytes]:
    """Return the exact chunk's raw bytes of a matrix, in the parts of `bstk.pack_parts`.

    Parameters
    ----------
    stack : Matrix
        All blocks of the matrix, W of m rows and n columns.
    values : np.ndarray
        The original as the bits of its type, uint16 or uint32, shape (m, n).
    dtype : str
        The type: "f32", "f16" or "bf16".
    """
    values = widen(np.ascontiguousarray(values), dtype)
    union = int(np.bitwise_or.reduce(values, axis=None))
    trailing = min((union & -union).bit_length() - 1, EXACT_TRAILING) if union else EXACT_TRAILING
    predicted = predict(stack)
    scales = _scales(predicted, values)
    native = library()
    counted = _Rows(stack.columns, trailing)
    if native is None:
        counted.encode(predicted, scales, values)
        low, escaped = counted.low_bits(), np.array(counted.escaped, np.uint32)
        counts = [sum(map(len, symbols)) for symbols in counted.symbols]
        symbols = np.concatenate([part for symbols in counted.symbols for part in symbols]).astype(np.int8)
        planes = (escaped >> np.arange(0, 32, 8, np.uint32)[:, None]).astype(np.uint8)
    else:
        profile = np.ones(stack.columns, np.float32)
        state = _State(columns=stack.columns, trailing=trailing, profile=profile.ctypes.data)
        arguments = ctypes.byref(state), pointer(predicted), pointer(scales), stack.rows, pointer(values)
        native.bstack_exact_encode(*arguments)
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


def restore(stack: Matrix, payload: bytes, dtype: str) -> np.ndarray:
    """Return the original of a matrix as the bits of its type, uint16 or uint32, shape (m, n); see `Decoder`."""
    decoder = Decoder(stack, payload, dtype)
    return np.concatenate([decoder.rows(start) for start in range(0, stack.rows, ROWS_TOGETHER)])


class Decoder:
    """Restore a matrix, some rows at a time.

    Parameters
    ----------
    stack : Matrix
        All its blocks.
    payload : bytes
        The exact chunk's raw bytes, which the container's reader has checked.
    dtype : str
        Of the chunk.
    """

    def __init__(self, stack: Matrix, payload: bytes, dtype: str):
        self._stack, self._dtype, self._next = stack, dtype, 0
        self._payload = np.frombuffer(payload + PADDING, np.uint8)
        trailing, *counts = self._payload[: 4 * (1 + EXACT_CLASSES)].view("<u4").tolist()
        head = exact_head(stack.rows)
        weights = stack.rows * stack.columns
        self._scales = self._payload[head - stack.rows : head].copy()
        symbols = self._payload[head : head + weights].view(np.int8)
        parts = np.split(symbols, np.cumsum(counts)[:-1])
        shifts = [exact_low_bits(trailing, number) for number in range(EXACT_CLASSES)]
        escapes = [np.count_nonzero(part == ESCAPE) for part in parts]
        bits = sum(k * (len(part) - out) for k, part, out in zip(shifts, parts, escapes, strict=True))
        low = self._payload[head + weights :]
        escaped = low[-(-bits // 8) :]
        self._native = library()
        if self._native is None:
            planes = escaped[: 4 * sum(escapes)].reshape(4, -1).astype(np.uint32)
            self._rows = _Rows(stack.columns, trailing)
            self._rows.read(parts, low, planes[0] | planes[1] << 8 | planes[2] << 16 | planes[3] << 24)
            return
        self._profile = np.ones(stack.columns, np.float32)
        self._state = _State(columns=stack.columns, trailing=trailing, profile=self._profile.ctypes.data)
        self._state.symbol[:] = _places(symbols, counts)
        self._state.stop[:] = [at + count for at, count in zip(self._state.symbol, counts, strict=True)]
        self._state.low, self._state.escape = low.ctypes.data, escaped.ctypes.data
        self._state.all_escapes = sum(escapes)

    def rows(self, start: int) -> np.ndarray:
        """Return the next rows, at most 64, of which the first is `start`, as bits of the type.

        Raises
        ------
        ValueError
            The chunk asks for other symbols than it has.
        """
        if start != self._next:
            raise ValueError(f"the next row is {self._next}, not {start}.")
        stop = self._next = min(start + ROWS_TOGETHER, self._stack.rows)
        predicted = lookup(self._stack, np.arange(start, stop))
        scales = self._scales[start:stop]
        if self._native is None:
            return narrow(self._rows.decode(predicted, scales), self._dtype)
        out = np.empty(predicted.shape, np.uint32)
        if self._native.bstack_exact_decode(
            ctypes.byref(self._state), pointer(predicted), pointer(scales), stop - start, pointer(out)
        ):
            raise ValueError("a class has fewer symbols than its weights ask for.")
        return narrow(out, self._dtype)


def _places(symbols: np.ndarray, counts: list[int]) -> list[int]:
    """Return the address of the first symbol of each class."""
    return [symbols.ctypes.data + at for at in (0, *np.cumsum(counts)[:-1].tolist())]


def _scales(predicted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the codes of the row scales that are nearest to the mean difference of each row."""
    codes = np.empty(len(values), np.uint8)
    with np.errstate(**_QUIET):
        for i, (row, bits) in enumerate(zip(predicted, values, strict=True)):
            difference = np.abs(bits.view(np.float32) - row)
            usual = difference[difference < 65536]  # neither NaN nor infinite
            mean = float(usual.mean(dtype=np.float64)) if len(usual) else 0.0
            codes[i] = np.clip(np.rint(2 * (np.log2(max(mean, 1e-30)) + 60)), 0, 255)
    return codes


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
        v, b = (row_scale * self.profile).view(np.int32), p.view(np.uint32)
        low = (v >> 23) - 4
        floor = (low << 23 - t) - 1
        own = (b >> 23 & 255).astype(np.int32)
        number = np.clip((v >> 22) - 2 * (np.maximum(own, low) + t - 23) + 8, 0, EXACT_CLASSES - 1)
        magnitude = ((b & 0x7FFFFFFF) + np.uint32(1 << t >> 1) >> t).astype(np.int32)
        m = np.maximum(magnitude, floor) - floor
        return number, floor, np.where(b >> 31, -m, m), row_scale

    def _adapt(self, p: np.ndarray, bits: np.ndarray, row_scale: np.float32) -> None:
        with np.errstate(**_QUIET):
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
            for c in np.unique(number):
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
            for c in np.unique(number):
                own = number == c
                taken, self._left[c] = np.split(self._left[c], [np.count_nonzero(own)])
                if len(taken) < np.count_nonzero(own):
                    raise ValueError("a class has fewer symbols than its weights ask for.")
                symbol[own] = taken
            escaped = symbol == ESCAPE
            shift = np.where(escaped, 0, self.shifts[number])
            ends = self._bit + np.cumsum(shift)
            first = ends - shift
            four = self._low[(first >> 3)[:, None] + np.arange(4)].astype(np.uint32) << np.arange(0, 32, 8, np.uint32)
            low = np.bitwise_or.reduce(four, 1) >> (first & 7) & (1 << shift) - 1
            self._bit = int(ends[-1])
            m = (m.astype(np.int64) + (symbol.astype(np.int64) << shift) + low).astype(np.int32).astype(np.int64)
            magnitude = (np.abs(m) + floor << self.trailing) & 0x7FFFFFFF
            bits[:] = np.where(m < 0, magnitude | 0x80000000, magnitude)
            count = np.count_nonzero(escaped)
            bits[escaped] = self._escaped[self._at : self._at + count]
            self._at += count
            self._adapt(p, bits, row_scale)
        return out
