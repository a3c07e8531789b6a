"""The C kernels, loaded with ctypes; None where they are not built.

Set ``BSTACK_KERNELS=reference`` to do without them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

__all__ = ["VARIABLE", "library", "pointer"]

VARIABLE = "BSTACK_KERNELS"
INTERFACE = 1


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None when it is not built, cannot be loaded or is not wanted."""
    if os.environ.get(VARIABLE) == "reference":
        return None
    spec = importlib.util.find_spec("bstack.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    # A library from an earlier build may stand in a working copy: its functions may take other arguments.
    return loaded if getattr(loaded, "bstack_kernels_version", lambda: 0)() == INTERFACE else None


def pointer(array) -> ctypes.c_void_p:
    """Address of a C-contiguous numpy array, which the caller keeps alive."""
    return ctypes.c_void_p(array.ctypes.data)
