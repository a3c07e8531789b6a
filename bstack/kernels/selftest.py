"""Trust in the C kernels: before their first use they must agree with the reference on a small matrix of each kind."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

import numpy as np

from bstack.kernels import reference
from bstack.kernels.matrix import OUTLIERS, PLAIN, SIGN, SPQR, TRELLIS, Matrix, block_bytes, kind_bits
from bstack.kernels.native import REFERENCE, VARIABLE, library
from bstack.kernels.spqr import ROWS as TILE
from bstack.kernels.spqr import Dense, Outliers, form_of, rank_of

__all__ = ["random_payload", "trusted_library"]

# More rows than the loops take at a time, twice over and some left; more tokens than they take at a time.
ROWS, COLUMNS, TOKENS = 71, 300, 5
BLOCKS = {
    "trellis": [(TRELLIS, 2)],
    "sign": [(SIGN, 3)],
    "SpQR": [(SPQR, rank_of(3, 16)), (SPQR, rank_of(4, 32)), (OUTLIERS, 0)],
}


@cache
def trusted_library() -> ctypes.CDLL | None:
    """The C kernels, or None, with a warning, where they are missing or fail the test; without one if not wanted.

    Raises
    ------
    bstack.errors.KernelError
        As `bstack.kernels.native.library`.
    """
    native = library()
    if native is None:
        if os.environ.get(VARIABLE) != REFERENCE:
            _warn("The C kernels are not built. Install a C compiler and reinstall bstack.")
        return None
    if failed := _failure(native):
        name = native.bstack_instructions().decode()
        _warn(
            f"The C kernels ({name}) failed their self-test: {failed} differs from the reference. Reinstall bstack, or try "
            f"{VARIABLE}=portable; please report it with your CPU and compiler."
        )
        return None
    return native


def _warn(problem: str) -> None:
    warnings.warn(f"{problem} Until then the reference runs, some hundred times slower.", RuntimeWarning, stacklevel=4)


def _failure(native: ctypes.CDLL) -> str:
    """What goes wrong, in a word or two; nothing if all agrees."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    for name, parts in BLOCKS.items():
        blocks = [(kind, rank, random_payload(rng, ROWS, COLUMNS, kind, rank, COLUMNS)) for kind, rank in parts]
        matrix = Matrix.of(ROWS, COLUMNS, blocks)
        y = np.empty((TOKENS, ROWS), np.float32)
        places = (ctypes.c_void_p * 1)(ctypes.addressof(matrix))
        native.bstack_multiply(
            places, 1, x.ctypes.data_as(ctypes.c_void_p), TOKENS, (ctypes.c_void_p * 1)(y.ctypes.data)
        )
        if y.tobytes() != reference.multiply(matrix, x).tobytes():
            return f"a product with a {name} block"
        rows = np.empty((ROWS, COLUMNS), np.float32)
        kinds = PLAIN if parts[0][0] in PLAIN else (TRELLIS,)
        native.bstack_decode_rows(ctypes.byref(matrix), kind_bits(kinds), 0, ROWS, rows.ctypes.data_as(ctypes.c_void_p))
        if rows.tobytes() != reference.decode_rows(matrix, kinds, 0, ROWS).tobytes():
            return f"a decoded {name} block"
    return ""


def random_payload(rng: np.random.Generator, rows: int, columns: int, kind: int, rank: int, count: int = 0) -> bytes:
    """A block of random codes or signs, with scales or factors of a trained matrix's size; `count` is that of outliers."""
    if kind == SPQR:
        return _random_dense(rng, rows, columns, rank)
    if kind == OUTLIERS:
        flat = np.sort(rng.choice(rows * columns, count, replace=False))
        pointer = np.searchsorted(flat, np.arange(rows + 1) * columns)
        return Outliers(pointer, flat % columns, rng.standard_normal(count) / 10).pack()
    factors = rows if kind == TRELLIS else rank * (rows + columns)
    codes = rng.integers(0, 256, block_bytes(rows, columns, kind, rank) - 2 * factors, np.uint8)
    return codes.tobytes() + (rng.standard_normal(factors) / 50).astype("<f2").tobytes()


def _random_dense(rng: np.random.Generator, rows: int, columns: int, rank: int) -> bytes:
    bits, group = form_of(rank)
    tiles, groups = -(-rows // TILE), -(-columns // group)
    codes = rng.integers(0, 2**bits, (tiles * TILE, groups * group), np.uint8)
    codes[rows:], codes[:, columns:] = 0, 0
    scale_codes, zero_codes = rng.integers(0, 8, (2, tiles * TILE, groups), np.uint8)
    low, step = np.array([0.01, 0.002, 4, 1]), np.array([0.01, 0.002, 3, 0.3])
    scales = (low + step * rng.random((tiles, groups, 4))).astype(np.float16)
    return Dense(rng.permutation(columns), codes, scale_codes, zero_codes, scales).pack(rank)
