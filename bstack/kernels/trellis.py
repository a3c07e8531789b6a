"""Encoding a group of columns of a trellis block: the C kernel, or the reference with the same result bit for bit."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np

from bstack.kernels.native import VARIABLE, library, pointer

__all__ = ["EARLIER", "encode_columns", "encode_columns_reference"]

BITS = 2
CODES = 1 << BITS
WINDOWS = 256
STATES = WINDOWS // CODES
EARLIER = 3


def encode_columns(
    target: np.ndarray,
    original: np.ndarray,
    feedback: np.ndarray,
    table: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the codes of some columns, each taking up its share of the errors of those before it.

    Parameters
    ----------
    target : np.ndarray
        What the columns should become, float32, shape (columns, rows). Changed.
    original : np.ndarray
        What errors are measured against, float32, shape (columns, rows).
    feedback : np.ndarray
        Entry [j, t]: the share of column j's error that is added to the target of column t > j; float32, shape
        (columns, columns).
    table : np.ndarray
        Values of the 256 windows, float32.
    scale, weight : np.ndarray
        Scale of each row, positive, and weight of its squared error (in units of the scale), float32, shape (rows,).

    Returns
    -------
    codes : np.ndarray
        uint8 from 0 to 3, shape (columns, 3 + rows): three codes before the first row come first.
    errors : np.ndarray
        original - scale * value, float32, shape (columns, rows).
    """
    native = library()
    if native is None:
        _warn_once()
        return encode_columns_reference(target, original, feedback, table, scale, weight)
    columns, rows = target.shape
    codes = np.empty((columns, EARLIER + rows), np.uint8)
    errors = np.empty((columns, rows), np.float32)
    arrays = [np.ascontiguousarray(a, np.float32) for a in (original, feedback, table, scale, weight)]
    failed = native.bstack_trellis_encode(
        pointer(target),
        pointer(arrays[0]),
        columns,
        rows,
        *(pointer(a) for a in arrays[1:]),
        pointer(codes),
        pointer(errors),
    )
    if failed:
        raise MemoryError
    return codes, errors


@cache
def _warn_once() -> None:
    warnings.warn(
        "The C kernels are not in use, so the trellis codec encodes some hundred times slower. Install a C compiler "
        f"and reinstall bstack (or unset {VARIABLE}); or compress with --codec sign.",
        RuntimeWarning,
        stacklevel=3,
    )


def encode_columns_reference(
    target: np.ndarray,
    original: np.ndarray,
    feedback: np.ndarray,
    table: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As `encode_columns`, in plain numpy: a Viterbi search (G. D. Forney, Proc. IEEE 61, 1973) down each column."""
    columns, rows = target.shape
    codes = np.empty((columns, EARLIER + rows), np.uint8)
    errors = np.empty((columns, rows), np.float32)
    inverse = np.float32(1) / scale
    for j in range(columns):
        codes[j], values = _search(target[j] * inverse, weight, table)
        errors[j] = original[j] - scale * values
        for t in range(j + 1, columns):
            target[t] += feedback[j, t] * errors[j]
    return codes, errors


def _search(x: np.ndarray, weight: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
