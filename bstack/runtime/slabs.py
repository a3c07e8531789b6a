"""Memory for blocks that goes back to the system when they are dropped.

What malloc frees stays with the process for the most part. So blocks lie in slabs that are mapped for them alone, stacked in
the order of the file: dropping from the top unmaps whole slabs, and gives back the pages at the end of the last one.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

__all__ = ["Slabs"]

SLAB = 16 * 2**20
# Of a block: a cache line, which suits vector loads.
ALIGNMENT = 64

# Python maps shared memory if nothing is said, of which nothing goes back before the whole mapping does.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass
class _Slab:
    memory: mmap.mmap
    view: memoryview
    address: int
    used: int
    blocks: int


class Slabs:
    """A stack of blocks in memory of its own. Not thread-safe: the owner takes turns.

    Parameters
    ----------
    slab : int
        Bytes of a slab; a block that is larger gets one of its size.
    """

    def __init__(self, slab: int = SLAB):
        self._size = slab
        self._slabs: list[_Slab] = []
        self._starts: list[int] = []  # of each block in its slab

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def mapped_bytes(self) -> int:
        """Address space taken; pages that no block has touched are not in memory."""
        return sum(len(slab.memory) for slab in self._slabs)

    def push(self, block: bytes) -> int:
        """Copy a block on top of the stack and return its address, a multiple of 64.

        Raises
        ------
        MemoryError
            The system has none left.
        """
        source = memoryview(block).cast("B")
        top = self._slabs[-1] if self._slabs else None
        if top is None or top.used + source.nbytes > len(top.memory):
            top = self._map(max(source.nbytes, self._size))
        start = top.used
        top.view[start : start + source.nbytes] = source
        top.used = -(-(start + source.nbytes) // ALIGNMENT) * ALIGNMENT
        top.blocks += 1
        self._starts.append(start)
        return top.address + start

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
                top.view.release()
                top.memory.close()
                self._slabs.pop()
            else:
                _give_back(top.memory, start, top.used)
                top.used = start

    def _map(self, size: int) -> _Slab:
        try:
            memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, **_PRIVATE)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of blocks: {error.strerror}") from None
        slab = _Slab(memory, memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, 0)
        self._slabs.append(slab)
        return slab


def _give_back(memory: mmap.mmap, start: int, stop: int) -> None:
    """Return the whole pages of a range to the system, where it can take a part of a mapping back."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_DONTNEED") and first < stop:
        last = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, len(memory))
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)
