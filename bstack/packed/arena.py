"""Memory for blocks that goes back to the system when they are dropped.

Most memory that malloc frees stays with the process. So blocks lie in slabs that are mapped for them alone, in the order of
the file: dropping from the end unmaps whole slabs and gives back the pages at the end of the last one.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Allocation", "Arena", "HostSlab", "Memory"]

SLAB = 16 * 2**20
# Blocks begin at cache lines, for vector loads.
ALIGNMENT = 64

# Python maps shared memory by default, whose pages do not go back before the whole mapping does.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Memory(Protocol):
    """One slab."""

    size: int
    address: int

    def write(self, start: int, block: bytes) -> None:
        """Copy a block to `start`. Several threads may write at a time, each elsewhere."""

    def give_back(self, start: int, stop: int) -> None:
        """Return as much as possible of an unused range to the system."""

    def close(self) -> None:
        """Return all of it to the system."""


class HostSlab:
    """A mapping of private memory. Raise MemoryError if the system has none left."""

    def __init__(self, size: int):
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._map = mmap.mmap(-1, self.size, **_PRIVATE)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes of blocks: {error.strerror}") from None
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)

    def write(self, start: int, block: bytes) -> None:
        ctypes.memmove(self.address + start, block, len(block))  # releases the GIL

    def give_back(self, start: int, stop: int) -> None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED") and first < stop:
            last = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.size)
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        del self._first  # a mapping with a reference into it cannot be closed
        self._map.close()


@dataclass
class _Slab:
    memory: Memory
    used: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Allocation:
    """Memory for one block, at an address that is a multiple of 64."""

    address: int
    _memory: Memory
    _start: int
    _length: int

    def write(self, block: bytes) -> None:
        """Copy the block there, from any thread; ValueError for a block of another length."""
        if len(block) != self._length:
            raise ValueError(f"a block of {len(block)} bytes does not fit an allocation of {self._length} bytes.")
        self._memory.write(self._start, block)


class Arena:
    """A stack of blocks in memory of its own. Not thread-safe."""

    def __init__(self, slab: int = SLAB, memory: Callable[[int], Memory] = HostSlab):
        self._size, self._memory = slab, memory
        self._slabs: list[_Slab] = []
        self._starts: list[int] = []  # of each block in its slab

    def __len__(self) -> int:
        return len(self._starts)

    def reserve(self, length: int) -> Allocation:
        """Allocate a block of `length` bytes on top of the stack; MemoryError if there is no memory left."""
        top = self._slabs[-1] if self._slabs else None
        if top is None or top.used + length > top.memory.size:
            top = _Slab(self._memory(max(length, self._size)))
            self._slabs.append(top)
        start = top.used
        top.used = -(-(start + length) // ALIGNMENT) * ALIGNMENT
        top.blocks += 1
        self._starts.append(start)
        return Allocation(top.memory.address + start, top.memory, start, length)

    def pop(self, count: int) -> None:
        """Drop the uppermost `count` blocks and give their memory back; their addresses become invalid."""
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
