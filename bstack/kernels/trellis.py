"""Encodes a group of columns of a trellis5 block: with the C kernel, or the reference, which gives the same bits."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np

from bstack.kernels import reference
from bstack.kernels.matrix import pointer
from bstack.kernels.native import library
from bstack.kernels.reference import EARLIER5

__all__ = ["encode_columns"]


def encode_columns(
    target: np.ndarray,
    original: np.ndarray,
    feedback: np.ndarray,
    table: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the codes of some columns, each of which makes up for part of the errors of those before it.

    Parameters
    ----------
    target : np.ndarray
        What the columns should become, float32, shape (columns, rows). Changed.
    original : np.ndarray
        What errors are measured against, float32, shape (columns, rows).
    feedback : np.ndarray
        Entry [j, t]: the part of column j's error that is added to the target of column t > j; float32, shape
        (columns, columns).
    table : np.ndarray
        TABLE5, float32, shape (64,).
    scale, weight : np.ndarray
        Scale of each row, positive, and weight of its squared error (in units of the scale), float32, shape (rows,).

    Returns
    -------
    codes : np.ndarray
        uint8 from 0 to 3, shape (columns, 4 + rows): four codes before the first row come first.
    errors : np.ndarray
        original - scale * value, float32, shape (columns, rows).
    """
    native = library()
    if native is None:
        _warn_once()
        return reference.encode_columns(target, original, feedback, table, scale, weight)
    columns, rows = target.shape
    codes = np.empty((columns, EARLIER5 + rows), np.uint8)
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
        "The C kernels are not in use, so the trellis codec encodes some hundred times slower.",
        RuntimeWarning,
        stacklevel=3,
    )
