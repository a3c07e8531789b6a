"""How much memory this process holds, and the allocator settings by which freed tensors go back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

__all__ = ["give_back_freed_memory", "no_large_blocks_in_heaps", "peak_bytes", "resident_bytes"]

STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_SMALL = 2**17
# The maximum to which glibc itself raises its threshold when larger blocks are freed.
_LARGE = 2**25


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now (its resident set)."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Return the most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    try:
        # getrusage counts the parent that this process was forked from.
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed_memory() -> None:
    """Return the free pages of glibc's heaps to the system; it takes a few milliseconds, so once for each layer.

    The first call also limits the number of heaps to two. glibc keeps freed blocks of up to 32 MB in its heaps, where one
    layer's matrices leave gaps that the next layer's do not quite fit: peak memory grew by nearly a layer's size with every
    layer (docs/research/notebook.md).
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.malloc_trim(0)


@contextmanager
def no_large_blocks_in_heaps() -> Iterator[None]:
    """Map every larger block by itself in a `with` block, so that the heaps do not grow around blocks that are freed soon.

    For building a model whose parameters are made and dropped one by one: with the 16 MB matrices of a model of 8 billion
    weights the heap grew to 0.9 GB of address space, nearly all of it holes, which a limit on address space counts.
    """
    if (libc := _libc()) is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


@cache
def _libc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc; musl has neither the functions nor the problem."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):
        return None
