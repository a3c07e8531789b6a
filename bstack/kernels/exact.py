"""Exact chunks: a matrix's original from its blocks and what these lack to it (format/SPEC.md).

The prediction of a weight is what `lookup` gives, the same bits everywhere.
"""

from __future__ import annotations

import numpy as np

from bstack.kernels.matrix import Matrix
from bstack.kernels.multiply import lookup
from bstack.kernels.native import library
from bstack.kernels.remainder import Remainder, code
from bstk.kinds import EXACT_TRAILING

__all__ = ["ROWS_TOGETHER", "Decoder", "encode", "narrow", "predict", "restore", "widen"]

ROWS_TOGETHER = 64


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
    with np.errstate(over="ignore", invalid="ignore"):
        short = bits.view(np.float32).astype(np.float16).view(np.uint16)
    special = bits >> 16 & 0x8000 | 0x7C00 | bits >> 13 & 0x3FF
    return np.where(bits & 0x7F800000 == 0x7F800000, special.astype(np.uint16), short)


def predict(stack: Matrix) -> np.ndarray:
    """Return what the blocks of a matrix say of it, float32, shape (m, n)."""
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
    values = np.ascontiguousarray(widen(values, dtype))
    union = int(np.bitwise_or.reduce(values, axis=None))
    trailing = min((union & -union).bit_length() - 1, EXACT_TRAILING) if union else EXACT_TRAILING
    predicted = predict(stack)
    return code(library(), predicted, _scales(predicted, values), values, trailing)


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
        self._remainder = Remainder(library(), payload, stack.rows, stack.columns)

    def rows(self, start: int) -> np.ndarray:
        """Return the next rows, at most 64, of which the first is `start`, as bits of the type.

        Raises
        ------
        ValueError
            Rows were left out, or the chunk asks for other symbols than it has.
        """
        if start != self._next:
            raise ValueError(f"the next row is {self._next}, not {start}.")
        self._next = min(start + ROWS_TOGETHER, self._stack.rows)
        return narrow(self._remainder.rows(lookup(self._stack, np.arange(start, self._next))), self._dtype)


def _scales(predicted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the codes of the row scales that are nearest to the mean difference of each row."""
    codes = np.empty(len(values), np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (row, bits) in enumerate(zip(predicted, values, strict=True)):
            difference = np.abs(bits.view(np.float32) - row)
            usual = difference[difference < 65536]  # neither NaN nor infinite
            mean = float(usual.mean(dtype=np.float64)) if len(usual) else 0.0
            codes[i] = np.clip(np.rint(2 * (np.log2(max(mean, 1e-30)) + 60)), 0, 255)
    return codes
