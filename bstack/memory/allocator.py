"""The C library's allocator, told to give the memory of freed tensors back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["give_back_freed_memory", "no_large_blocks_in_heaps"]

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_SMALL = 2**17
# As far as glibc itself raises its threshold when larger blocks are freed.
_LARGE = 2**25


def give_back_freed_memory() -> None:
    """Return the free pages of the C library's heaps to the system; a few milliseconds, so once for each layer.

    The first call also limits the heaps to two, where there would be one for every few threads.

    glibc keeps freed blocks of up to 32 MB in its heaps, where one layer's matrices leave gaps that the next layer's do not
    quite fit: peak memory grew by nearly a layer's size with every layer (docs/memory.md). Does nothing where the C library
    is another one.
    """
    if (trim := _find()) is not None:
        trim(0)


@contextmanager
def no_large_blocks_in_heaps() -> Iterator[None]:
    """Map every larger block by itself meanwhile, so that the heaps do not grow around blocks that are freed soon.

    For building a model whose parameters are made and thrown away one by one: with the matrices of 16 MB of a model of 8 billion
    weights the heap became .9 GB long, nearly all of it holes. They are no memory, but a limit on address space counts them.
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
def _find() -> Callable[[int], int] | None:
    if (libc := _libc()) is None:
        return None
    libc.mallopt(_M_ARENA_MAX, 2)
    return libc.malloc_trim


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: musl has neither the functions nor the habit."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):
        return None
