"""The C library's allocator, told to give the memory of freed tensors back."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back_freed_tensors"]

# From this size on an allocation is a mapping of its own, which disappears when it is freed.
MAPPED_FROM = 2 * 2**20
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def give_back_freed_tensors() -> None:
    """Let tensors of 2 MB and more go back to the system when they are freed, for the rest of the process.

    By default glibc raises that size up to 32 MB as it sees large blocks freed, and keeps smaller ones in its heaps
    (one for each few threads). The matrices of one layer after another then leave gaps that the next ones do not quite fit:
    peak memory grew by a layer's size with every layer (docs/memory.md). Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has neither the function nor the habit
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    mallopt(_M_ARENA_MAX, 2)
