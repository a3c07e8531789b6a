"""Products with packed matrices: the C kernels, or the reference with the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence

import numpy as np

from bstack.kernels import reference
from bstack.kernels.matrix import PLAIN, ROTATED, Matrix, kind_bits, pointer
from bstack.kernels.native import library

__all__ = ["decode_rows", "lookup", "multiply", "multiply_decoded", "multiply_dense", "multiply_many", "rotate"]


def multiply(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """Compute y = x W^T for few tokens, without building W.

    Inputs are rounded, with one scale a token: to 16 bits for trellis blocks, to 14 for sign blocks. For trellis blocks y_i
    differs from the product in real numbers by at most ``2e-5 * max_j |x_j| * sum_j |W_ij|``, both rotated; for a rank of
    a sign block by four times as much, with ``x_j V_jr`` for x_j and ``U_ir`` for W_ij. Relative to the norm of y that is
    typically 3e-5 for trellis blocks and 2e-4 for sign blocks.

    A token's result is the same bits whatever else is in the call, for any number of threads and on any CPU.

    Parameters
    ----------
    matrix : Matrix
        W, shape (m, n).
    x : np.ndarray
        float32, shape (t, n); fast for t of 1 to 8.

    Returns
    -------
    np.ndarray
        float32, shape (t, m). NaN in every output of a token that holds a NaN or an infinity.

    Raises
    ------
    ValueError
        x has another shape or dtype.
    """
    return multiply_many([matrix], x)[0]


def multiply_many(matrices: Sequence[Matrix], x: np.ndarray) -> list[np.ndarray]:
    """Multiply as `multiply` by several matrices that read the same x (q, k and v; gate and up), prepared once.

    Raises
    ------
    ValueError
        x has another shape or dtype than every matrix needs.
    """
    for matrix in matrices:
        _check(x, matrix.columns)
    native = library()
    if native is None:
        return [reference.multiply(matrix, x) for matrix in matrices]
    x = np.ascontiguousarray(x)
    outputs = [np.empty((len(x), matrix.rows), np.float32) for matrix in matrices]
    count = len(matrices)
    addresses = (ctypes.c_void_p * count)(*(ctypes.addressof(matrix) for matrix in matrices))
    results = (ctypes.c_void_p * count)(*(y.ctypes.data for y in outputs))
    if native.bstack_multiply(addresses, count, pointer(x), len(x), results):
        raise MemoryError
    return outputs


def decode_rows(
    matrix: Matrix, kinds: int | Collection[int], start: int, stop: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Add up rows start to stop - 1 of a matrix's blocks of some kinds; zeros where it has none.

    For long prompts, with T the rows of the kinds ROTATED and S those of the kinds PLAIN (all others)::

        y[:, start:stop] = rotate(x) @ T.T + x @ S.T

    Parameters
    ----------
    matrix : Matrix
    kinds : int or collection of int
        A kind, or several.
    start, stop : int
    out : np.ndarray, optional
        Where to write, float32, C-contiguous, shape (stop - start, n).

    Returns
    -------
    np.ndarray
        `out`, or a new array like it.

    Raises
    ------
    ValueError
        The kind is another, the rows are not there, or `out` has another shape or layout.
    """
    kinds = (kinds,) if isinstance(kinds, int) else tuple(kinds)
    for kind in kinds:
        if kind not in (*PLAIN, *ROTATED):
            raise ValueError(f"kind is {kind}; allowed are {', '.join(map(str, sorted((*PLAIN, *ROTATED))))}.")
    if not 0 <= start <= stop <= matrix.rows:
        raise ValueError(f"rows are {start} to {stop}; the matrix has {matrix.rows}.")
    shape = (stop - start, matrix.columns)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} of shape {out.shape}; needed is contiguous float32 of shape {shape}.")
    native = library()
    if native is None:
        out[...] = reference.decode_rows(matrix, kinds, start, stop)
    else:
        native.bstack_decode_rows(ctypes.byref(matrix), kind_bits(kinds), start, stop, pointer(out))
    return out


def multiply_decoded(matrix: Matrix, x: np.ndarray, rotated: np.ndarray, out: np.ndarray) -> None:
    """Compute y = x W^T for many tokens: rows are decoded, some at a time, and multiplied in single precision.

    A token's result is the same bits whatever other tokens are in the call, for any number of threads; CPUs differ by
    rounding. Without the C kernels it is numpy's product.

    Parameters
    ----------
    matrix : Matrix
        W, shape (m, n).
    x, rotated : np.ndarray
        float32, C-contiguous, shape (t, n); `rotated` is ``rotate(x)``.
    out : np.ndarray
        y, float32, shape (t, m), with contiguous rows.

    Raises
    ------
    ValueError
        An array has another shape, dtype or layout.
    """
    _check(x, matrix.columns)
    _check(rotated, matrix.columns)
    if out.shape != (len(x), matrix.rows) or out.dtype != np.float32 or not _rows_are_contiguous(out):
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}; needed is float32 of shape {(len(x), matrix.rows)}."
        )
    native = library()
    present = set(matrix.kind[: matrix.count])
    terms = [(kinds, given) for kinds, given in ((ROTATED, rotated), (PLAIN, x)) if present & set(kinds)]
    if not terms:
        out[...] = 0
    for number, (kinds, given) in enumerate(terms):
        if native is None:
            y = given @ reference.decode_rows(matrix, kinds, 0, matrix.rows).T
            out[...] = out + y if number else y
        else:
            given = np.ascontiguousarray(given)
            step = ctypes.c_size_t(out.strides[0] // 4)
            bits = kind_bits(kinds)
            if native.bstack_multiply_decoded(
                ctypes.byref(matrix), bits, pointer(given), len(given), pointer(out), step, number
            ):
                raise MemoryError


def multiply_dense(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return x w^T, float32, in the way of `multiply_decoded`.

    Parameters
    ----------
    w, x : np.ndarray
        float32, shapes (m, n) and (t, n), with contiguous rows.

    Raises
    ------
    ValueError
        An array has another shape, dtype or layout.
    """
    for array in (w, x):
        _check(array, w.shape[-1])
        if not _rows_are_contiguous(array):
            raise ValueError("rows are not contiguous.")
    native = library()
    if native is None:
        return x @ w.T
    y = np.empty((len(x), len(w)), np.float32)
    steps = [ctypes.c_size_t(array.strides[0] // 4) for array in (w, x, y)]
    if native.bstack_multiply_dense(
        pointer(w), steps[0], len(w), w.shape[1], pointer(x), steps[1], len(x), pointer(y), steps[2]
    ):
        raise MemoryError
    return y


def lookup(matrix: Matrix, index: np.ndarray) -> np.ndarray:
    """Return rows of W itself, all kinds added up and the rotation undone, as an embedding needs them.

    Parameters
    ----------
    matrix : Matrix
    index : np.ndarray
        Integers from 0 to m - 1, shape (k,).

    Returns
    -------
    np.ndarray
        float32, shape (k, n).

    Raises
    ------
    ValueError
        There is no such row.
    """
    index = np.ascontiguousarray(index, np.int64)
    if index.ndim != 1 or (index.size and not (index.min() >= 0 and index.max() < matrix.rows)):
        raise ValueError(f"an index is outside 0 to {matrix.rows - 1}, or indices have not one dimension.")
    native = library()
    if native is None:
        return reference.lookup(matrix, index)
    out = np.empty((len(index), matrix.columns), np.float32)
    native.bstack_lookup(ctypes.byref(matrix), pointer(index), len(index), pointer(out))
    return out


def rotate(x: np.ndarray) -> np.ndarray:
    """Return (x * signs) H for rows x, float32, shape (t, n): what trellis blocks multiply (format/SPEC.md, section 6).

    Raises
    ------
    ValueError
        x is not float32 of two dimensions.
    """
    _check(x, x.shape[-1] if x.ndim else 0)
    native = library()
    if native is None:
        return reference.rotate(x)
    rotated = np.array(x, np.float32, order="C")
    native.bstack_rotate(pointer(rotated), *rotated.shape)
    return rotated


def _check(x: np.ndarray, columns: int) -> None:
    if x.ndim != 2 or x.shape[1] != columns or x.dtype != np.float32 or not columns:
        raise ValueError(f"x is {x.dtype} of shape {x.shape}; needed is float32 of shape (tokens, {columns}).")


def _rows_are_contiguous(array: np.ndarray) -> bool:
    # Strides of a dimension of length 1 say nothing.
    return array.shape[1] <= 1 or not array.size or array.strides[1] == array.itemsize
