"""Memory for blocks that goes back to the system when they are dropped.

What malloc frees stays with the process for the most part. So blocks lie in slabs that are mapped for them alone, stacked in
the order of the file: dropping from the top unmaps whole slabs, and gives back the pages at the end of the last one.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["HostMemory", "Memory", "Slabs"]

SLAB = 16 * 2**20
# Of a block: a cache line, which suits vector loads.
ALIGNMENT = 64

# Python maps shared memory if nothing is said, of which nothing goes back before the whole mapping does.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Memory(Protocol):
    """One slab."""

    size: int
    address: int

    def write(self, start: int, block: memoryview) -> None:
        """Copy a block to `start`."""

    def give_back(self, start: int, stop: int) -> None:
        """Return what can be returned of a range that is not used any more."""

    def close(self) -> None:
        """Return all of it."""


class HostMemory:
    """A mapping of private memory.

    Raises
    ------
    MemoryError
        The system has none left.
    """

    def __init__(self, size: int):
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._map = mmap.mmap(-1, self.size, **_PRIVATE)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of blocks: {error.strerror}") from None
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def write(self, start: int, block: memoryview) -> None:
        self._view[start : start + block.nbytes] = block

    def give_back(self, start: int, stop: int) -> None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED") and first < stop:
            last = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.size)
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        self._view.release()
        self._map.close()


@dataclass
class _Slab:
    memory: Memory
    used: int = 0
    blocks: int = 0


class Slabs:
    """A stack of blocks in memory of its own. Not thread-safe: the owner takes turns.

    Parameters
    ----------
    slab : int
        Bytes of a slab; a block that is larger gets one of its size.
    memory : callable
        Makes a slab of at least so many bytes.
    """

    def __init__(self, slab: int = SLAB, memory: Callable[[int], Memory] = HostMemory):
        self._size, self._memory = slab, memory
        self._slabs: list[_Slab] = []
        self._starts: list[int] = []  # of each block in its slab

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def mapped_bytes(self) -> int:
        """Address space taken; pages that no block has touched are not in memory."""
        return sum(slab.memory.size for slab in self._slabs)

    def push(self, block: bytes) -> int:
        """Copy a block on top of the stack and return its address, a multiple of 64.

        Raises
        ------
        MemoryError
            There is none left.
        """
        source = memoryview(block).cast("B")
        top = self._slabs[-1] if self._slabs else None
        if top is None or top.used + source.nbytes > top.memory.size:
            top = _Slab(self._memory(max(source.nbytes, self._size)))
            self._slabs.append(top)
        start = top.used
        top.memory.write(start, source)
        top.used = -(-(start + source.nbytes) // ALIGNMENT) * ALIGNMENT
        top.blocks += 1
        self._starts.append(start)
        return top.memory.address + start

    def pop(self, count: int) -> None:
        """Drop the uppermost blocks and give their memory back. Their addresses must not be used any more."""
        while count > 0:
            top = self._slabs[-1]
            gone = min(count, top.blocks)
            count -= gone
            top.blocks -= gone
            start = self._starts[-gone]
            del self._starts[-gone:]
            if top.blocks == 0:
                self._slabs.pop().memory.close()
            else:
                top.memory.give_back(start, top.used)
                top.used = start
