"""Trust in the C kernels: before their first use they must agree with the reference on a small matrix of each kind."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

import numpy as np

from bstack.kernels import reference
from bstack.kernels.matrix import SIGN, TRELLIS, Matrix, block_bytes
from bstack.kernels.native import REFERENCE, VARIABLE, library

__all__ = ["random_payload", "trusted_library"]

ROWS, COLUMNS, TOKENS = 7, 300, 3


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
    for name, kind, rank in (("trellis", TRELLIS, 2), ("sign", SIGN, 3)):
        matrix = Matrix.of(ROWS, COLUMNS, [(kind, rank, random_payload(rng, ROWS, COLUMNS, kind, rank))])
        y = np.empty((TOKENS, ROWS), np.float32)
        places = (ctypes.c_void_p * 1)(ctypes.addressof(matrix))
        native.bstack_multiply(places, 1, x.ctypes.data_as(ctypes.c_void_p), TOKENS, (ctypes.c_void_p * 1)(y.ctypes.data))
        if y.tobytes() != reference.multiply(matrix, x).tobytes():
            return f"a product with a {name} block"
        rows = np.empty((ROWS, COLUMNS), np.float32)
        native.bstack_decode_rows(ctypes.byref(matrix), kind, 0, ROWS, rows.ctypes.data_as(ctypes.c_void_p))
        if rows.tobytes() != reference.decode_rows(matrix, kind, 0, ROWS).tobytes():
            return f"a decoded {name} block"
    return ""


def random_payload(rng: np.random.Generator, rows: int, columns: int, kind: int, rank: int) -> bytes:
    """A block of random codes or signs, with scales or factors of a trained matrix's size."""
    factors = rows if kind == TRELLIS else rank * (rows + columns)
    codes = rng.integers(0, 256, block_bytes(rows, columns, kind, rank) - 2 * factors, np.uint8)
    return codes.tobytes() + (rng.standard_normal(factors) / 50).astype("<f2").tobytes()
