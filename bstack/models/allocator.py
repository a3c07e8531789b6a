"""The C library's allocator, told to give the memory of freed tensors back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

__all__ = ["give_back_freed_memory"]

_M_ARENA_MAX = -8


def give_back_freed_memory() -> None:
    """Return the free pages of the C library's heaps to the system; a few milliseconds, so once for each layer.

    The first call also limits the heaps to two, where there would be one for every few threads.

    glibc keeps freed blocks of up to 32 MB in its heaps, where one layer's matrices leave gaps that the next layer's do not
    quite fit: peak memory grew by nearly a layer's size with every layer (docs/memory.md). Does nothing where the C library
    is another one.
    """
    if (trim := _find()) is not None:
        trim(0)


@cache
def _find() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 2)
        return libc.malloc_trim
    except (OSError, AttributeError):  # musl has neither the functions nor the habit
        return None

